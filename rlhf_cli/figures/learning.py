"""Learning curves: what the evaluations of runs say, against the responses that were learned from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.evals.table import points
from rlhf_cli.figures.inline import INLINE
from rlhf_cli.figures.style import styles
from rlhf_cli.store.metrics import VOCABULARY, read
from rlhf_cli.store.run import Run

METRICS = {
    "eval/kl": "KL to the SFT policy",
    "eval/reward": "proxy reward",
    "eval/gold": "gold reward",
    "eval/length": "length of a response",
    "eval/entropy": "entropy per token",
    "eval/perplexity_ref": "perplexity under the SFT policy",
    "eval/repetition": "repeated 4-grams",
}
"""What is drawn, and how it is called."""
UNNAMED = {"1", "reward", "gold"}
"""Units that say no more than the name does."""
SMALL = (2.9, 2.1)
"""Inches of one of many panels."""


@dataclass(frozen=True)
class Series:
    """One metric of the runs of a curve."""

    curve: str
    seeds: tuple[tuple[tuple[float, float], ...], ...]
    """Of each run: episodes and value, at every evaluation that has one."""

    @property
    def mean(self) -> list[tuple[float, float]]:
        """Over the seeds, where all of them have been."""
        at: dict[float, list[float]] = defaultdict(list)
        for seed in self.seeds:
            for episodes, value in seed:
                at[episodes].append(value)
        whole = {x: values for x, values in at.items() if len(values) == len(self.seeds)}
        return [(x, mean_and_se(values).mean) for x, values in sorted(whole.items())]


def series(runs: Sequence[Run], metric: str) -> list[Series]:
    """One metric of the RL runs among `runs`, a series per curve; none where no run has it."""
    curve = {point.key: point.curve for point in points(runs)}
    found: dict[str, list[tuple[tuple[float, float], ...]]] = defaultdict(list)
    for run in runs:
        if marks := tuple(_marks(run, metric)):
            found[curve[run.key]].append(marks)
    return [Series(name, tuple(seeds)) for name, seeds in sorted(found.items())]


def _marks(run: Run, metric: str) -> Iterator[tuple[float, float]]:
    for row in read(run.metrics_path):
        if "eval/kl" in row and math.isfinite(value := row.get(metric, math.nan)):
            yield row["episodes"], value


def learning(runs: Sequence[Run]) -> dict[str, Figure]:
    """A small figure for each of `METRICS` that any run has, by its title.

    A faint line is one seed, the full one the mean over the seeds of a curve.
    """
    looks = styles({point.curve: point.algo for point in points(runs)})
    drawn = {}
    for metric, title in METRICS.items():
        if curves := series(runs, metric):
            unit = VOCABULARY[metric].unit
            drawn[title] = _panel(curves, looks, "" if unit in UNNAMED else unit)
    return drawn


def _panel(curves: Sequence[Series], looks: Mapping[str, Mapping[str, str]], unit: str) -> Figure:
    with rc_context(INLINE):
        figure = Figure(figsize=SMALL, layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            look = looks[curve.curve]
            style: dict[str, Any] = {"color": look["color"], "linestyle": look["line"]}
            for seed in curve.seeds if len(curve.seeds) > 1 else ():
                axes.plot(*zip(*seed, strict=True), **style, linewidth=0.7, alpha=0.35)
            if mean := curve.mean:
                axes.plot(*zip(*mean, strict=True), **style, linewidth=1.4, zorder=3)
        axes.set(xlabel="episodes", ylabel=unit)
        axes.locator_params(nbins=5)
    return figure
