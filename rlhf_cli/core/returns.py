"""From per-token rewards and values to advantages."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    with V = 0 past the last response token. reward, value, mask: [..., T], the mask a prefix of ones.
    Returns [..., T], 0 where mask is 0.
    """
    value = value * mask
    advantage = torch.zeros_like(value)
    ahead = next_value = torch.zeros_like(value[..., 0])
    for t in reversed(range(value.shape[-1])):
        delta = reward[..., t] + gamma * next_value - value[..., t]
        ahead = (delta + gamma * lam * ahead) * mask[..., t]
        advantage[..., t] = ahead
        next_value = value[..., t]
    return advantage


def at_last_token(score: Tensor, mask: Tensor) -> Tensor:
    """[P,G] -> [P,G,T]: the score on the last response token, 0 elsewhere (and on empty responses)."""
    past = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    return (mask - past) * score.unsqueeze(-1)


def to_go(reward: Tensor, mask: Tensor) -> Tensor:
    """[..., T] -> [..., T]: the reward of each token and of all that follow; 0 where mask is 0."""
    return (reward * mask).flip(-1).cumsum(-1).flip(-1) * mask
