"""What was gained of proxy and gold reward against the square root of the KL, with best of n beside it.

Dashed lines are the form that Gao, Schulman and Hilton 2023 (arXiv:2210.10760) found for gold, fitted to
each curve. Gains are over the SFT policy, in standard deviations of its reward over the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass as typed
from scipy.special import xlogy

from rlhf_cli.evals.best_of_n import ALGO, as_curve
from rlhf_cli.evals.bootstrap import interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Means, curves, mean_of_known, means
from rlhf_cli.evals.matched import MEASURES, Measure
from rlhf_cli.evals.overoptimisation import Overoptimisation, overoptimisation
from rlhf_cli.evals.table import check_comparable
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import PANEL, RC, styles
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.run import Run

TITLES = {"reward": "proxy reward gained", "gold": "gold reward gained"}


@typed(frozen=True, config=STRICT)
class Options:
    """What best of n is measured by."""

    draws: Annotated[int, Field(ge=2)]
    """Responses of the SFT policy to each evaluation prompt."""
    best_of: tuple[int, ...]
    """Each n, ascending from 1."""


@dataclass(frozen=True)
class Mark:
    """One evaluation of one curve, as far from the SFT policy as `distance`."""

    curve: str
    algo: str
    measure: Measure
    distance: float
    """sqrt(KL), in sqrt(nats)."""
    gained: float
    """Standard deviations."""
    low: float
    high: float


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """Proxy and gold side by side, for the runs of all panels. Raises UserError for runs that differ."""
    options = spec.typed(Options)
    runs = [run for some in panels.values() for run in some]
    check_comparable(runs)
    trained = curves(runs)
    drawn = spec.made(runs[0])
    score, gold = np.array(drawn["score"]), np.array(drawn["gold"])
    best = as_curve(score, gold, options.best_of, drawn["prompts"])
    units = {measure: _spread(trained, measure) for measure in MEASURES}
    marks = [mark for curve in [*trained, best] for mark in _marks(curve, units)]
    parts = [part for curve in trained for part in _parts(curve)]
    found = [overoptimisation(curve) for curve in trained]
    wear = {one.curve: one for one in found}
    wear[best.name] = _in_units(overoptimisation(best, "best_of_n"), best, units["gold"])
    verdict, reason = judge(parts)
    least = sorted(found, key=lambda one: one.gap.value)
    reason = "; ".join([reason.rstrip("."), *map(_said, least)]) + "."
    figure = _figure(spec.title, marks, list(wear.values()))
    return Result(figure, [asdict(mark) for mark in marks], verdict, reason)


def _said(one: Overoptimisation) -> str:
    gap = one.gap
    within = f"[{gap.low:+.2f}, {gap.high:+.2f}]"
    return f"{one.curve}: {one.turning}, proxy - gold {gap.value:+.2f} {within} at the end"


def _in_units(fit: Overoptimisation, curve: Curve, unit: float) -> Overoptimisation:
    """The fit of best of n, whose start is a mean over responses and so scatters less than one of them."""
    scale = _spread([curve], "gold") / unit
    return replace(fit, alpha=fit.alpha * scale, beta=fit.beta * scale)


def _marks(curve: Curve, units: Mapping[Measure, float]) -> Iterator[Mark]:
    distance = np.sqrt(np.maximum(mean_of_known(means(curve).kl, axis=0), 0.0))
    for measure, unit in units.items():

        def gains(m: Sequence[Means], y: str = measure, unit: float = unit) -> Floats:
            return _gained(m[0], y) / unit

        for d, one in zip(distance.tolist(), intervals(gains, [curve]), strict=True):
            yield Mark(curve.name, curve.algo, measure, d, one.value, one.low, one.high)


def _gained(mean: Means, measure: str) -> Floats:
    """[...,K] over the first evaluation of each run, averaged over the runs."""
    y: Floats = getattr(mean, measure)
    return mean_of_known(y - y[..., :1], axis=-2)


def _spread(found: Sequence[Curve], measure: str) -> float:
    """Standard deviation of the SFT policy's reward over the prompts."""
    first = [getattr(path, measure)[0] for curve in found for path in curve.paths]
    return float(np.nanstd(first))


def _parts(curve: Curve) -> Iterator[Part]:
    """The second half of a curve: proxy rises, gold falls."""
    half = (len(curve.paths[0].step) - 1) // 2
    for measure, sign, does in (("reward", 1, "rises"), ("gold", -1, "falls")):

        def change(m: Sequence[Means], y: str = measure, sign: int = sign) -> Floats:
            gained = _gained(m[0], y)
            late: Floats = sign * (gained[..., -1] - gained[..., half])
            return late

        name = {"reward": "proxy"}.get(measure, measure)
        yield Part(f"{curve.name}, {name} {does} in the second half by", interval(change, [curve]))


def _figure(title: str, marks: Sequence[Mark], found: Sequence[Overoptimisation]) -> Figure:
    looks = styles({mark.curve: mark.algo for mark in marks})
    with rc_context(RC):
        legend = 0.4 + 0.16 * math.ceil(len(looks) / 3)
        size = (PANEL[0] * 2, PANEL[1] + legend + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        both = figure.subplots(1, 2)
        for axes, measure in zip(both, MEASURES, strict=True):
            for name, look in looks.items():
                mine = [mark for mark in marks if (mark.curve, mark.measure) == (name, measure)]
                _curve(axes, mine, look)
            axes.set_xlabel("sqrt(KL to the SFT policy), in sqrt(nats)")
            axes.set_ylabel(f"{TITLES[measure]} (standard deviations)")
        for one in found:
            furthest = max(mark.distance for mark in marks if mark.curve == one.curve)
            d = np.linspace(0.0, furthest, 100)
            both[1].plot(d, _form(one, d), "--", color=looks[one.curve]["color"], linewidth=0.8)
        figure.suptitle(title)
        figure.legend(
            *both[0].get_legend_handles_labels(),
            title="shades: 95% over seeds and prompts · dashed: fits of Gao et al. 2023",
            loc="outside lower center",
            ncols=3,
        )
    return figure


def _curve(axes: Axes, marks: Sequence[Mark], look: Mapping[str, str]) -> None:
    x, colour = [mark.distance for mark in marks], look["color"]
    y = [mark.gained for mark in marks]
    name = marks[0].curve.replace(ALGO, "best of n")
    axes.plot(x, y, "-", color=colour, marker=look["marker"], markersize=3, linewidth=1, label=name)
    low, high = [mark.low for mark in marks], [mark.high for mark in marks]
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _form(one: Overoptimisation, d: Floats) -> Floats:
    """The fitted gain of gold at each distance."""
    wear = xlogy(d, d) if one.form == "rl" else d**2
    fitted: Floats = one.alpha * d - one.beta * wear
    return fitted
