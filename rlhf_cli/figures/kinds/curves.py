"""Any metrics of evaluations against how far a run has come: a plot per metric, a curve per setting.

A claim is that some curves lie above others: at the end of the runs, at a share of them or on average over
them, or in how unevenly they change. It is judged by the difference of sums of curves, paired by prompt,
over seeds and prompts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as typed

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import intervals, of_mean
from rlhf_cli.evals.curves import Curve, Floats, Means, curves, mean_of_known
from rlhf_cli.evals.table import check_comparable
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import PANEL, RC, styles
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run

By: TypeAlias = Literal["kl", "reward", "gold", "length"]
"""What is known prompt by prompt."""
At: TypeAlias = Literal["end", "area", "wobble"] | Annotated[float, Field(ge=0, le=1)]
"""The last evaluation, the mean over the whole run, the standard deviation of the changes from one evaluation
to the next (0 on a straight line), or the evaluation at a share of the run."""

AXES = {
    "step": "optimiser steps",
    "episodes": "responses learned from",
    "share": "share of the responses learned from",
    "tokens": "tokens drawn",
}
NAMES = {
    "eval/kl": "KL to the SFT policy (nats)",
    "eval/reward": "reward (learned reward model)",
    "eval/gold": "gold reward",
    "eval/length": "length (tokens)",
    "eval/eos_rate": "share of responses that end",
    "eval/perplexity_ref": "perplexity under SFT",
    "eval/entropy": "entropy (nats per token)",
    "eval/repetition": "repeated words (share)",
    "eval/distinct_2": "distinct pairs of words (share)",
    "eval/rouge_l": "ROUGE-L with the reference",
    "win_rate": "win rate over the start, by gold",
    "spread": "reward: median, 10-90%",
}
"""What a metric is called on an axis."""


@typed(frozen=True, config=STRICT)
class Term:
    """A curve, or the best of an algorithm's curves."""

    curve: str
    """Its name in the legend, or an algorithm's."""
    panel: str | None = None
    """None is the panel that is being judged."""
    at: At | None = None
    """None is as the claim says."""


Terms: TypeAlias = Annotated[
    tuple[Term, ...],
    BeforeValidator(lambda given: [{"curve": t} if isinstance(t, str) else t for t in given]),
]


@typed(frozen=True, config=STRICT)
class Claim:
    """That the sum of some curves lies above that of others, or within so much of it."""

    metric: By
    above: Terms
    below: Terms
    at: At = "end"
    within: float | None = None
    """The claim is that the two differ by less; None claims the order."""
    by_seed: bool = False
    """Whether runs of one seed are compared with each other, as where all else about them is the same too."""


@typed(frozen=True, config=STRICT)
class Options:
    """What is drawn and what is judged."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names as in a run's ledger, and two from single responses: win_rate, the share of prompts whose
    response has more gold reward than the one before the first step (ties are halves), and spread, quantiles
    of the learned reward over the responses of all seeds."""
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]
    """Each is judged in every panel that has its curves."""
    against: Literal["step", "episodes", "share", "tokens"] = "episodes"


@dataclass(frozen=True)
class Mark:
    """One curve of one plot at one evaluation."""

    panel: str
    curve: str
    algo: str
    metric: str
    x: float
    value: float
    low: float
    """Of 95%; nan if there is one seed and nothing is known of single prompts."""
    high: float
    seeds: int


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A plot per metric for each panel. Raises UserError for runs that cannot share one."""
    options = spec.typed(Options)
    gathered = {name: _named(runs) for name, runs in panels.items()}
    rows = {run.key: _evaluations(run) for runs in panels.values() for run in runs}
    marks = [
        mark
        for name, found in gathered.items()
        for metric in options.metrics
        for mark in _marks(name, found, metric, options.against, rows)
    ]
    parts = [part for claim in options.claims for part in _parts(claim, gathered)]
    verdict, reason = judge(parts)
    figure = _figure(spec.title, options, list(gathered), marks)
    return Result(figure, [asdict(mark) for mark in marks], verdict, reason)


def _named(runs: Sequence[Run]) -> list[Curve]:
    """The curves of a panel, called by what sets each apart from most of its algorithm's."""
    check_comparable(runs)
    by_algo: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves(runs):
        by_algo[curve.algo].append(curve)
    named = [one for found in by_algo.values() for one in _shortened(found)]
    return sorted(named, key=lambda curve: curve.name)


