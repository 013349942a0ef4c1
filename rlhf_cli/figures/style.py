"""How every figure looks: one colour and marker per algorithm, text readable at column width."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable under the common colour deficiencies; its yellow is left
# out because it fades on paper.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#888888"

PANEL = (3.4, 2.6)
"""Width and height of one panel in inches: the column of a two-column page."""
DPI = 200
"""Of a png."""

RC: dict[str, Any] = {
    "font.size": 8,
    "figure.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.markersize": 4.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,  # TrueType: text in the pdf stays text
    "text.parse_math": False,  # names are what runs say; a dollar sign in one opens no formula
}
"""Matplotlib settings; use them with `matplotlib.rc_context`."""


@dataclass(frozen=True)
class Look:
    """Colour and marker of one algorithm."""

    colour: str
    marker: str


_KNOWN = {
    "p3o_v2": Look(BLUE, "o"),
    "p3o_v1": Look(SKY, "s"),
    "ppo": Look(ORANGE, "^"),
    "dpo_online": Look(GREEN, "D"),
    # Those that stand beside each other in a figure have colours of their own.
    "dpo": Look(GREEN, "d"),
    "ipo": Look(PURPLE, "v"),
    "copg": Look(BLUE, "P"),
    "copg_offline": Look(BLUE, "P"),
    "vpg": Look(AMBER, "v"),
    "ppg": Look(PURPLE, "s"),
    "rloo": Look(PURPLE, "*"),
    "reinforce": Look(AMBER, "v"),
    "vanilla_pg": Look(SKY, "<"),
    "raft": Look(BLUE, "X"),
    "ppo_max": Look(BLACK, "h"),
    "apa": Look(BLUE, "p"),
    "awr": Look(PURPLE, "P"),
    "xpo": Look(BLUE, "h"),
    "rto": Look(BLUE, "X"),
    "etpo": Look(BLUE, "d"),
    "aihf": Look(BLUE, "v"),
    "best_of_n": Look(BLACK, "P"),
}
_SPARE = [Look(c, m) for m in "vPX*" for c in (PURPLE, AMBER, BLACK)]

_PALETTE = [
    Look(c, m)
    for c, m in zip((BLACK, BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY), "o^DPsvXh", strict=True)
]

LINES = ("-", "--", ":", "-.")
"""Line styles that tell the curves of one algorithm apart."""


def look(algo: str) -> Look:
    """The look of an algorithm, the same in every figure; an unknown name keeps one by its hash."""
    spare = int.from_bytes(hashlib.sha256(algo.encode()).digest()[:4], "big") % len(_SPARE)
    return _KNOWN.get(algo, _SPARE[spare])


def styles(curves: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Colour, marker and line of curves by name, told their algorithms.

    Colour and marker go by algorithm, shade and line by the place among its curves; if there is one
    algorithm alone, colours and markers tell its curves apart too.
    """
    found: dict[str, dict[str, str]] = {}
    places: Counter[str] = Counter()
    alone = len(set(curves.values())) == 1 and len(curves) > len(_SHADES)
    for name, algo in curves.items():
        place = places[algo]
        places[algo] += 1
        mark = _PALETTE[place % len(_PALETTE)] if alone else look(algo)
        found[name] = {
            "color": mark.colour if alone else shade(mark.colour, place),
            "marker": mark.marker,
            "line": LINES[place % len(LINES)],
        }
    return found


def pictures(figure: Figure) -> dict[str, bytes]:
    """The figure as png and as pdf; the same figure gives the same bytes."""
    png, pdf = io.BytesIO(), io.BytesIO()
    # Not figure.savefig, which draws twice for each file: once for the layout alone.
    with rc_context(RC):
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(png)
        figure.set_layout_engine("none")  # it is laid out by now
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
    return {"png": png.getvalue(), "pdf": pdf.getvalue()}


_SHADES = (("black", 0.0), ("black", 0.45), ("white", 0.45))


def shade(colour: str, place: int) -> str:
    """The colour of the curve at `place` among those of one algorithm: itself, darker, lighter."""
    end, share = _SHADES[place % len(_SHADES)]
    mixed = [(1 - share) * c + share * e for c, e in zip(to_rgb(colour), to_rgb(end), strict=True)]
    return str(to_hex((mixed[0], mixed[1], mixed[2])))
