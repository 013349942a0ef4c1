"""A reward of the prompt alone, to be added to another one: what invariance to such shifts is tried with.

Rewards that differ by a function of the prompt prefer the same responses (Wu et al. 2023,
arXiv:2310.00212, definition of equivalent rewards), so a learner that sees preferences only should not
notice it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import NormalDist


def shift(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A standard normal number for each prompt, the same wherever it is asked for."""
    return [_normal(prompt) for prompt in prompts]


def _normal(prompt: str) -> float:
    """The normal quantile of the prompt's hash, read as a number between 0 and 1."""
    digest = hashlib.sha256(prompt.encode()).digest()
    # 52 bits and a half step off 0: no hash is at an end, where the quantile is infinite.
    share = (int.from_bytes(digest[:8], "big") >> 12) + 0.5
    return NormalDist().inv_cdf(share / 2**52)
