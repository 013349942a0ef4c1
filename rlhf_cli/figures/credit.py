"""Credit per token as a heatmap: a picture, and a page of HTML that needs nothing beside itself.

Blue tokens are ones the policy prefers to its reference, orange ones those it avoids. All answers of a
heatmap share one scale, so that colours may be compared across them.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from rlhf_cli.figures.style import BLUE, ORANGE, PANEL, RC
from rlhf_cli.printable import on_one_line, visible
from rlhf_cli.store.files import atomic_write, disk

DEEPEST = 0.75
"""Share of pure colour at the end of the scale: black text stays readable on it."""
COLUMNS = 46
"""Characters per line of the picture's panels."""
RELATIVE = "relative to V(s_0)"
"""What a sum of credit is: at the optimum it is the response's reward minus the value of its prompt."""


@dataclass(frozen=True)
class Answer:
    """One response, cut into tokens."""

    name: str
    tokens: tuple[str, ...]
    credit: tuple[float, ...]
    """One number per token, in the unit of the heatmap's beta."""

    @property
    def total(self) -> float:
        """Reward of the whole minus the value of the state it starts in."""
        return math.fsum(self.credit)


@dataclass(frozen=True)
class Heatmap:
    """Answers to one prompt, as two policies see them."""

    facts: Mapping[str, str]
    """Which policies, and what else to say about the numbers."""
    prompt: str
    beta: float
    """Reward units per nat."""
    answers: tuple[Answer, ...]

    @property
    def limit(self) -> float:
        """Where the colours end: the largest credit of either sign; 1 if there is none."""
        return max((abs(c) for a in self.answers for c in a.credit), default=0.0) or 1.0

    @property
    def digits(self) -> int:
        """Decimals that show two figures of the largest credit."""
        return max(2, 1 - math.floor(math.log10(self.limit)))

    def number(self, value: float) -> str:
        """Credit with its sign."""
        return f"{value:+.{self.digits}f}"

    def sums(self) -> Iterator[str]:
        """A line per answer, and what remains when V(s_0) drops out."""
        for answer in self.answers:
            yield f"sum of {answer.name}: {self.number(answer.total)}, {RELATIVE}"
        if len(self.answers) > 1:
            first, second = self.answers[:2]
            gap = self.number(first.total - second.total)
            yield f"{first.name} - {second.name}: {gap}, whatever V(s_0) is"

    def key(self) -> str:
        """The same for the same heatmap."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


def write(heatmap: Heatmap, out: Path) -> dict[str, Path]:
    """Write `out`.png and `out`.html; the same heatmap gives the same bytes. Raises UserError."""
    files = {kind: Path(f"{out}.{kind}") for kind in ("png", "html")}
    with disk(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(files["png"], _png(heatmap))
    atomic_write(files["html"], page(heatmap))
    return files


def tint(value: float, limit: float) -> str:
    """From white at 0 to blue at `limit` and orange at -`limit`."""
    share = DEEPEST * min(1.0, abs(value) / limit)
    mixed = [1 - share + share * part for part in to_rgb(BLUE if value > 0 else ORANGE)]
    return str(to_hex((mixed[0], mixed[1], mixed[2])))


def width(text: str) -> int:
    """Columns of a text in a monospaced font."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def lines(widths: Sequence[float], columns: float) -> list[list[int]]:
    """Indices of cells line by line, each line as full as it can be."""
    rows: list[list[int]] = [[]]
    used = 0.0
    for index, each in enumerate(widths):
        if rows[-1] and used + each > columns:
            rows.append([])
            used = 0.0
        rows[-1].append(index)
        used += each
    return rows


def draw(heatmap: Heatmap) -> Figure:
    """The picture: a panel per answer, every token a cell with its number beneath."""
    with rc_context(RC):
        figure = Figure(figsize=size(heatmap), layout="constrained")
        fill(figure, heatmap)
    return figure


def size(heatmap: Heatmap) -> tuple[float, float]:
    """Width and height of the picture in inches."""
    tallest = max(len(each.rows) for each in _layouts(heatmap))
    return PANEL[0] * len(heatmap.answers) + 0.4, 0.36 * tallest + 1.0


