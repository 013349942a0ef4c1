"""From per-token rewards and values to advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.later import torch
from rlhf_cli.core.rollout import Rollout

if TYPE_CHECKING:
    from torch import Tensor


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    with V = 0 past the last response token. reward, value, mask: [..., T]; t + 1 is the next place at
    which mask is 1, whatever somebody else said between the two. Returns [..., T], 0 where mask is 0.
    """
    advantage = torch.zeros_like(value)
    ahead = next_value = torch.zeros_like(value[..., 0])
    for t in reversed(range(value.shape[-1])):
        here = mask[..., t] > 0
        delta = reward[..., t] + gamma * next_value - value[..., t]
        ahead = torch.where(here, delta + gamma * lam * ahead, ahead)
        next_value = torch.where(here, value[..., t], next_value)
        advantage[..., t] = ahead
    return advantage * mask


def at_last_token(score: Tensor, mask: Tensor) -> Tensor:
    """[P,G] -> [P,G,T]: the score on the last response token, 0 elsewhere (and on empty responses)."""
    ahead = mask.flip(-1).cumsum(-1).flip(-1)
    return (mask * (ahead == 1)) * score.unsqueeze(-1)


def paid(rollout: Rollout) -> Tensor:
    """[P,G,T]: what a task paid for each token, or the score on the last token where there is no task."""
    if rollout.reward is not None:
        return rollout.reward
    assert rollout.score is not None
    return at_last_token(rollout.score, rollout.mask)


def to_go(reward: Tensor, mask: Tensor) -> Tensor:
    """[..., T] -> [..., T]: the reward of each token and of all that follow; 0 where mask is 0."""
    return (reward * mask).flip(-1).cumsum(-1).flip(-1) * mask
