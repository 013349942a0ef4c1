"""P3O, Pairwise Proximal Policy Optimization (Wu, Zhu, Zhang, Wen, Ramchandran, Jiao 2023, arXiv:2310.00212).

Two responses y1, y2 to one prompt are compared with each other instead of with a value function:

    h = log pi(y|x) - log pi_ref(y|x)        rho = pi(y|x) / pi_old(y|x)        sg: no gradient
    q = sg[ r1 - r2 - beta (h1 - h2) ]                                          the pair's advantage

    V1, separate clipping
        L = 1/2 [ max(-q c(rho2) rho1, -q c(rho2) clip(rho1, 1-eps, 1+eps))
                + max( q c(rho1) rho2,  q c(rho1) clip(rho2, 1-eps, 1+eps)) ]   c = sg[clip(., 1/c, c)]

    V2, joint clipping, with D = h1 - h2 and w = sg[ q clip(rho1 rho2, 1/c, c) ]
        L = 1/2 max(-w D, -w clip(D, D_old - eps, D_old + eps))

Unclipped, both are the off-policy pairwise policy gradient of J = E[r] - beta KL(pi || pi_ref)
(Theorem 1 of the paper); at rho = 1 both equal it whatever eps is. Because r enters only through q, a
reward shifted by a function of the prompt alone gives the same gradient, sample by sample.

What the paper leaves open and how it is settled here: q is formed under the current policy at every
update (`kl_at: update`, as in the authors' code, and exact off-policy) or once at the rollout (as the
paper's algorithm box reads). The clamp c comes from the authors' code; the paper may not have it. More
than two responses are compared in all pairs, averaged; the paper uses two.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.kl import LOG_RATIO_LIMIT
from rlhf_cli.core.later import torch
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class P3O(Defaults):
    """P3O-V1 (`clipping: separate`) and P3O-V2 (`clipping: joint`)."""

    clipping: Literal["separate", "joint"]
    """Whether each response of a pair is clipped by itself (V1) or the pair as one (V2)."""
    beta: NonNegative
    """KL coefficient, reward units per nat of sequence KL."""
    clip: Positive
    """eps: of the ratio (V1), or of the log-ratio difference in nats (V2)."""
    clamp: Annotated[float, Field(gt=1)]
    """c: the stopped ratios are kept within [1/c, c]."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt."""
    kl_at: Literal["update", "rollout"]
    """Under which policy h in q is taken: the current one, or the one that sampled."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        clipped, unclipped = self._branches(now, rollout)
        return {"policy": 0.5 * torch.maximum(unclipped, clipped).sum(0).mean(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"clip_fraction": [P]}: share of sides (V1) or pairs (V2) whose gradient is cut."""
        clipped, unclipped = self._branches(now, rollout)
        return {"clip_fraction": (clipped > unclipped).float().mean((0, -1))}

    def _branches(self, now: Forward, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        """Clipped and unclipped objective of each side: [sides, P, C], two sides for V1, one for V2."""
        assert rollout.logp_ref is not None and rollout.score is not None
        mask = rollout.mask
        h = sequence_sum(now.logp - rollout.logp_ref, mask)
        h_old = sequence_sum(rollout.logp_old - rollout.logp_ref, mask)
        regularised = rollout.score - self.beta * (h.detach() if self.kl_at == "update" else h_old)
        r1, r2 = pairs(regularised)
        q = r1 - r2
        log_rho = (h - h_old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        if self.clipping == "joint":
            h1, h2 = pairs(h)
            o1, o2 = pairs(h_old)
            s1, s2 = pairs(log_rho.detach())
            w = q * (s1 + s2).exp().clamp(1 / self.clamp, self.clamp)
            d, d_old = h1 - h2, o1 - o2
            clipped = torch.minimum(torch.maximum(d, d_old - self.clip), d_old + self.clip)
            return (-w * clipped).unsqueeze(0), (-w * d).unsqueeze(0)
        rho1, rho2 = pairs(log_rho.exp())
        w1 = q * rho2.detach().clamp(1 / self.clamp, self.clamp)
        w2 = -q * rho1.detach().clamp(1 / self.clamp, self.clamp)
        low, high = 1 - self.clip, 1 + self.clip
        return (
            torch.stack([-w1 * rho1.clamp(low, high), -w2 * rho2.clamp(low, high)]),
            torch.stack([-w1 * rho1, -w2 * rho2]),
        )
