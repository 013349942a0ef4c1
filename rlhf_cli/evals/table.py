"""The evaluations of many runs as one table, read from run directories alone.

Runs that differ in their seed only make up one curve. Two curves of one algorithm are told apart by
whatever else their keys are hashes of, so that no label hides a difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cli.errors import UserError
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run


@dataclass(frozen=True)
class Point:
    """One evaluation of one run."""

    curve: str
    """The algorithm, with the settings that tell it from other curves of the table."""
    algo: str
    title: str
    """What the data are called, e.g. hh-embedded."""
    model: str
    seed: int
    group: str
    beta: float | None
    key: str
    step: int
    episodes: int
    prompts: int
    kl: float
    kl_se: float
    kl_k3: float
    reward: float
    reward_se: float
    gold: float
    """nan where the corpus has no gold reward; so is its error."""
    gold_se: float
    length: float
    eos_rate: float


@dataclass(frozen=True)
class SeedMean:
    """The runs of a curve at one step, averaged; errors are over the seeds, not the prompts."""

    curve: str
    algo: str
    step: int
    seeds: int
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    gold: float
    gold_se: float


def points(runs: Sequence[Run]) -> list[Point]:
    """Every evaluation of the RL runs among `runs`, by curve, seed and step.

    Raises UserError for a damaged manifest or ledger.
    """
    manifests = {run: run.manifest() for run in runs}
    manifests = {run: m for run, m in manifests.items() if m.get("stage") == "rl"}
    curves = _curves(manifests)
    table = [
        _point(curves[run], manifest, row)
        for run, manifest in manifests.items()
        for row in read(run.metrics_path)
        if "eval/kl" in row
    ]
    return sorted(table, key=lambda p: (p.curve, p.seed, p.key, p.step))


def seed_means(table: Sequence[Point]) -> list[SeedMean]:
    """Average each curve over its seeds at every step that at least two of them have reached."""
    cells: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for point in table:
        cells[point.curve, point.step].append(point)
    return [
        SeedMean(
            curve,
            cell[0].algo,
            step,
            len(cell),
            *mean_and_se([p.kl for p in cell]),
            *mean_and_se([p.reward for p in cell]),
            *mean_and_se([p.gold for p in cell]),
        )
        for (curve, step), cell in sorted(cells.items())
        if len(cell) > 1
    ]


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse to compare RL runs that were not given, or not measured on, the same things.

    Data, model, evaluation prompts, SFT policy and, where both have one, reward model must agree.
    Raises UserError naming the two runs and the difference.
    """
    seen: dict[str, tuple[object, Run]] = {}
    for run in runs:
        for what, value in _shared(run):
            other, first = seen.setdefault(what, (value, run))
            if other != value:
                raise UserError(
                    f"{first.path.name} and {run.path.name} cannot share a figure: their {what}"
                    f" differ ({other} and {value}); name runs that agree in it."
                )


def _shared(run: Run) -> Iterator[tuple[str, object]]:
    """What a frontier takes for granted about every run on it, in words for people."""
    manifest = run.manifest()
    yield "data", manifest.get("title")
    yield "data digests", (manifest.get("data") or {}).get("digest")
    yield "models", manifest.get("model")
    for stage, parent in (manifest.get("parents") or {}).items():
        yield f"{stage} parents", parent
    for prompts in {row["eval/prompts"] for row in read(run.metrics_path) if "eval/kl" in row}:
        yield "numbers of evaluation prompts", int(prompts)


def _point(curve: str, manifest: Mapping[str, Any], row: Mapping[str, float]) -> Point:
    def value(name: str) -> float:
        return row.get(f"eval/{name}", math.nan)

    return Point(
        curve=curve,
        algo=manifest["algo"],
        title=manifest["title"],
        model=manifest["model"],
        seed=manifest["seed"],
        group=manifest["group"],
        beta=manifest.get("beta"),
        key=manifest["key"],
        step=int(row["step"]),
        episodes=int(row["episodes"]),
        prompts=int(row["eval/prompts"]),
        kl=value("kl"),
        kl_se=value("kl_se"),
        kl_k3=value("kl_k3"),
        reward=value("reward"),
        reward_se=value("reward_se"),
        gold=value("gold"),
        gold_se=value("gold_se"),
        length=value("length"),
        eos_rate=value("eos_rate"),
    )


def _curves(manifests: Mapping[Run, Mapping[str, Any]]) -> dict[Run, str]:
    """Name each run's curve: its algorithm and, if several are there, what differs."""
    settings = {run: dict(_leaves(manifest["science"])) for run, manifest in manifests.items()}
    rivals: dict[str, list[Run]] = defaultdict(list)
    for run, manifest in manifests.items():
        rivals[manifest["algo"]].append(run)
    names = {}
    for algo, group in rivals.items():
        keys = sorted(set().union(*(settings[run] for run in group)) - {"seed"})
        differ = [k for k in keys if len({repr(settings[run].get(k)) for run in group}) > 1]
        for run in group:
            said = (f"{k.removeprefix('algo.')}={settings[run].get(k)}" for k in differ)
            names[run] = " ".join([algo, *said])
    return names


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
