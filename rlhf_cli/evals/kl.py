"""KL divergence of the policy to the SFT policy, in nats per response.

With y drawn from pi and u_t = log pi(y_t) - log pi_ref(y_t), three unbiased estimates of the KL of
whole sequences, sum_y pi(y) log(pi(y) / pi_ref(y)):

    k1     sum_t u_t                            may be negative on a response
    k3     sum_t exp(-u_t) - 1 + u_t            never negative; heavy-tailed when pi has left pi_ref
    exact  sum_t KL(pi(.|s_t) || pi_ref(.|s_t)) over the states s_t that y visits; the least noisy

exp(u) - 1 - u, which some trainers log, is none of them: for samples of pi its mean is the
chi-square divergence minus the KL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KL(NamedTuple):
    """Two estimates of the same quantity, per response, in nats and float64."""

    k1: Tensor
    k3: Tensor


def kl_estimates(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> KL:
    """Sum k1 and k3 over the tokens of each response; their means over responses estimate the KL.

    logp, logp_ref, mask: [..., T], the mask 1 on response tokens. Returns two tensors [...].
    """
    real = mask.bool()
    u = (logp.double() - logp_ref.double()).masked_fill(~real, 0.0)
    return KL(k1=u.sum(-1), k3=((-u).expm1() + u).sum(-1))


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of the next-token distributions: [..., V] twice -> [...], in nats, at least in float32.

    Positions are not masked here: multiply by the response mask before summing over tokens.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1)
    log_q = ref_logits.to(wide).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
