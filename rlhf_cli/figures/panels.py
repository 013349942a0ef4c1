"""Panels of a page: the frontier axis by axis, gold against the distance gone, and the key to both.

On a page a figure is cut into its panels, which stand beside or below each other as there is room, and the
key is part of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_cli.evals.table import Point, SeedMean, seed_means
from rlhf_cli.figures.frontier import PANELS, measured, panel
from rlhf_cli.figures.inline import INLINE
from rlhf_cli.figures.style import styles

SIZE = (3.8, 2.8)
"""Inches of a panel."""
SWATCH = (0.42, 0.14)
"""Inches of a line and a marker in the text."""


def frontiers(table: Sequence[Point]) -> dict[str, Figure]:
    """The panels of the frontier, by what is on their y axis."""
    return _each(table, panel)


def distances(table: Sequence[Point]) -> dict[str, Figure]:
    """Both rewards against the square root of the KL, means over seeds joined in order of their steps."""
    return _each(table, _distance)


def _each(
    table: Sequence[Point], draw: Callable[[Axes, Sequence[Point], str], None]
) -> dict[str, Figure]:
    """A figure for each reward that there is."""
    drawn = {}
    for y in measured(table):
        with rc_context(INLINE):
            figure = Figure(figsize=SIZE, layout="constrained")
            draw(figure.subplots(), table, y)
        drawn[PANELS[y]] = figure
    return drawn


def swatches(table: Sequence[Point]) -> dict[str, Figure]:
    """Line and marker of each curve, by its name."""
    return {
        curve: _swatch(look) for curve, look in styles({p.curve: p.algo for p in table}).items()
    }


def _distance(axes: Axes, table: Sequence[Point], y: str) -> None:
    means = seed_means(table)
    for curve, look in styles({p.curve: p.algo for p in table}).items():
        single = [p for p in table if p.curve == curve]
        averaged = [m for m in means if m.curve == curve]
        plain: dict[str, Any] = {
            "color": look["color"],
            "marker": look["marker"],
            "markeredgecolor": "white",
        }
        if averaged:
            axes.plot(*_roots(single, y), **plain, linestyle="", markersize=3, alpha=0.35)
        marks = averaged or single
        axes.plot(*_roots(marks, y), **plain, linestyle=look["line"], linewidth=1.1, markersize=5)
    axes.set(xlabel="√KL to the SFT policy (√nats per response)", ylabel=PANELS[y])


def _roots(marks: Sequence[Point] | Sequence[SeedMean], y: str) -> tuple[list[float], list[float]]:
    """sqrt(KL), of at least 0 since a mean of k1 may fall below it, and y."""
    return [math.sqrt(max(m.kl, 0.0)) for m in marks], [getattr(m, y) for m in marks]


def _swatch(look: Mapping[str, str]) -> Figure:
    with rc_context(INLINE):
        figure = Figure(figsize=SWATCH)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.axis("off")
        line: dict[str, Any] = {"color": look["color"], "linestyle": look["line"], "linewidth": 1.3}
        axes.plot([0.02, 0.98], [0, 0], **line)
        axes.plot([0.5], [0], look["marker"], color=look["color"], markersize=5)
    return figure
