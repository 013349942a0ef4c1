"""What a run tells of itself while it learns, such as the implicit rewards of DPO: a plot per panel.

A panel is one setting with several seeds; a line is the mean over them of a metric that every optimiser
step, or every rollout, writes down, averaged over stretches of the run that are equally long. A claim is
about the last stretch, and judged over seeds by Student's t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass as typed
from scipy import stats

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import LEVEL, Interval
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import GREEN, LINES, ORANGE, PANEL, RC, shade
from rlhf_cli.recipes import STRICT, Count
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run

COLOURS = (GREEN, ORANGE)
NAMES = {
    "train/implicit_chosen": "preferred responses",
    "train/implicit_rejected": "the others",
}
"""What a metric is called in the legend."""


@typed(frozen=True, config=STRICT)
class Claim:
    """That a metric ends on one side of a number."""

    panel: str
    metric: str
    lies: Literal["above", "below"]
    of: float = 0.0


@typed(frozen=True, config=STRICT)
class Options:
    """What is drawn and what is judged."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names as in a run's ledger, all in one unit."""
    label: str
    """Of the vertical axis."""
    stretches: Count
    """How many means a run is cut into."""
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Mark:
    """One line of one plot at the end of one stretch."""

    panel: str
    metric: str
    step: float
    value: float
    low: float
    """Of 95% over seeds; nan with one."""
    high: float
    seeds: int


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A plot per panel. Raises UserError for a panel of several settings and for a metric no run has."""
    options = spec.typed(Options)
    marks = {
        (name, metric): _marks(name, runs, metric, options.stretches)
        for name, runs in panels.items()
        for metric in options.metrics
    }
    verdict, reason = judge([_part(claim, marks) for claim in options.claims])
    figure = _figure(spec.title, options, list(panels), marks)
    rows = [asdict(mark) for found in marks.values() for mark in found]
    return Result(figure, rows, verdict, reason)


def _marks(panel: str, runs: Sequence[Run], metric: str, stretches: int) -> list[Mark]:
    seeds = [run.manifest()["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"the panel '{panel}' has two runs of one seed; give every setting a panel of its own."
        )
    traces = [_stretched(run, metric, stretches) for run in runs]
    found = []
    for steps, values in zip(
        *(np.array(part).T for part in zip(*traces, strict=True)), strict=True
    ):
        mean, se = mean_and_se(values.tolist())
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * se
        found.append(
            Mark(panel, metric, float(steps.mean()), mean, mean - half, mean + half, len(values))
        )
    return found


def _stretched(run: Run, metric: str, stretches: int) -> tuple[list[float], list[float]]:
    """Last step and mean of each stretch of a run."""
    rows = [row for row in read(run.metrics_path) if metric in row]
    if len(rows) < stretches:
        raise UserError(
            f"{run.path.name} has {len(rows)} values of {metric}, and options.stretches={stretches} are"
            " asked for; ask for fewer, or for another metric."
        )
    parts = [
        rows[part[0] : part[-1] + 1] for part in np.array_split(np.arange(len(rows)), stretches)
    ]
    return (
        [part[-1]["step"] for part in parts],
        [float(np.mean([row[metric] for row in part])) for part in parts],
    )


def _part(claim: Claim, marks: Mapping[tuple[str, str], Sequence[Mark]]) -> Part:
    found = marks.get((claim.panel, claim.metric))
    if not found:
        there = "; ".join(f"{metric} in '{panel}'" for panel, metric in marks)
        raise UserError(
            f"options.claims names {claim.metric} in '{claim.panel}', which is not drawn; choose among"
            f" {there}."
        )
    end, sign = found[-1], 1 if claim.lies == "above" else -1
    value = sign * (end.value - claim.of)
    half = end.high - end.value
    df = end.seeds - 1
    se = half / float(stats.t.ppf((1 + LEVEL) / 2, df))
    name = NAMES.get(claim.metric, claim.metric)
    said = f"{claim.panel}, {name}, how far {claim.lies} {claim.of:g} at the end"
    return Part(said, Interval(value, value - half, value + half, se, df, end.seeds))


def _figure(
    title: str,
    options: Options,
    panels: Sequence[str],
    marks: Mapping[tuple[str, str], Sequence[Mark]],
) -> Figure:
    with rc_context(RC):
        size = (max(PANEL[0], 2.6 * len(panels)), PANEL[1])
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=True):
            for place, metric in enumerate(options.metrics):
                _plot(axes, marks[panel, metric], place)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set_title(panel, loc="left", fontsize=8)
            axes.set_xlabel("optimiser steps")
        grid[0].set_ylabel(options.label)
        figure.suptitle(title)
        figure.legend(
            *grid[0].get_legend_handles_labels(),
            title="shades: 95% over seeds",
            loc="outside lower center",
            ncols=len(options.metrics),
        )
    return figure


def _plot(axes: Axes, marks: Sequence[Mark], place: int) -> None:
    colour = shade(COLOURS[place % len(COLOURS)], place // len(COLOURS))
    steps = [mark.step for mark in marks]
    name = NAMES.get(marks[0].metric, marks[0].metric)
    axes.plot(
        steps, [mark.value for mark in marks], LINES[place % len(LINES)], color=colour, label=name
    )
    axes.fill_between(
        steps,
        [m.low for m in marks],
        [m.high for m in marks],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
