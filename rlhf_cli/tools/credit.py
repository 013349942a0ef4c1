"""The policy as a value function: "From r to Q*" (Rafailov et al. 2024, arXiv:2404.12358).

In the token-level problem whose reward r is paid at the end and whose policy is held to pi_ref by beta,

    Q*(s,a)  = beta log pi_ref(a|s) + V*(s')        + r instead of V*(s') where a ends the response
    V*(s)    = beta log sum_a exp(Q*(s,a) / beta)
    pi*(a|s) = exp((Q*(s,a) - V*(s)) / beta)

so that the log-ratio of the optimal policy says how much better off a token leaves the one who chose it,

    beta log[pi*(a|s) / pi_ref(a|s)] = V*(s') - V*(s)          and over a response    sum = r - V*(s_0)

Every pair of policies is optimal for some reward, so this reads credit off any two checkpoints. What it
cannot tell is which reward: adding a potential, paid on the way and taken back later, changes no policy.

The same equation turns search by likelihood into search guided by V*: of two unfinished responses, the
one with the larger sum of beta log pi* has the larger beta log pi_ref + V*, up to the constant V*(s_0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_credit(logp: Tensor, logp_ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    """[...,T] beta (log pi - log pi_ref) of each token, 0 where mask [...,T] is 0, in float64."""
    ratio = logp.double() - logp_ref.double()
    return beta * ratio.masked_fill(~mask.bool(), 0.0)


def product(log_probs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """[...,V] log of prod_i pi_i^weight_i, normalised; each log_probs[i] is [...,V].

    Weights 1, beta, -beta on a base, a tuned proxy and its reference give proxy-tuned decoding,
    pi ~ pi_base (pi_proxy / pi_proxy_ref)^beta: the credit a small policy gives, spent by a large one.
    """
    pairs = zip(weights, log_probs, strict=True)
    return torch.stack([weight * each for weight, each in pairs]).sum(0).log_softmax(-1)
