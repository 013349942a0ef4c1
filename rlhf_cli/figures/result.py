"""What a function that draws a figure of a paper hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from matplotlib.figure import Figure

from rlhf_cli.evals.grid import Grid

Verdict: TypeAlias = Literal["holds", "does not hold", "open"]


@dataclass(frozen=True)
class Result:
    """A picture, the numbers in it, and what they say about the claim."""

    figure: Figure
    rows: Sequence[Mapping[str, object]]
    """Exactly what is plotted."""
    verdict: Verdict
    """On the claim, at this scale; open if the data cannot tell."""
    reason: str
    """The numbers, with their intervals, behind the verdict."""
    table: Grid | None = None
    """The same to be read, where the figure is a table too: written as tex, and into the caption."""