def fill(figure: FigureBase, heatmap: Heatmap) -> None:
    """Put the picture into a figure, or into a part of one, under `RC`."""
    layouts = _layouts(heatmap)
    tallest = max(len(each.rows) for each in layouts)
    row = figure.subplots(1, len(layouts), squeeze=False)[0]
    for axes, answer, layout in zip(row, heatmap.answers, layouts, strict=True):
        axes.set(xlim=(0, COLUMNS), ylim=(tallest, 0))
        axes.axis("off")
        total = heatmap.number(answer.total)
        axes.set_title(f"{answer.name}: sum {total}, {RELATIVE}", fontsize=7, loc="left")
        for place, members in enumerate(layout.rows):
            _line(axes, heatmap, answer, layout, place, members)
    steps = [(2 * i / 255 - 1) * heatmap.limit for i in range(256)]
    colours = ListedColormap([tint(step, heatmap.limit) for step in steps])
    scale = Normalize(-heatmap.limit, heatmap.limit)
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=list(row), location="bottom", aspect=60, shrink=0.6
    )
    bar.set_label("credit per token: beta log(pi / pi_ref)", fontsize=7)
    bar.outline.set_visible(False)
    said = "\n".join(f"{name}: {visible(value)}" for name, value in heatmap.facts.items())
    figure.suptitle(said, fontsize=6.5, parse_math=False)


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of an answer stand."""

    texts: Sequence[str]
    widths: Sequence[float]
    rows: Sequence[Sequence[int]]


def _layouts(heatmap: Heatmap) -> list[_Layout]:
    # A number is set smaller than its token; it needs this share of its characters.
    least = 0.65 * len(heatmap.number(-heatmap.limit)) + 0.5
    layouts = []
    for answer in heatmap.answers:
        texts = [_clipped(on_one_line(token)) for token in answer.tokens]
        widths = [max(width(text), least) for text in texts]
        layouts.append(_Layout(texts, widths, lines(widths, COLUMNS)))
    return layouts


def _line(
    axes: Axes,
    heatmap: Heatmap,
    answer: Answer,
    layout: _Layout,
    row: int,
    members: Sequence[int],
) -> None:
    """One line of tokens."""
    x = 0.0
    for index in members:
        value, broad = answer.credit[index], layout.widths[index]
        colour = tint(value, heatmap.limit)
        axes.add_patch(Rectangle((x + 0.05, row + 0.08), broad - 0.1, 0.84, color=colour, lw=0))
        # Text of a corpus: a dollar sign in it opens no formula.
        plain: dict[str, Any] = {"ha": "center", "va": "center", "parse_math": False}
        middle = x + broad / 2
        axes.text(middle, row + 0.34, layout.texts[index], family="monospace", fontsize=7, **plain)
        axes.text(middle, row + 0.74, heatmap.number(value), fontsize=4.5, color="#333333", **plain)
        x += broad


def _clipped(text: str) -> str:
    return text if width(text) <= COLUMNS else text[: COLUMNS // 2 - 1] + "\u2026"


def _png(heatmap: Heatmap) -> bytes:
    buffer = io.BytesIO()
    with rc_context(RC), warnings.catch_warnings():
        # A character the font lacks is drawn as a box; the page has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        draw(heatmap).savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>credit: $title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { margin: 2em auto; max-width: 72em; }
dt { float: left; clear: left; min-width: 7em; color: #666; }
dd { margin: 0 0 0 7em; }
.prompt { white-space: pre-wrap; color: #555; border-left: 3px solid #ddd; padding-left: 1em; }
.answers { display: flex; flex-wrap: wrap; gap: 2em; }
.answers section { flex: 1 1 24em; }
.heat { white-space: pre-wrap; line-height: 2; }
.heat span { color: #000; padding: .2em 0; border-radius: 2px; }
.scale { width: 16em; height: .8em; background: linear-gradient(to right, $low, #ffffff, $high); }
</style>
</head>
<body>
<h1>Credit per token</h1>
<dl>$facts</dl>
<p>Colour: &beta; log(&pi; / &pi;<sub>ref</sub>) of each token, from $least to $most; a token under the
pointer shows its number. By <a href="https://arxiv.org/abs/2404.12358">Rafailov et al. 2024</a>, the
optimal policy's is V(s') &minus; V(s), and its sum over a response the reward minus V(s<sub>0</sub>).</p>
<div class="scale"></div>
<h2>Prompt</h2>
<div class="prompt">$prompt</div>
<div class="answers">
$answers
</div>
<ul>
$sums
</ul>
</body>
</html>
""")


def page(heatmap: Heatmap) -> str:
    """The same as HTML, everything in it escaped."""

    def section(answer: Answer) -> str:
        spans = "".join(
            f'<span style="background:{tint(value, heatmap.limit)}"'
            f' title="{heatmap.number(value)}">{_escaped(token)}</span>'
            for token, value in zip(answer.tokens, answer.credit, strict=True)
        )
        total = f"sum {heatmap.number(answer.total)}, {RELATIVE}"
        return (
            f'<section><h2>{html.escape(answer.name)}</h2><div class="heat">{spans}</div>'
            f"<p>{total}</p></section>"
        )

    pairs = (
        f"<dt>{html.escape(n)}</dt><dd>{html.escape(visible(v))}</dd>"
        for n, v in heatmap.facts.items()
    )
    return PAGE.substitute(
        title=html.escape(visible(" / ".join(heatmap.facts.values()))),
        low=tint(-heatmap.limit, heatmap.limit),
        high=tint(heatmap.limit, heatmap.limit),
        facts="".join(pairs),
        least=heatmap.number(-heatmap.limit),
        most=heatmap.number(heatmap.limit),
        prompt=html.escape(visible(heatmap.prompt.strip("\n"))),
        answers="\n".join(map(section, heatmap.answers)),
        sums="\n".join(f"<li>{html.escape(line)}</li>" for line in heatmap.sums()),
    )


def _escaped(token: str) -> str:
    """A token for a page; a line break is both seen and made."""
    return html.escape(visible(token)).replace("\n", "\u23ce\n")
