"""Policies against each other: outcomes per seed and prompt, by the proxy reward and by quality.

Quality is the gold reward where the data have one, and elsewhere what a language model said when
`rlhf winrate judge=llm` asked it: verdicts are read from its cache, nobody is asked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import cached_property
from pathlib import Path as File
from typing import Literal, TypeAlias

import numpy as np
from pydantic.dataclasses import dataclass

from rlhf_cli.errors import UserError
from rlhf_cli.evals.curves import Curve, Floats, Path, curves
from rlhf_cli.evals.winrate import by_both_orders, by_score
from rlhf_cli.figures.kinds.paths import curve_of
from rlhf_cli.judges.cache import Answers, Question
from rlhf_cli.judges.prompts import verdict
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.run import Run

SFT = "sft"
"""What the policy that all runs started from is called."""
Measure: TypeAlias = Literal["quality", "reward"]


@dataclass(frozen=True, config=STRICT)
class Llm:
    """A language model that was asked."""

    model: str
    prompt: str
    """Version of the wording."""
    cache: str
    """Folder of the answers."""

    @cached_property
    def _answers(self) -> Answers:
        return Answers(File(self.cache).expanduser())

    def outcomes(
        self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
    ) -> Floats:
        """[N] of our responses against theirs; nan where it was not asked in both orders."""
        texts = list(zip(prompts, ours, theirs, strict=True))
        straight = np.array([self._verdict(prompt, one, other) for prompt, one, other in texts])
        swapped = np.array([self._verdict(prompt, other, one) for prompt, one, other in texts])
        return by_both_orders(straight, swapped)

    def _verdict(self, prompt: str, first: str, second: str) -> float:
        if first == second:  # equal responses tie unasked
            return 0.5
        question = Question(self.model, self.prompt, prompt, first, second)
        return verdict(self._answers.get(question) or "")


@plain_dataclass(frozen=True)
class Policy:
    """One evaluation of each of several runs, by seed."""

    name: str
    algo: str
    paths: Mapping[int, Path]
    runs: Mapping[int, Run]
    place: int
    """Of the evaluation: 0 for the first, -1 for the last."""

    def column(self, name: str, seed: int) -> Floats:
        """[N] reward, gold or length."""
        values: Floats = getattr(self.paths[seed], name)[self.place]
        return values

    def responses(self, seed: int) -> list[str]:
        """[N]"""
        step = int(self.paths[seed].step[self.place])
        return [row["response"] for row in self.runs[seed].responses(step)]


@plain_dataclass(frozen=True)
class Match:
    """One policy against another, measured one way."""

    panel: str
    measure: Measure
    first: Policy
    second: Policy
    outcomes: Curve
    """Per seed [1,N]: 1 where the first wins, 1/2 for ties; and by how much it is longer."""


def policies(runs: Sequence[Run]) -> list[Policy]:
    """What the runs started from, `SFT`, and what they ended with: a policy per setting, by name."""
    by_key = {run.key: run for run in runs}
    ends = [
        Policy(
            curve.name,
            curve.algo,
            {path.seed: path for path in curve.paths},
            {path.seed: by_key[path.key] for path in curve.paths},
            -1,
        )
        for curve in curves(runs)
    ]
    paths = {seed: path for policy in ends for seed, path in policy.paths.items()}
    owners = {seed: run for policy in ends for seed, run in policy.runs.items()}
    return [Policy(SFT, SFT, paths, owners, 0), *ends]


def matches(
    panel: str, pairs: Sequence[tuple[Policy, Policy]], llm: Llm | None, tolerance: float
) -> Iterator[Match]:
    """Every pair by quality, and then by the proxy reward; scores no further apart than `tolerance` tie.

    Raises UserError where nobody can judge, or for two policies without a seed in common.
    """
    for measure in ("quality", "reward"):
        for first, second in pairs:
            outcomes = _outcomes(measure, first, second, llm, tolerance)
            if not all(np.isfinite(path.reward).any() for path in outcomes.paths):
                fix = (
                    "ask a language model by `rlhf winrate judge=llm`, and name it in options.llm"
                    if measure == "quality"
                    else "train the runs with eval.proxy=true"
                )
                raise UserError(
                    f"nobody can tell the {measure} of {first.name} from that of {second.name} in the"
                    f" panel {panel}; {fix}."
                )
            yield Match(panel, measure, first, second, outcomes)


def _outcomes(
    measure: Measure, first: Policy, second: Policy, llm: Llm | None, tolerance: float
) -> Curve:
    seeds = sorted(first.paths.keys() & second.paths.keys())
    if not seeds:
        raise UserError(
            f"{first.name} and {second.name} have no seed in common, and runs are compared seed by seed;"
            " give both the same seeds."
        )
    prompts = first.paths[seeds[0]].prompts

    def outcome(seed: int) -> Floats:
        if measure == "quality" and llm is not None:
            return llm.outcomes(prompts, first.responses(seed), second.responses(seed))
        column = "gold" if measure == "quality" else "reward"
        return by_score(first.column(column, seed), second.column(column, seed), tolerance)

    def excess(seed: int) -> Floats:
        return first.column("length", seed) - second.column("length", seed)

    return curve_of(
        f"{first.name} over {second.name}",
        {seed: outcome(seed)[None] for seed in seeds},
        prompts,
        {seed: excess(seed)[None] for seed in seeds},
    )
