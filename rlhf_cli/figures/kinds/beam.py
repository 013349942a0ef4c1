"""Win rate and length of likeliest responses by the width of the beam that looks for them.

After "From r to Q*" (Rafailov et al. 2024, arXiv:2404.12358, Fig. 2): a beam over log pi is a search guided
by the policy's own value function. Responses are compared with the preferred answer of the data to the same
prompt, by gold where the data have it and else by the proxy reward. `tools.beams` decodes; this draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from rlhf_cli.evals.bootstrap import Interval, interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Means, mean_of_known
from rlhf_cli.evals.winrate import by_score
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.kinds.paths import curve_of, settings
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import BLUE, GREEN, LINES, ORANGE, PANEL, PURPLE, RC
from rlhf_cli.recipes import STRICT, Count
from rlhf_cli.store.run import Run

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MEASURES = {"win rate": "reward", "length": "length"}
"""What is drawn -> where a curve has it."""


@dataclass(frozen=True, config=STRICT)
class Options:
    """What is decoded, and which width is said to be best."""

    widths: Annotated[tuple[Count, ...], Field(min_length=2)]
    """Ascending."""
    prompts: Count
    """The first of the held-out ones that have a preference pair."""
    best: Count
    """One of the widths."""

    @field_validator("best")
    @classmethod
    def _best_is_decoded(cls, best: int, info: ValidationInfo) -> int:
        if best not in info.data.get("widths", (best,)):
            raise ValueError("be one of options.widths")
        return best


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A curve for each setting of each panel. Raises UserError for a run that was not decoded."""
    options = spec.typed(Options)
    gathered = [
        _curve(name, by_seed, spec, options)
        for panel, runs in panels.items()
        for name, by_seed in settings(panel, runs).items()
    ]
    verdict, reason = judge(_parts(gathered, options))
    lines = {
        measure: {curve.name: _line(curve, at) for curve in gathered}
        for measure, at in MEASURES.items()
    }
    rows = [
        {"curve": name, "measure": measure, "width": width}
        | {"value": one.value, "low": one.low, "high": one.high, "seeds": one.seeds}
        for measure, by_curve in lines.items()
        for name, line in by_curve.items()
        for width, one in zip(options.widths, line, strict=True)
    ]
    return Result(_figure(spec.title, lines, options), rows, verdict, reason)


def _curve(name: str, runs: Mapping[int, Run], spec: Spec, options: Options) -> Curve:
    """Outcomes and lengths [widths, prompts] of each seed."""
    outcomes: dict[int, Floats] = {}
    lengths: dict[int, Floats] = {}
    for seed, run in runs.items():
        made = spec.made(run)
        decoded = [made["widths"][str(width)] for width in options.widths]
        scores = np.array([[one["score"] for one in row] for row in decoded])
        outcomes[seed] = by_score(scores, np.array(made["answers"]), 0.0)
        lengths[seed] = np.array([[one["tokens"] for one in row] for row in decoded], float)
    return curve_of(name, outcomes, made["prompts"], lengths)


def _line(curve: Curve, name: str) -> list[Interval]:
    """An interval at each width."""
    return intervals(lambda m: mean_of_known(getattr(m[0], name), axis=-2), [curve])


def _parts(gathered: Sequence[Curve], options: Options) -> list[Part]:
    """Up to the best width the win rate rises, beyond it falls, and responses become longer."""
    first, best, last = 0, options.widths.index(options.best), -1

    def gap(name: str, more: int, less: int) -> Interval:
        def change(means: Sequence[Means]) -> Floats:
            values = np.stack([mean_of_known(getattr(m, name), axis=-2) for m in means])
            mean: Floats = (values[..., more] - values[..., less]).mean(axis=0)
            return mean

        return interval(change, gathered)

    fewest, most = options.widths[0], options.widths[-1]
    rate = f"win rate of {len(gathered[0].paths[0].prompts)} prompts"
    return [
        Part(f"{rate}, {options.best} beams - {fewest}", gap("reward", best, first)),
        Part(f"{rate}, {options.best} beams - {most}", gap("reward", best, last)),
        Part(f"tokens, {most} beams - {options.best}", gap("length", last, best)),
    ]


def _figure(
    title: str, lines: Mapping[str, Mapping[str, Sequence[Interval]]], options: Options
) -> Figure:
    with rc_context(RC):
        size = (PANEL[0] * len(lines), PANEL[1] + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        row = figure.subplots(1, len(lines), squeeze=False)[0]
        for axes, curves in zip(row, lines.values(), strict=True):
            for place, (name, line) in enumerate(curves.items()):
                _band(axes, options.widths, line, place, name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(options.widths, options.widths)
            axes.minorticks_off()
            axes.set_xlabel("beams")
        row[0].axhline(0.5, color="#888888", linewidth=0.8)
        row[0].set_ylabel("win rate over preferred answers")
        row[1].set_ylabel("tokens of a response")
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.suptitle(title)
    return figure


def _band(
    axes: Axes, widths: Sequence[int], line: Sequence[Interval], place: int, name: str
) -> None:
    colour, style = COLOURS[place % len(COLOURS)], LINES[place % len(LINES)]
    low, high = [one.low for one in line], [one.high for one in line]
    axes.fill_between(widths, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(widths, [one.value for one in line], style, marker="o", color=colour, label=name)
