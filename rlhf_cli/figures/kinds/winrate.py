"""Which policy's responses are preferred to which other's: a matrix, or win rates over one policy.

A policy is all runs of an algorithm at one setting, by the responses of their last evaluation; the policy
that they started from is called sft. Runs of two policies are compared seed by seed on the same prompts,
and intervals cover prompts and seeds. Judges like length: the numbers beside the picture have the win
rate at equal length too, of the mean outcome per prompt, its interval over prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import chain, combinations
from typing import Annotated, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval, interval
from rlhf_cli.evals.curves import Curve, Floats, Means, mean_of_known
from rlhf_cli.evals.winrate import Share, at_equal_length
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.credit import tint
from rlhf_cli.figures.kinds.matches import Llm, Match, Measure, Policy, matches, policies
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import PANEL, RC, look
from rlhf_cli.recipes import STRICT, NonNegative
from rlhf_cli.store.run import Run

PERCENT = 100


@dataclass(frozen=True, config=STRICT)
class Expected:
    """One order that the source finds."""

    measure: Measure
    better: str
    worse: str


@dataclass(frozen=True, config=STRICT)
class Options:
    """What is compared, by whom."""

    against: str | None
    """The policy that all others are compared with; null compares everyone with everyone."""
    tolerance: NonNegative
    """Scores that differ by no more tie."""
    llm: Llm | None
    """Who tells quality; null is the gold reward."""
    expects: Annotated[tuple[Expected, ...], Field(min_length=1)]
    """The claim is all of them, in every panel."""


@plain_dataclass(frozen=True)
class Rated:
    """A match and its win rate."""

    match: Match
    rate: Interval


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A row of pictures per panel: by quality and by the proxy reward.

    Raises UserError if nobody can judge, or for an expectation about a policy that is not there.
    """
    options = spec.typed(Options)
    found = list(chain.from_iterable(_matches(*panel, options) for panel in panels.items()))
    parts = [
        _part(panel, found, expected, options.against)
        for panel in panels
        for expected in options.expects
    ]
    verdict, reason = judge(parts)
    rated = [Rated(match, interval(_rate, [match.outcomes])) for match in found]
    figure = _figure(spec.title, rated, options)
    return Result(figure, [_row(one) for one in rated], verdict, reason)


def _matches(panel: str, runs: Sequence[Run], options: Options) -> Iterator[Match]:
    made = policies(runs)
    pairs = list(combinations(made, 2))
    if options.against is not None:
        against = _named(made, options.against)
        pairs = [(policy, against) for policy in made if policy is not against]
    return matches(panel, pairs, options.llm, options.tolerance)


def _named(made: Sequence[Policy], name: str) -> Policy:
    for policy in made:
        if policy.name == name:
            return policy
    there = ", ".join(policy.name for policy in made)
    raise UserError(f"options.against={name} is none of the policies; choose one of {there}.")


def _rate(means: Sequence[Means]) -> Floats:
    """Win rate of the first curve: a mean over prompts and seeds."""
    return mean_of_known(means[0].reward[..., 0])


def _part(panel: str, found: Sequence[Match], expected: Expected, against: str | None) -> Part:
    here = [m for m in found if (m.panel, m.measure) == (panel, expected.measure)]
    better, worse = expected.better, expected.worse
    said = f"{panel}, {better} over {worse} by {expected.measure}"
    if against is None:
        outcomes, sign = _between(here, better, worse)
        gap = interval(lambda m: sign * (_rate(m) - 0.5), [outcomes])
        return Part(f"{said}, win rate minus 1/2", gap)
    pair = [_between(here, name, against)[0] for name in (better, worse)]
    gap = interval(lambda m: _rate(m[:1]) - _rate(m[1:]), pair)
    return Part(f"{said}, difference of win rates over {against}", gap)


def _between(found: Sequence[Match], first: str, second: str) -> tuple[Curve, int]:
    """The outcomes of a match; -1 if they are those of the second policy, else 1."""
    for match in found:
        names = (match.first.name, match.second.name)
        if names in ((first, second), (second, first)):
            return match.outcomes, 1 if names == (first, second) else -1
    raise UserError(
        f"options.expects names {first} and {second}, which are not compared; the policies are"
        f" {', '.join(_names(found))}."
    )


