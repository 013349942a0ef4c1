"""What a run tells of itself while it learns, such as the implicit rewards of DPO: a plot per panel.

A panel is one setting with several seeds; a line is the mean over them of a metric that every optimiser
step, or every rollout, writes down, averaged over stretches of the run that are equally long. A claim is
about the last stretch, and judged over seeds by Student's t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass as typed

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval, of_mean
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


Trace: TypeAlias = Sequence[tuple[float, Interval]]
"""Of each stretch its last step, and the mean over seeds."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A plot per panel. Raises UserError for a panel of several settings and for a metric no run has."""
    options = spec.typed(Options)
    traces = {
        (name, metric): _trace(name, runs, metric, options.stretches)
        for name, runs in panels.items()
        for metric in options.metrics
    }
    verdict, reason = judge([_part(claim, traces) for claim in options.claims])
    figure = _figure(spec.title, options, list(panels), traces)
    rows = [
        {"panel": panel, "metric": metric, "step": step, "value": one.value}
        | {"low": one.low, "high": one.high, "seeds": one.seeds}
        for (panel, metric), trace in traces.items()
        for step, one in trace
    ]
    return Result(figure, rows, verdict, reason)


def _trace(panel: str, runs: Sequence[Run], metric: str, stretches: int) -> Trace:
    seeds = [run.manifest()["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"the panel '{panel}' has two runs of one seed; give every setting a panel of its own."
        )
    cut = [_stretched(run, metric, stretches) for run in runs]
    steps, values = (np.array(part).T for part in zip(*cut, strict=True))
    return [
        (float(last.mean()), of_mean(level.tolist(), len(level)))
        for last, level in zip(steps, values, strict=True)
    ]


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


def _part(claim: Claim, traces: Mapping[tuple[str, str], Trace]) -> Part:
    found = traces.get((claim.panel, claim.metric))
    if not found:
        there = "; ".join(f"{metric} in '{panel}'" for panel, metric in traces)
        raise UserError(
            f"options.claims names {claim.metric} in '{claim.panel}', which is not drawn; choose among"
            f" {there}."
        )
    sign = 1 if claim.lies == "above" else -1
    name = NAMES.get(claim.metric, claim.metric)
    said = f"{claim.panel}, {name}, how far {claim.lies} {claim.of:g} at the end"
    return Part(said, found[-1][1].moved(sign, -sign * claim.of))


def _figure(
    title: str,
    options: Options,
    panels: Sequence[str],
    traces: Mapping[tuple[str, str], Trace],
) -> Figure:
    with rc_context(RC):
        size = (max(PANEL[0], 2.6 * len(panels)), PANEL[1])
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=True):
            for place, metric in enumerate(options.metrics):
                _plot(axes, metric, traces[panel, metric], place)
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


def _plot(axes: Axes, metric: str, trace: Trace, place: int) -> None:
    colour = shade(COLOURS[place % len(COLOURS)], place // len(COLOURS))
    line, name = LINES[place % len(LINES)], NAMES.get(metric, metric)
    steps, levels = [step for step, _ in trace], [one for _, one in trace]
    axes.plot(steps, [one.value for one in levels], line, color=colour, label=name)
    low, high = [one.low for one in levels], [one.high for one in levels]
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