def _shortened(found: Sequence[Curve]) -> Iterator[Curve]:
    """The curves of one algorithm without the settings that more than half of them share."""
    settings = [re.split(r" (?=[\w.]+=)", curve.name)[1:] for curve in found]
    count = Counter(word for words in settings for word in words)
    for curve, words in zip(found, settings, strict=True):
        apart = [word for word in words if 2 * count[word] <= len(found)]
        yield replace(curve, name=" ".join([curve.algo, *apart]))


def _evaluations(run: Run) -> list[dict[str, float]]:
    return [row for row in read(run.metrics_path) if "eval/kl" in row]


def _marks(
    panel: str,
    found: Sequence[Curve],
    metric: str,
    against: str,
    rows: Mapping[str, list[dict[str, float]]],
) -> Iterator[Mark]:
    most = max(row["episodes"] for curve in found for p in curve.paths for row in rows[p.key])
    column = {"tokens": "budget/tokens", "share": "episodes"}.get(against, against)
    unit = most if against == "share" else 1.0
    for curve in found:
        ledgers = [rows[path.key] for path in curve.paths]
        for place, level in enumerate(_levels(curve, metric, ledgers)):
            x = float(np.mean([ledger[place][column] for ledger in ledgers])) / unit
            yield Mark(panel, curve.name, curve.algo, metric, x, *level, len(ledgers))


def _levels(
    curve: Curve, metric: str, ledgers: Sequence[list[dict[str, float]]]
) -> list[tuple[float, float, float]]:
    """Value and range at each evaluation: of seeds and prompts where single prompts are known."""
    if metric == "spread":
        rewards = np.concatenate([path.reward for path in curve.paths], axis=1)
        low, middle, high = np.nanquantile(rewards, (0.1, 0.5, 0.9), axis=1).tolist()
        return list(zip(middle, low, high, strict=True))
    if metric == "win_rate":
        curve, metric = _wins(curve), "eval/gold"
    name = metric.removeprefix("eval/")
    if name in ("kl", "reward", "gold", "length"):
        found = intervals(lambda m: mean_of_known(getattr(m[0], name), axis=-2), [curve])
        return [(one.value, one.low, one.high) for one in found]
    table = [[row.get(metric, nan) for row in at] for at in zip(*ledgers, strict=True)]
    levels = (of_mean(values, len(values)) for values in table)
    return [(one.value, one.low, one.high) for one in levels]


def _wins(curve: Curve) -> Curve:
    """Instead of gold rewards, whether each is above the same prompt's at the start; 1/2 if it is equal."""
    paths = [replace(p, gold=(1 + np.sign(p.gold - p.gold[0])) / 2) for p in curve.paths]
    return replace(curve, paths=tuple(paths))


def _parts(claim: Claim, gathered: Mapping[str, Sequence[Curve]]) -> Iterator[Part]:
    """The claim in every panel that has its curves, or once if it names its panels itself."""
    terms = [*claim.above, *claim.below]
    here = [""] if all(term.panel for term in terms) else list(gathered)
    judged = 0
    for panel in here:
        groups = [_meant(term, gathered.get(term.panel or panel, ())) for term in terms]
        if all(groups):
            judged += 1
            where = f"{panel}, " if len(gathered) > 1 and panel else ""
            yield from _difference(claim, groups, where)
    if not judged:
        wanted = " and ".join(term.curve for term in terms)
        there = sorted({curve.name for found in gathered.values() for curve in found})
        raise UserError(
            f"no panel has the curves {wanted} that options.claims names; choose among"
            f" {', '.join(there)}."
        )


def _meant(term: Term, found: Sequence[Curve]) -> list[Curve]:
    by_name = [curve for curve in found if curve.name == term.curve]
    return by_name or [curve for curve in found if curve.algo == term.curve]


