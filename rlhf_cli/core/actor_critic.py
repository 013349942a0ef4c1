"""What every clipped actor with a critic shares (Schulman et al. 2017, arXiv:1707.06347; the clipped
critic is Ziegler et al.'s, arXiv:1909.08593). Everything is [P,G,T]; a limit of None is no limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Targets
from rlhf_cli.core.masked import whiten
from rlhf_cli.core.returns import gae
from rlhf_cli.core.rollout import Rollout


def aims(reward: Tensor, rollout: Rollout, gamma: float, lam: float, whitened: bool) -> Targets:
    """GAE advantages of the rewards and what the critic should have said, A + V.

    The returns are formed before whitening, and the moments are those of the whole rollout.
    """
    assert rollout.value_old is not None
    mask = rollout.mask
    advantage = gae(reward, rollout.value_old, mask, gamma, lam)
    returns = (advantage + rollout.value_old) * mask
    return Targets(whiten(advantage, mask) if whitened else advantage, returns)


def surrogate(log_ratio: Tensor, advantage: Tensor, eps: float | None) -> Tensor:
    """max(-A rho, -A clip(rho, 1-eps, 1+eps))."""
    ratio = log_ratio.exp()
    if eps is None:
        return -advantage * ratio
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - eps, 1 + eps))


def surrogate_cut(log_ratio: Tensor, advantage: Tensor, eps: float | None) -> Tensor:
    """1 where the clipping takes the surrogate's gradient away, else 0."""
    if eps is None:
        return torch.zeros_like(log_ratio)
    ratio = log_ratio.exp()
    return torch.where(advantage > 0, ratio > 1 + eps, ratio < 1 - eps).float()


def value_loss(value: Tensor, value_old: Tensor, returns: Tensor, eps: float | None) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)."""
    free = (value - returns) ** 2
    if eps is None:
        return 0.5 * free
    near = value_old + (value - value_old).clamp(-eps, eps)
    return 0.5 * torch.maximum(free, (near - returns) ** 2)


def value_moved(value: Tensor, value_old: Tensor, eps: float | None) -> Tensor:
    """1 where the critic is further than eps from V_old, else 0."""
    if eps is None:
        return torch.zeros_like(value)
    return ((value - value_old).abs() > eps).float()
