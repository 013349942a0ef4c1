"""The G responses to one prompt, compared with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def leave_one_out(x: Tensor) -> Tensor:
    """[P,G] -> [P,G]: the mean of the *other* responses to the same prompt.

    Raises ValueError for G < 2: a response alone has no others, and would be its own baseline.
    """
    size = x.shape[1]
    if size < 2:
        raise ValueError(f"a leave-one-out mean needs at least 2 responses per prompt, got {size}")
    return (x.sum(1, keepdim=True) - x) / (size - 1)


def group_std(x: Tensor, unbiased: bool) -> Tensor:
    """[P,G] -> [P,1]: standard deviation over the responses to a prompt, divided by G-1 or by G."""
    return x.std(1, keepdim=True, unbiased=unbiased)
