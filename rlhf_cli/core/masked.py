"""The one mean, and the two masked moments built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_cli.core.algorithm import Terms

if TYPE_CHECKING:
    from torch import Tensor


def denominators(mask: Tensor) -> dict[int, float]:
    """How many tokens, responses and prompts a whole minibatch has, keyed by the rank of a term.

    mask: [P,G,T] of the minibatch over *all* processes and micro-batches.
    Returns {3: tokens, 2: P*G, 1: P}.
    """
    return {3: float(mask.sum()), 2: float(mask.shape[0] * mask.shape[1]), 1: float(mask.shape[0])}


def averages(terms: Terms, mask: Tensor, counts: Mapping[int, float]) -> dict[str, Tensor]:
    """Each term summed over what is here and divided by what there is everywhere.

    Adding the results of all micro-batches of all processes gives the mean over the minibatch, whatever
    the split. mask: [P,G,T] of this part; counts: `denominators` of the whole minibatch.
    """
    return {
        name: (term.mul(mask) if term.dim() == 3 else term).sum() / max(counts[term.dim()], 1.0)
        for name, term in terms.items()
    }


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1."""
    return (x * mask).sum() / mask.sum().clamp_min(1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8) with masked population moments; 0 where mask is 0.

    `shift_mean=False` adds the mean back (used for rewards, whose sign matters).
    Huang et al. 2024 (arXiv:2403.17031), detail "reward and advantage whitening".
    """
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * (var + 1e-8).rsqrt()
    return (white if shift_mean else white + mean) * mask
