"""All unordered pairs of the G responses to one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """[P,G] -> two [P,C], C = G(G-1)/2: the first and the second of each pair (i < j, row-major).

    Raises ValueError for G < 2: a pairwise loss on single responses would silently be zero.
    """
    if x.shape[1] < 2:
        raise ValueError(f"a pairwise loss needs at least 2 responses per prompt, got {x.shape[1]}")
    first, second = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    return x[:, first], x[:, second]
