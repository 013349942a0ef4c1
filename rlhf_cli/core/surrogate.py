"""The clipped surrogate of a probability ratio (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

log_ratio, advantage: [P,G,T] or [P,G], of tokens or of responses; they may broadcast. eps None is no
limit; `above`, where given, is the limit above 1 and eps the one below (Yu et al. 2025, arXiv:2503.14476).
Log-ratios are cut at +-20 nats, beyond which a float32 ratio would be of no use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.kl import ratio
from rlhf_cli.core.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def surrogate(
    log_ratio: Tensor, advantage: Tensor, eps: float | None, above: float | None = None
) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + above)), rho = exp(log_ratio)."""
    rho = ratio(log_ratio)
    if eps is None:
        return -advantage * rho
    near = rho.clamp(1 - eps, 1 + (eps if above is None else above))
    return torch.maximum(-advantage * rho, -advantage * near)


def surrogate_cut(
    log_ratio: Tensor, advantage: Tensor, eps: float | None, above: float | None = None
) -> Tensor:
    """1 where the clipping takes the surrogate's gradient away, else 0."""
    if eps is None:
        return torch.zeros_like(log_ratio)
    rho = ratio(log_ratio)
    up, down = rho > 1 + (eps if above is None else above), rho < 1 - eps
    return ((up & (advantage > 0)) | (down & (advantage < 0))).to(log_ratio)
