"""How long texts are in tokens, against the longest that a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 8
"""Of a histogram up to the limit."""


@dataclass(frozen=True)
class Lengths:
    """Of texts of one kind; there is at least one."""

    kind: str
    tokens: tuple[int, ...]
    """Of each text."""
    limit: int
    """Of a longer one something is cut."""
    total: int
    """Texts there are, of which these may be a sample."""

    @property
    def mean(self) -> float:
        """Tokens per text."""
        return float(np.mean(self.tokens))

    @property
    def over(self) -> float:
        """Share of the texts that are longer than the limit."""
        return float(np.mean(np.asarray(self.tokens) > self.limit))

    def quantile(self, share: float) -> int:
        """The smallest length that at least this share of the texts do not exceed."""
        return int(np.quantile(self.tokens, share, method="inverted_cdf"))

    def shares(self, ends: Sequence[int]) -> list[float]:
        """Of the texts up to each of the ends and above the one before, and of those above the last."""
        counts = np.bincount(np.searchsorted(ends, self.tokens), minlength=len(ends) + 1)
        return [float(count) / len(self.tokens) for count in counts]


def ends(limit: int) -> list[int]:
    """Where the bins of a histogram end that reaches to the limit."""
    return sorted({-(-limit * place // BINS) for place in range(1, BINS + 1)})
