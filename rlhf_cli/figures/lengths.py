"""Lengths of texts in tokens: one panel for prompts, one for the answers to them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_cli.evals.lengths import Lengths
from rlhf_cli.figures.style import BLACK, BLUE, GREEN, LINES, ORANGE, PANEL, RC
from rlhf_cli.store.files import atomic_write, disk

Panels: TypeAlias = Sequence[Sequence[Lengths]]

COLOURS = {"prompts": BLACK, "chosen": BLUE, "rejected": ORANGE, "demonstrations": GREEN}
BINS = 40
SHOWN = 0.99
"""Share of the texts that is in sight where a few are far longer; the limit always is."""


def write(title: str, tokenizer: str, panels: Panels, out: Path) -> Path:
    """Draw to a png file, or into a folder; the same lengths give the same bytes. Raises UserError."""
    file = out if out.suffix == ".png" else out / f"lengths-{title}.png"
    with disk(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with rc_context(RC):
        draw(title, tokenizer, panels).savefig(buffer, format="png", dpi=200)
    atomic_write(file, buffer.getvalue())
    return file


def draw(title: str, tokenizer: str, panels: Panels) -> Figure:
    """The picture: kinds that share a panel share its bins."""
    with rc_context(RC):
        size = (PANEL[0] * len(panels), PANEL[1] + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, kinds in zip(row, panels, strict=True):
            _panel(axes, kinds)
        figure.suptitle(f"{title}, tokens of {tokenizer}", parse_math=False)
        figure.legend(loc="outside lower center", ncols=len(panels))
    return figure


def _panel(axes: Axes, kinds: Sequence[Lengths]) -> None:
    limit = kinds[0].limit
    right = max(1.1 * limit, *(each.quantile(SHOWN) for each in kinds))
    # Lengths are whole numbers: bins of unequal numbers of them would draw a comb.
    step = math.ceil(right / BINS)
    bins = [0.5 + step * place for place in range(math.ceil(right / step) + 1)]
    for place, each in enumerate(kinds):
        style: dict[str, Any] = {"color": COLOURS[each.kind], "linestyle": LINES[place]}
        weights = [100 / len(each.tokens)] * len(each.tokens)
        axes.hist(each.tokens, bins, weights=weights, histtype="step", **style)
        # Drawn nowhere: the legend's entry, a line where a histogram would give it a box.
        axes.plot([], [], label=f"{each.kind}: {100 * each.over:.1f} % over {limit}", **style)
    axes.axvline(limit, color="#777777", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel=f"share of texts per {step} tokens (%)", xlim=(0, bins[-1]))
