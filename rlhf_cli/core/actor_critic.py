"""What the algorithms with a critic share. The clipped critic is Ziegler et al.'s (2019, arXiv:1909.08593).

Everything is [P,G,T]; a limit of None is no limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.algorithm import Targets
from rlhf_cli.core.later import torch
from rlhf_cli.core.masked import whiten
from rlhf_cli.core.returns import gae
from rlhf_cli.core.rollout import Forward, Rollout

if TYPE_CHECKING:
    from torch import Tensor


def aims(reward: Tensor, rollout: Rollout, gamma: float, lam: float, whitened: bool) -> Targets:
    """GAE advantages of the rewards and what the critic should have said, A + V.

    The returns are formed before whitening, and the moments are those of the whole rollout.
    """
    assert rollout.value_old is not None
    mask = rollout.mask
    advantage = gae(reward, rollout.value_old, mask, gamma, lam)
    returns = (advantage + rollout.value_old) * mask
    return Targets(whiten(advantage, mask) if whitened else advantage, returns)


def value_error(now: Forward, targets: Targets) -> Tensor:
    """(V - R)^2."""
    assert now.value is not None and targets.returns is not None
    return (now.value - targets.returns) ** 2


def value_loss(now: Forward, rollout: Rollout, targets: Targets, eps: float | None) -> Tensor:
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)."""
    free = value_error(now, targets)
    if eps is None:
        return 0.5 * free
    assert now.value is not None and rollout.value_old is not None and targets.returns is not None
    near = rollout.value_old + (now.value - rollout.value_old).clamp(-eps, eps)
    return 0.5 * torch.maximum(free, (near - targets.returns) ** 2)


def value_moved(now: Forward, rollout: Rollout, eps: float | None) -> Tensor:
    """1 where the critic is further than eps from V_old, else 0."""
    assert now.value is not None and rollout.value_old is not None
    if eps is None:
        return torch.zeros_like(now.value)
    return ((now.value - rollout.value_old).abs() > eps).float()