def _names(found: Sequence[Match]) -> list[str]:
    return list(dict.fromkeys(each.name for match in found for each in (match.first, match.second)))


def _row(rated: Rated) -> dict[str, object]:
    match, rate, equal = rated.match, rated.rate, _at_equal_length(rated.match.outcomes)
    return {
        "panel": match.panel,
        "measure": match.measure,
        "first": match.first.name,
        "second": match.second.name,
        "seeds": rate.seeds,
        "win_rate": rate.value,
        "low": rate.low,
        "high": rate.high,
        "at_equal_length": equal.value,
        "at_equal_length_low": equal.low,
        "at_equal_length_high": equal.high,
    }


def _at_equal_length(outcomes: Curve) -> Share:
    outcome, excess = (
        mean_of_known(np.stack([getattr(path, name)[0] for path in outcomes.paths]), axis=0)
        for name in ("reward", "length")
    )
    told = np.isfinite(outcome)
    return at_equal_length(outcome[told], excess[told])


# --- the picture


def _figure(title: str, rated: Sequence[Rated], options: Options) -> Figure:
    panels = dict.fromkeys(one.match.panel for one in rated)
    called = {
        "quality": "gold reward" if options.llm is None else options.llm.model,
        "reward": "proxy reward",
    }
    tall = PANEL[1] + 0.4
    if options.against is not None:
        tall = 0.2 * len(_names([one.match for one in rated])) + 0.8
    with rc_context(RC):
        size = (PANEL[0] * len(called), tall * len(panels) + 0.2)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), len(called), squeeze=False)
        for row, panel in zip(grid, panels, strict=True):
            for axes, measure in zip(row, called, strict=True):
                here = [r for r in rated if (r.match.panel, r.match.measure) == (panel, measure)]
                axes.set_title(f"{panel}, by {called[measure]}", fontsize=8)
                (_matrix if options.against is None else _dots)(axes, here)
        figure.suptitle(title)
    return figure


def _matrix(axes: Axes, rated: Sequence[Rated]) -> None:
    """Win rates of the policy of a row over that of a column."""
    names = _names([one.match for one in rated])
    for one in rated:
        row, column = names.index(one.match.first.name), names.index(one.match.second.name)
        value, low, high = one.rate.value, one.rate.low, one.rate.high
        _cell(axes, row, column, value, low, high)
        _cell(axes, column, row, 1 - value, 1 - high, 1 - low)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    ends = (-0.5, len(names) - 0.5)
    axes.set(xlim=ends, ylim=ends[::-1], ylabel="win rate (%) of", xlabel="over")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _cell(axes: Axes, row: int, column: int, rate: float, low: float, high: float) -> None:
    across = [column - 0.48, column + 0.48]
    axes.fill_between(across, row - 0.48, row + 0.48, color=tint(rate - 0.5, 0.5), linewidth=0)
    text: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(column, row - 0.1, f"{PERCENT * rate:.1f}", fontsize=8, **text)
    between = f"[{PERCENT * low:.0f}, {PERCENT * high:.0f}]"
    axes.text(column, row + 0.24, between, fontsize=6, **text)


def _dots(axes: Axes, rated: Sequence[Rated]) -> None:
    """Win rates over the one policy, the highest on top."""
    ordered = sorted(rated, key=lambda one: one.rate.value, reverse=True)
    for place, one in enumerate(ordered):
        mark, rate = look(one.match.first.algo), one.rate
        low, high = PERCENT * (rate.value - rate.low), PERCENT * (rate.high - rate.value)
        style: dict[str, Any] = {"fmt": mark.marker, "color": mark.colour}
        axes.errorbar([PERCENT * rate.value], [place], xerr=[[low], [high]], **style)
    axes.axvline(PERCENT / 2, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [one.match.first.name for one in ordered])
    against = ordered[0].match.second.name
    axes.set(ylim=(len(ordered) - 0.5, -0.5), xlabel=f"win rate over {against} (%)")
