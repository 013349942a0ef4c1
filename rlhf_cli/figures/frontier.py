"""The KL-reward frontier: what a policy gained against how far it moved from the SFT policy.

A small point is one evaluation of one run, with standard errors over prompts both ways; a large one
is the mean over seeds at one step, with standard errors over seeds. Straight lines are least
squares through all evaluations of a curve. Beside the picture lie its numbers and their origin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_cli.errors import UserError
from rlhf_cli.evals.curves import curves
from rlhf_cli.evals.frontier import monotone, pareto
from rlhf_cli.evals.matched import areas, reach
from rlhf_cli.evals.statistics import Line, line_fit
from rlhf_cli.evals.table import Point, SeedMean, check_comparable, points, seed_means, trained
from rlhf_cli.figures.style import PANEL, RC, pictures, styles
from rlhf_cli.figures.write import as_csv
from rlhf_cli.store.files import atomic_write, disk
from rlhf_cli.store.provenance import origin
from rlhf_cli.store.run import Run

PANELS = {"reward": "reward (learned reward model)", "gold": "gold reward"}
"""What stands on the y axes, and how it is called."""


Fit = Literal["straight", "monotone"]
"""How the rewards of a curve are summed up: a line, as the P3O blog draws it, or what never falls."""


def frontier(
    runs: Sequence[Run], out: Path, command: str, fit: Fit = "straight"
) -> dict[str, Path]:
    """Draw the RL runs among `runs` and write the figure with its numbers.

    Returns {png, pdf, csv, fit, json}: `out` with each suffix (`_fit.csv` for the lines and areas). The
    same runs give the same png, pdf and csv, byte for byte. Raises UserError if nothing was evaluated
    yet or the runs are not comparable.
    """
    drawn = trained(runs)
    table = points(drawn)
    if not table:
        raise UserError(
            f"there is no evaluation to draw in {len(runs)} run(s), {len(drawn)} of stage rl;"
            " train one with `rlhf train algo=p3o_v2`."
        )
    check_comparable(drawn)
    base = str(out.with_suffix("") if out.suffix in {".png", ".pdf", ".csv", ".json"} else out)
    files = {kind: Path(f"{base}.{kind}") for kind in ("png", "pdf", "csv", "json")}
    files["fit"] = Path(f"{base}_fit.csv")
    with disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    for kind, data in pictures(draw(table, fit)).items():
        atomic_write(files[kind], data)
    atomic_write(files["csv"], as_csv(rows(table)))
    atomic_write(files["fit"], as_csv(_worth(table, drawn)))
    atomic_write(files["json"], json.dumps(origin(drawn, command), indent=2) + "\n")
    return files


def draw(table: Sequence[Point], fit: Fit = "straight") -> Figure:
    """The figure itself: one panel for the learned reward, one more where there is gold."""
    panels = measured(table)
    with rc_context(RC):
        figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1] + 0.6), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, y in zip(row, panels, strict=True):
            panel(axes, table, y, fit)
        figure.suptitle(_title(table))
        figure.legend(
            *row[0].get_legend_handles_labels(),
            title=("\n" if len(panels) == 1 else " · ").join(reading(table, panels, fit)),
            loc="outside lower center",
            ncols=2 * len(panels),
        )
    return figure


def measured(table: Sequence[Point]) -> list[str]:
    """Which of `PANELS` any evaluation has."""
    return [y for y in PANELS if any(math.isfinite(getattr(p, y)) for p in table)]


def panel(axes: Axes, table: Sequence[Point], y: str, fit: Fit = "straight") -> None:
    """Draw evaluations, their means over seeds and a line per curve; y is one of `PANELS`."""
    means = seed_means(table)
    for curve, style in styles({p.curve: p.algo for p in table}).items():
        mine = [p for p in table if p.curve == curve]
        averaged = [m for m in means if m.curve == curve]
        _marks(axes, mine, y, style, faint=bool(averaged))
        if averaged:
            _marks(axes, averaged, y, style, faint=False)
        xs, ys = _line(mine, averaged, y, fit)
        axes.plot(xs, ys, style["line"], color=style["color"], linewidth=1.1, zorder=2)
        # Drawn nowhere: the legend's entry, which shows marker and line together.
        axes.plot([], [], style["line"], color=style["color"], marker=style["marker"], label=curve)
    axes.set_xlabel("KL to the SFT policy (nats per response)")
    axes.set_ylabel(PANELS[y])


def _line(
    mine: Sequence[Point], averaged: Sequence[SeedMean], y: str, fit: Fit
) -> tuple[list[float], list[float]]:
    """A fit of the reward; gold, which falls when the reward is gamed, is joined up."""
    if y == "gold":
        marks = averaged or mine
        return [m.kl for m in marks], [m.gold for m in marks]
    if fit == "monotone":
        known = _finite(mine)
        rise = monotone([p.kl for p in known], [p.reward for p in known])
        return rise.kl.tolist(), rise.y.tolist()
    if (line := _fit(mine)) is None:
        return [], []
    return [line.low, line.high], [line.intercept + line.slope * x for x in (line.low, line.high)]


def _marks(
    axes: Axes,
    marks: Sequence[Point] | Sequence[SeedMean],
    y: str,
    style: dict[str, str],
    *,
    faint: bool,
) -> None:
    def column(name: str) -> list[float]:
        return [getattr(mark, name) for mark in marks]

    axes.errorbar(
        column("kl"),
        column(y),
        xerr=column("kl_se"),
        yerr=column(f"{y}_se"),
        fmt=style["marker"],
        color=style["color"],
        markersize=3 if faint else 5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=0.8,
        alpha=0.35 if faint else 1.0,
        zorder=3 if faint else 4,
    )


def _title(table: Sequence[Point]) -> str:
    first, seeds = table[0], len({p.seed for p in table})
    return (
        f"{first.title} · {first.model} · {first.prompts} held-out prompts"
        f" · {seeds} seed{'s' * (seeds > 1)}"
    )


def reading(
    table: Sequence[Point], panels: Sequence[str], fit: Fit = "straight"
) -> tuple[str, str]:
    """How to read bars and lines, for the foot of the figure."""
    averaged = seed_means(table)
    bars = "bars: standard error over prompts" + (" (small) or seeds (large)" if averaged else "")
    kind = "least squares" if fit == "straight" else "least squares that never fall"
    lines = kind + (" (reward), in order of steps (gold)" if len(panels) > 1 else "")
    return bars, f"lines: {lines}"


def _fit(table: Sequence[Point]) -> Line | None:
    known = _finite(table)
    return line_fit([p.kl for p in known], [p.reward for p in known])


def _finite(table: Sequence[Point]) -> list[Point]:
    return [p for p in table if math.isfinite(p.kl) and math.isfinite(p.reward)]


def fits(table: Sequence[Point]) -> list[dict[str, Any]]:
    """The straight line of each curve that has one."""
    fits = (
        (curve, _fit([p for p in table if p.curve == curve]))
        for curve in styles({p.curve: p.algo for p in table})
    )
    return [{"curve": curve, **line._asdict()} for curve, line in fits if line]


def _worth(table: Sequence[Point], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The line of each curve and, where responses were kept, what it gained by the KL that all reached."""
    found = fits(table)
    if not all(run.samples.is_dir() and any(run.samples.iterdir()) for run in runs):
        return found
    whole = curves(runs)
    if (upto := reach(whole)) <= 0:
        return found
    gains = {each.curve: each for each in areas(whole, upto)}
    for row in found:
        each = gains[row["curve"]]
        row["area_upto"] = upto
        for name, one in {"reward_area": each.reward, "gold_area": each.gold}.items():
            if one is not None:
                row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return found


def _free(marks: Sequence[Point | SeedMean], y: str) -> list[bool]:
    """Which of the marks no other one dominates."""
    known = [math.isfinite(getattr(m, y)) for m in marks]
    free = iter(pareto([(m.kl, getattr(m, y)) for m, k in zip(marks, known, strict=True) if k]))
    return [bool(next(free)) if k else False for k in known]


def rows(table: Sequence[Point]) -> list[dict[str, Any]]:
    """The numbers of all marks: single evaluations, then means over seeds.

    pareto_reward, pareto_gold: whether no other mark of the kind, of whatever curve, has both less KL and
    more of it.
    """
    return [*_marked("point", table), *_marked("mean", seed_means(table))]


def _marked(kind: str, marks: Sequence[Point | SeedMean]) -> list[dict[str, Any]]:
    free = zip(_free(marks, "reward"), _free(marks, "gold"), strict=True)
    return [
        {"mark": kind, **asdict(each), "pareto_reward": reward, "pareto_gold": gold}
        for each, (reward, gold) in zip(marks, free, strict=True)
    ]