def _difference(claim: Claim, groups: Sequence[Sequence[Curve]], where: str) -> Iterator[Part]:
    terms, ups = [*claim.above, *claim.below], len(claim.above)
    flat = [curve for group in groups for curve in group]

    def difference(m: Sequence[Means]) -> Floats:
        rest, total = list(m), np.zeros(())
        for place, (term, group) in enumerate(zip(terms, groups, strict=True)):
            mine, rest = rest[: len(group)], rest[len(group) :]
            levels = [_level(getattr(x, claim.metric), _at(term, claim)) for x in mine]
            total = total + (1 if place < ups else -1) * np.max(levels, axis=0)
        return total[..., None]

    (found,) = intervals(difference, flat, by_seed=claim.by_seed)
    names = [_called(term, group, claim) for term, group in zip(terms, groups, strict=True)]
    said = f"{where}{claim.metric}, {' + '.join(names[:ups])} - {' - '.join(names[ups:])}"
    if claim.within is None:
        yield Part(said, found)
        return
    yield Part(f"{said}, above -{claim.within:g} by", found.moved(1, claim.within))
    yield Part(f"{said}, below {claim.within:g} by", found.moved(-1, claim.within))


def _at(term: Term, claim: Claim) -> At:
    return claim.at if term.at is None else term.at


def _called(term: Term, group: Sequence[Curve], claim: Claim) -> str:
    """A term in the words of a reason."""
    at = _at(term, claim)
    words = {"end": "", "area": " on average", "wobble": "'s wobble"}
    when = words[at] if isinstance(at, str) else f" at {at:.0%}"
    best = "best " if len(group) > 1 else ""
    panel = f" ({term.panel})" if term.panel else ""
    return f"{best}{term.curve}{panel}{when}"


def _level(values: Floats, at: At) -> Floats:
    """[...,S,K] to [...]: the runs' mean, where along them the claim is made."""
    if at == "area":
        weights = np.ones(values.shape[-1])
        weights[[0, -1]] /= 2  # trapezoids: evaluations are equally far apart
        return mean_of_known((values * weights).sum(axis=-1) / weights.sum())
    if at == "wobble":
        return mean_of_known(np.diff(values).std(axis=-1, ddof=1))
    place = values.shape[-1] - 1 if at == "end" else round(float(at) * (values.shape[-1] - 1))
    return mean_of_known(values[..., place])


def _figure(title: str, options: Options, panels: Sequence[str], marks: Sequence[Mark]) -> Figure:
    """Panels below each other, or the metrics of a single one, three in a row."""
    names = {mark.curve: mark.algo for mark in marks}
    columns = len(options.metrics) if len(panels) > 1 else min(3, len(options.metrics))
    rows = -(-len(options.metrics) * len(panels) // columns)
    legend = 0.35 + 0.16 * -(-len(names) // columns)
    with rc_context(RC):
        size = (max(2.5 * columns, PANEL[0]), 2.1 * rows + legend + 0.2)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        plots = [(panel, metric) for panel in panels for metric in options.metrics]
        for axes, (panel, metric) in zip(grid, plots, strict=False):
            mine = [mark for mark in marks if (mark.panel, mark.metric) == (panel, metric)]
            _plot(axes, mine, styles(names))
            axes.set_ylabel(NAMES.get(metric, metric))
            axes.set_xlabel(AXES[options.against])
            if len(panels) > 1 and metric == options.metrics[0]:
                axes.set_title(panel, loc="left", fontsize=8)
        for axes in grid[len(plots) :]:
            axes.remove()
        for place in range(columns * (len(panels) > 1)):  # panels are read against each other
            for axes in grid[place + columns :: columns]:
                axes.sharey(grid[place])
        for name, style in styles(names).items():
            look = {"color": style["color"], "marker": style["marker"]}
            grid[0].plot([], [], style["line"], label=name, **look)
        figure.suptitle(title)
        figure.legend(
            *grid[0].get_legend_handles_labels(),
            title="shades: 95% over seeds and prompts, or over seeds where prompts are not known",
            loc="outside lower center",
            ncols=columns,
        )
    return figure


def _plot(axes: Axes, marks: Sequence[Mark], looks: Mapping[str, dict[str, Any]]) -> None:
    for name, style in looks.items():
        mine = [mark for mark in marks if mark.curve == name]
        x = [mark.x for mark in mine]
        look = {"color": style["color"], "marker": style["marker"]}
        axes.plot(
            x, [mark.value for mark in mine], style["line"], markersize=3, linewidth=1.1, **look
        )
        low, high = [mark.low for mark in mine], [mark.high for mark in mine]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
