"""What policies answered when they had paid the same KL, which is when answers may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.evals.curves import Curve, Path
from rlhf_cli.store.run import Run

SHOWN = 6
"""Prompts, from the first: nobody chose them."""


@dataclass(frozen=True)
class Checkpoint:
    """One evaluation of one run, which stands for a curve."""

    curve: str
    key: str
    seed: int
    step: int
    kl: float
    """Mean over the prompts, nats per response."""


@dataclass(frozen=True)
class Answer:
    """A response and what was measured of it; None where there is no score."""

    of: Checkpoint
    response: str
    kl: float
    reward: float | None
    gold: float | None
    length: float


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer of each curve to it."""

    prompt: str
    answers: tuple[Answer, ...]


def checkpoints(curves: Sequence[Curve]) -> list[Checkpoint]:
    """For each curve the evaluation whose mean KL is nearest to the smallest final KL of all curves.

    The final KL of a curve is the mean over its runs. Of evaluations that are as near, the first.
    """
    least = min(_final(curve) for curve in curves)
    return [
        min(_evaluations(curve), key=lambda checkpoint: abs(checkpoint.kl - least))
        for curve in curves
    ]


def samples(chosen: Sequence[Checkpoint], runs: Sequence[Run]) -> list[Sample]:
    """The first `SHOWN` prompts with the answers of the chosen checkpoints."""
    by_key = {run.key: run for run in runs}
    columns = [_answers(by_key[checkpoint.key], checkpoint) for checkpoint in chosen]
    return [
        Sample(rows[0]["prompt"], tuple(map(_answer, chosen, rows)))
        for rows in zip(*columns, strict=True)
    ]


def _final(curve: Curve) -> float:
    return float(sum(path.kl[-1].mean() for path in curve.paths)) / len(curve.paths)


def _evaluations(curve: Curve) -> list[Checkpoint]:
    return [
        Checkpoint(curve.name, path.key, path.seed, int(step), kl)
        for path in curve.paths
        for step, kl in zip(path.step, _means(path), strict=True)
    ]


def _means(path: Path) -> list[float]:
    means: list[float] = path.kl.mean(axis=1).tolist()
    return means


def _answers(run: Run, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return run.responses(checkpoint.step)[:SHOWN]


def _answer(of: Checkpoint, row: Mapping[str, Any]) -> Answer:
    return Answer(of, row["response"], row["kl"], row.get("score"), row.get("gold"), row["length"])
