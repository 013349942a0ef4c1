"""Reward and gold against KL, a row per panel, judged where curves are at the same KL.

Straight lines are least squares through all evaluations of a curve, as in the blog of P3O, with the range
of 95% that other prompts and other seeds would lead to. The claim is that one algorithm lies above others
at given KLs; differences are paired by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass as typed

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Means, curves, mean_of_known, means
from rlhf_cli.evals.matched import Measure, differences
from rlhf_cli.evals.table import Point, check_comparable, points
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.frontier import measured, panel, reading, rows
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import PANEL, RC, styles
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.run import Run

GRID = 21
"""Places along a line at which its range is drawn."""


@typed(frozen=True, config=STRICT)
class Options:
    """What the claim says."""

    pairs: tuple[tuple[str, str], ...]
    """The algorithm that is said to lie above, and the one below; a panel is judged by those it has."""
    kls: tuple[float, ...]
    """Nats."""
    measure: Measure = "reward"


@dataclass(frozen=True)
class Panel:
    """A set of runs on the same data."""

    name: str
    points: Sequence[Point]
    curves: Sequence[Curve]
    bands: Mapping[str, tuple[Floats, Sequence[Interval]]]
    """Curve to KLs, and the straight line there."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """Two plots per panel, or one where the data have no gold. Raises UserError for runs that differ."""
    options = spec.typed(Options)
    made = [_panel(name, runs) for name, runs in panels.items()]
    parts = [part for each in made for part in _parts(each, options)]
    reason = "No KL of the claim was reached by two curves that it compares."
    verdict, reason = judge(parts) if parts else ("open", reason)
    table = [
        {"panel": each.name, **row} for each in made for row in [*rows(each.points), *_lines(each)]
    ]
    return Result(_figure(spec.title, made), table, verdict, reason)


def _panel(name: str, runs: Sequence[Run]) -> Panel:
    check_comparable(runs)
    gathered = curves(runs)
    return Panel(name, points(runs), gathered, {curve.name: _band(curve) for curve in gathered})


def _band(curve: Curve) -> tuple[Floats, list[Interval]]:
    """The straight line of the reward over the KLs that were measured."""
    kl = means(curve).kl
    grid = np.linspace(np.nanmin(kl), np.nanmax(kl), GRID)
    return grid, intervals(lambda m: _straight(m[0], grid), [curve])


def _straight(mean: Means, grid: Floats) -> Floats:
    """[...,G] least squares of the reward on the KL, [...,S,K], over runs and evaluations alike."""
    kl, reward = (x.reshape(*x.shape[:-2], -1) for x in (mean.kl, mean.reward))
    kl = np.where(np.isfinite(reward), kl, np.nan)
    centre, level = (mean_of_known(x)[..., None] for x in (kl, reward))
    slope = mean_of_known((kl - centre) * (reward - level)) / mean_of_known((kl - centre) ** 2)
    line: Floats = level + slope[..., None] * (grid - centre)
    return line


def _parts(made: Panel, options: Options) -> Iterator[Part]:
    """Every better algorithm of the panel less every worse one, at each KL that both reached."""
    by_algo: dict[str, list[Curve]] = {}
    for curve in made.curves:
        by_algo.setdefault(curve.algo, []).append(curve)
    for better, worse in options.pairs:
        for curve, base in product(by_algo.get(better, ()), by_algo.get(worse, ())):
            for found in differences([curve, base], options.kls, base.name):
                if found.measure == options.measure:
                    where = f"{made.name}, {found.measure} at {found.kl:g} nats"
                    yield Part(f"{where}, {found.curve} - {found.baseline}", found.difference)


def _lines(made: Panel) -> Iterator[dict[str, Any]]:
    """The numbers of the straight lines and their ranges."""
    for curve, (grid, line) in made.bands.items():
        for kl, at in zip(grid.tolist(), line, strict=True):
            values = {"kl": kl, "reward": at.value, "low": at.low, "high": at.high}
            yield {"mark": "line", "curve": curve, **values}


def _figure(title: str, made: Sequence[Panel]) -> Figure:
    ys = measured([point for each in made for point in each.points])
    if not ys:
        raise UserError("no run of this figure has been evaluated yet; make its runs with --run.")
    with rc_context(RC):
        size = (PANEL[0] * len(ys), (PANEL[1] + 0.1) * len(made) + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(made), len(ys), squeeze=False)
        for row, each in zip(grid, made, strict=True):
            for axes, y in zip(row, ys, strict=True):
                panel(axes, each.points, y)
            _shaded(row[0], each)
            row[0].set_title(each.name, loc="left", fontsize=8)
        figure.suptitle(title)
        entries = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            entries.values(),
            entries.keys(),
            title=" · ".join(
                [*reading([p for each in made for p in each.points], ys), "shades: 95%"]
            ),
            loc="outside lower center",
            ncols=2 * len(ys),
        )
    return figure


def _shaded(axes: Axes, made: Panel) -> None:
    """The range of each straight line."""
    for curve, style in styles({p.curve: p.algo for p in made.points}).items():
        grid, line = made.bands[curve]
        low, high = [at.low for at in line], [at.high for at in line]
        axes.fill_between(grid, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=1)
