"""Where credit falls when a sentence of a preferred answer is replaced by one that answers another prompt.

After "From r to Q*" (Rafailov et al. 2024, arXiv:2404.12358, Fig. 1): beta log(pi / pi_ref) of each token.
The paper shows one answer; here one is shown, the first, and many are measured. With c the credit summed
over the tokens of the sentence, or over those that follow it, the drop is c(original) - c(corrupted), in
units of reward. Before the sentence it is 0, since a policy does not see what follows. `tools.corrupted`
computes the credit; this draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic.dataclasses import dataclass

from rlhf_cli.evals.bootstrap import interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Means, mean_of_known
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.credit import Answer, Heatmap, fill, size
from rlhf_cli.figures.kinds.paths import curve_of, settings
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import BLUE, RC
from rlhf_cli.recipes import STRICT, Count
from rlhf_cli.store.run import Run

WHERE = ("in the sentence", "after it")
NAMES = ("original", "corrupted")


@dataclass(frozen=True, config=STRICT)
class Options:
    """What is corrupted."""

    answers: Count
    """The first of the held-out preferred answers of two sentences or more."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """One heatmap, and the drops of each setting. Raises UserError for a run without its credit."""
    made = {
        name: {seed: spec.made(run)["pairs"] for seed, run in by_seed.items()}
        for panel, runs in panels.items()
        for name, by_seed in settings(panel, runs).items()
    }
    curves = [_curve(name, by_seed) for name, by_seed in made.items()]
    verdict, reason = judge([part for curve in curves for part in _parts(curve)])
    shown = next(pairs[0] for by_seed in made.values() for pairs in by_seed.values())
    drops = [row for curve in curves for row in _drops(curve)]
    figure = _figure(spec.title, _heatmap(shown), drops)
    return Result(figure, [*_tokens(shown), *drops], verdict, reason)


def _curve(name: str, by_seed: Mapping[int, Sequence[Any]]) -> Curve:
    """Drops [WHERE, answers] of each seed."""
    drops = {seed: np.array([_drop(pair) for pair in pairs]).T for seed, pairs in by_seed.items()}
    some = next(iter(by_seed.values()))
    return curve_of(name, drops, [pair["prompt"] for pair in some])


def _drop(pair: Mapping[str, Any]) -> list[float]:
    """Credit of the original less that of the corrupted answer, in the sentence and after it."""
    original, corrupted = (_sums(pair[name]) for name in NAMES)
    return [a - b for a, b in zip(original, corrupted, strict=True)]


def _sums(answer: Mapping[str, Any]) -> tuple[float, float]:
    begin, end = answer["span"]
    return math.fsum(answer["credit"][begin:end]), math.fsum(answer["credit"][end:])


def _means(means: Sequence[Means]) -> Floats:
    """[...,WHERE] of the one curve, over its seeds."""
    return mean_of_known(means[0].reward, axis=-2)


def _parts(curve: Curve) -> Iterator[Part]:
    name = f"{curve.name}, {len(curve.paths[0].prompts)} answers"
    inside = interval(lambda m: _means(m)[..., 0], [curve])
    yield Part(f"{name}, drop {WHERE[0]}", inside)
    more = interval(lambda m: _means(m)[..., 0] - np.abs(_means(m)[..., 1]), [curve])
    yield Part(f"{name}, drop {WHERE[0]} minus size of the change {WHERE[1]}", more)


def _drops(curve: Curve) -> Iterator[dict[str, Any]]:
    for where, one in zip(WHERE, intervals(_means, [curve]), strict=True):
        found = {"drop": one.value, "low": one.low, "high": one.high, "seeds": one.seeds}
        yield {"panel": curve.name, "where": where, **found}


def _tokens(pair: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the heatmap shows."""
    for name in NAMES:
        for token, credit in zip(pair[name]["tokens"], pair[name]["credit"], strict=True):
            yield {"answer": name, "token": token, "credit": credit}


def _heatmap(pair: Mapping[str, Any]) -> Heatmap:
    answers = (
        Answer(name, tuple(pair[name]["tokens"]), tuple(pair[name]["credit"])) for name in NAMES
    )
    facts = {f"sentence of the {name}": "".join(_sentence(pair[name])).strip() for name in NAMES}
    return Heatmap(facts, pair["prompt"], pair["beta"], tuple(answers))


def _sentence(answer: Mapping[str, Any]) -> Sequence[str]:
    begin, end = answer["span"]
    tokens: Sequence[str] = answer["tokens"][begin:end]
    return tokens


def _figure(title: str, heatmap: Heatmap, drops: Sequence[Mapping[str, Any]]) -> Figure:
    with rc_context(RC):
        wide, tall = size(heatmap)
        low = 0.25 * len(drops) + 0.7
        figure = Figure(figsize=(wide, tall + low + 0.2), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(tall, low))[:, 0]
        fill(above, heatmap)
        _dots(below.subplots(), drops)
        figure.suptitle(title)
    return figure


def _dots(axes: Axes, drops: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(drops):
        around = [[row["drop"] - row["low"]], [row["high"] - row["drop"]]]
        axes.errorbar([row["drop"]], [place], xerr=around, fmt="o", color=BLUE)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(drops)), [f"{row['panel']}, {row['where']}" for row in drops])
    axes.set_ylim(len(drops) - 0.5, -0.5)
    axes.set_xlabel("credit lost by the corruption (units of reward), mean over answers")
