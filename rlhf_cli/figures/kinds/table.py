"""Every algorithm at the same KL and the same budget: a dot plot, and the table of its numbers.

Curves are read at one KL of a list, the largest that at least half of the curves reached in all of their
runs; what did not get there is named with the KL at which it ended. Intervals cover prompts and seeds.
Budgets and the number of settings tried are those of `evals.comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from statistics import fmean
from typing import Annotated

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval
from rlhf_cli.evals.comparison import Comparison, compare
from rlhf_cli.evals.curves import Curve, curves
from rlhf_cli.evals.grid import Cell, Grid
from rlhf_cli.evals.matched import Matched, Measure, at_kl, differences, matched
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import PANEL, RC, look
from rlhf_cli.recipes import STRICT, Positive
from rlhf_cli.store.run import Run

CALLED: dict[Measure, str] = {"gold": "gold reward", "reward": "proxy reward"}
"""What the measures are called."""


@dataclass(frozen=True, config=STRICT)
class Options:
    """What is claimed."""

    best: str
    """The algorithm that is said to be above all others in the measure."""
    measure: Measure
    kls: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Nats to choose from."""


@plain_dataclass(frozen=True)
class Panel:
    """One set of runs on the same problem."""

    name: str
    compared: Comparison
    kl: float
    """The chosen one."""
    levels: Sequence[Matched]
    """Of every curve, the best first and those that did not get there last."""
    parts: Sequence[Part]
    """Of the claim: the best less each of the others that got there, the least difference first."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A row per panel, a plot per reward. Raises UserError for an empty panel, or one without `best`."""
    options = spec.typed(Options)
    made = [_panel(name, runs, options) for name, runs in panels.items()]
    parts = [part for each in made for part in each.parts]
    verdict, _ = judge(parts) if parts else ("open", "")
    rows = [row for each in made for row in _rows(each)]
    reason = "; ".join(_reason(each, options) for each in made) + "."
    return Result(
        _figure(spec.title, made, options), rows, verdict, reason, _table(spec.title, made)
    )


def shared_kl(curves: Sequence[Curve], kls: Sequence[float]) -> float:
    """The largest KL that at least half of the curves reached in all runs; else the smallest there is."""

    def share(kl: float) -> float:
        return fmean(all(at_kl(path, kl) for path in curve.paths) for curve in curves)

    return max((kl for kl in kls if share(kl) >= 0.5), default=min(kls))


def _panel(name: str, runs: Sequence[Run], options: Options) -> Panel:
    gathered = curves(runs)
    kl = shared_kl(gathered, options.kls)

    def order(level: Matched) -> float:
        found = getattr(level, options.measure)
        return -found.value if found else math.inf

    levels = sorted(matched(gathered, [kl]), key=order)
    parts = sorted(_parts(name, gathered, kl, options), key=lambda part: part.difference.value)
    return Panel(name, compare(runs, force=True), kl, levels, parts)


def _parts(name: str, gathered: Sequence[Curve], kl: float, options: Options) -> Iterator[Part]:
    """The best less each of the others."""
    mine = [curve.name for curve in gathered if curve.algo == options.best]
    if len(mine) != 1:
        raise UserError(
            f"options.best={options.best} is {len(mine)} curves in the panel {name}; it must be one,"
            " whose runs differ in their seed only."
        )
    for found in differences(gathered, [kl], mine[0]):
        if found.measure == options.measure:
            yield Part(f"{found.baseline} - {found.curve}", _negative(found.difference))


def _negative(one: Interval) -> Interval:
    return replace(one, value=-one.value, low=-one.high, high=-one.low)


def _reason(made: Panel, options: Options) -> str:
    """How many curves are surely below and above, and which come closest to being above."""
    below = sum(part.difference.low > 0 for part in made.parts)
    above = sum(part.difference.high < 0 for part in made.parts)
    away = sum(level.reached == 0 for level in made.levels)
    nearest = "; ".join(part.sentence for part in made.parts[:3])
    return (
        f"{made.name}, {options.measure} at a KL of {made.kl:g} nats: of {len(made.parts)} others that"
        f" got there {below} lie below {options.best} and {above} above, by intervals of 95% that are not"
        f" corrected, and {away} did not get there; highest beside it: {nearest}"
    )


def _rows(made: Panel) -> Iterator[dict[str, object]]:
    ends = {row.curve: row.kl.value for row in made.compared.rows}
    for level in made.levels:
        yield {
            "panel": made.name,
            "curve": level.curve,
            "algo": level.algo,
            "kl": level.kl,
            "seeds": level.seeds,
            "reached": level.reached,
            **_spread("gold", level.gold),
            **_spread("reward", level.reward),
            "kl_at_end": ends[level.curve],
        }


def _spread(name: str, one: Interval | None) -> dict[str, float | None]:
    values = (one.value, one.low, one.high) if one else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _table(title: str, made: Sequence[Panel]) -> Grid:
    """What was reached at the KL and in the end, and what it took."""
    lines: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    for each in made:
        spent = {row.curve: row.cells() for row in each.compared.rows}
        notes |= dict.fromkeys(each.compared.grids["curves"].notes)
        for level in each.levels:
            row = spent[level.curve]
            lines.append(
                {
                    "data": each.name,
                    "curve": row.pop("curve"),
                    "seeds": row.pop("seeds"),
                    "at KL": each.kl,
                    "gold there": _cell(level.gold),
                    "proxy there": _cell(level.reward),
                    "KL at end": row.pop("KL"),
                    "proxy at end": row.pop("proxy"),
                    "gold at end": row.pop("gold"),
                    **row,
                }
            )
    first = "Intervals of 95% over prompts and seeds at the KL; curves without a value never reached it."
    cells = tuple(tuple(line.values()) for line in lines)
    return Grid(title, tuple(lines[0]), cells, (first, *notes), names=2).without_empty_columns()


def _cell(one: Interval | None) -> Cell | None:
    return Cell(one.value, interval=(one.low, one.high)) if one else None


# --- the picture


def _figure(title: str, made: Sequence[Panel], options: Options) -> Figure:
    measures = [options.measure, *(name for name in CALLED if name != options.measure)]
    tall = [0.17 * len(each.levels) + 0.7 for each in made]
    with rc_context(RC):
        size = (PANEL[0] * len(measures), sum(tall) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(
            len(made), len(measures), squeeze=False, sharey="row", height_ratios=tall
        )
        for row, each in zip(grid, made, strict=True):
            for axes, measure in zip(row, measures, strict=True):
                _dots(axes, each, measure)
                axes.set_xlabel(f"{CALLED[measure]} at a KL of {each.kl:g}")
            row[0].set_title(each.name, loc="left", fontsize=8)
            row[0].set_yticks(range(len(each.levels)), [level.curve for level in each.levels])
            row[0].set_ylim(len(each.levels) - 0.5, -0.5)
        figure.suptitle(title)
    return figure


def _dots(axes: Axes, made: Panel, measure: str) -> None:
    """A dot per curve, and where one did not get there, how far it came."""
    ends = {row.curve: row.kl.value for row in made.compared.rows}
    for place, level in enumerate(made.levels):
        one: Interval | None = getattr(level, measure)
        if one is not None:
            mark = look(level.algo)
            around = [[one.value - one.low], [one.high - one.value]]
            axes.errorbar([one.value], [place], xerr=around, fmt=mark.marker, color=mark.colour)
        elif not level.reached:
            said = f"ended at {ends[level.curve]:.2g} nats"
            middle = axes.get_yaxis_transform()
            axes.text(0.02, place, said, fontsize=6, va="center", color="#777777", transform=middle)
