"""KL terms of sampled tokens, and the controller that steers their coefficient."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LOG_RATIO_LIMIT = 20.0
"""Nats beyond which a log-ratio is cut before exp, so that no inf is formed."""


def ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio that is cut at +-20 nats (no gradient beyond)."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """exp(-u) - 1 + u, u = log pi - log pi_ref: at least 0, and KL(pi || pi_ref) on average under pi.

    Schulman 2020, "Approximating KL divergence". Same shape as its arguments, nats.
    """
    return ratio(logp_ref - logp) - 1 + (logp - logp_ref)


def adapted(beta: Tensor, kl: Tensor, target: float, horizon: float, episodes: int) -> Tensor:
    """The KL coefficient after a rollout (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2)        beta <- beta (1 + e episodes / horizon)

    kl: mean sequence KL of the rollout, nats; target likewise; horizon and episodes in responses.
    """
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return beta * (1 + error * episodes / horizon)
