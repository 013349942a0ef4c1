"""How every figure looks: one colour and marker per algorithm, text readable at column width."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable under the common colour deficiencies; its yellow is left
# out because it fades on paper.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK = "#56B4E9", "#E69F00", "#000000"

PANEL = (3.4, 2.6)
"""Width and height of one panel in inches: the column of a two-column page."""

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
}
_SPARE = [Look(c, m) for m in "vPX*" for c in (PURPLE, AMBER, BLACK)]

LINES = ("-", "--", ":", "-.")
"""Line styles that tell the curves of one algorithm apart."""


def look(algo: str) -> Look:
    """The look of an algorithm, the same in every figure; an unknown name keeps one by its hash."""
    spare = int.from_bytes(hashlib.sha256(algo.encode()).digest()[:4], "big") % len(_SPARE)
    return _KNOWN.get(algo, _SPARE[spare])


def pictures(figure: Figure) -> dict[str, bytes]:
    """The figure as png and as pdf; the same figure gives the same bytes."""
    drawn = {}
    for kind, undated in (("png", {}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        with rc_context(RC):
            figure.savefig(buffer, format=kind, dpi=200, metadata=undated)
        drawn[kind] = buffer.getvalue()
    return drawn


_SHADES = (("black", 0.0), ("black", 0.45), ("white", 0.45))


def shade(colour: str, place: int) -> str:
    """The colour of the curve at `place` among those of one algorithm: itself, darker, lighter."""
    end, share = _SHADES[place % len(_SHADES)]
    mixed = [(1 - share) * c + share * e for c, e in zip(to_rgb(colour), to_rgb(end), strict=True)]
    return str(to_hex((mixed[0], mixed[1], mixed[2])))
