"""Mean and variance of a stream of numbers that arrives in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.algorithm import State
from rlhf_cli.core.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def absorb(state: State, name: str, x: Tensor) -> State:
    """The state with the numbers x taken into the moments called `name` (Chan et al. 1979).

    Kept as `name/count`, `name/mean` and `name/m2` (sum of squared deviations), float64 scalars.
    """
    x = x.double().flatten()
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    count, mean, m2 = (state.get(f"{name}/{part}", zero) for part in ("count", "mean", "m2"))
    total = count + x.numel()
    gap = x.mean() - mean
    return {
        **state,
        f"{name}/count": total,
        f"{name}/mean": mean + gap * x.numel() / total,
        f"{name}/m2": m2 + ((x - x.mean()) ** 2).sum() + gap**2 * count * x.numel() / total,
    }


def moments(state: State, name: str) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation (divided by n-1) of all numbers absorbed so far."""
    count, m2 = state[f"{name}/count"], state[f"{name}/m2"]
    return state[f"{name}/mean"], (m2 / (count - 1).clamp_min(1)).sqrt()
