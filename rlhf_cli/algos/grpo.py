"""GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 3), and three others that change parts of it:
Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), DAPO (Yu et al. 2025, arXiv:2503.14476) and
GSPO (Zheng et al. 2025, arXiv:2507.18071). G responses to a prompt are compared with their mean:

    A_i   = r_i - mean_j r_j,  divided by std_j r_j + std_eps unless `scale: none`
    rho   = pi(y_t) / pi_old(y_t)                      token      each token by itself
            exp(mean_t(log pi(y_t) - log pi_old(y_t))) sequence   GSPO: one for the whole response
    L_t   = -min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i) + beta k3_t
    k3_t  = exp(-u) - 1 + u,   u = log pi(y_t) - log pi_ref(y_t)

    aggregate  response   mean_i (1/|y_i|) sum_t L_t          GRPO; GSPO, where all tokens agree
               token      mean over all tokens                DAPO: a long response weighs more
               constant   mean_i (1/max_tokens) sum_t L_t     Dr. GRPO: blind to length

               std     clip       aggregate  beyond
    GRPO       yes     0.2 0.2    response
    Dr. GRPO   no      0.2 0.2    constant   = leave-one-out times (G-1)/(G max_tokens) at rho = 1
    DAPO       yes     0.2 0.28   token      drop_equal, overlong
    GSPO       yes     3e-4 4e-4  response   sequence ratio

`drop_equal` leaves out prompts whose responses all score alike: DAPO draws others in their place, here
the rest is weighted up so that the mean is over what is kept of the rollout (of its tokens, if those are
averaged). The penalty k3 stays for all; DAPO has none. `overlong` is the share of max_tokens, at its end,
over which the reward falls linearly by 1 (DAPO's soft overlong punishment); scores are compared without it.

The KL stands in the loss, where its gradient on own samples is that of KL(pi_ref || pi), not of
KL(pi || pi_ref), and so the optimum is not pi_ref exp(r/beta)/Z. The papers leave open which standard
deviation is meant (`sample` divides by G-1, as TRL does; `population` by G) and std_eps. DAPO's formula
averages tokens per prompt and its code over the batch, as here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.groups import group_std
from rlhf_cli.core.kl import k3
from rlhf_cli.core.later import torch
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.surrogate import surrogate, surrogate_cut
from rlhf_cli.recipes import STRICT, Count, NonNegative, Optim, Positive, Share, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class GRPO(Defaults):
    """Clipped policy gradient with the group's mean as baseline and the KL in the loss."""

    ratio_level: Literal["token", "sequence"]
    """Whether tokens have ratios of their own, or all the geometric mean over their response."""
    clip_low: Positive
    """How far below 1 a ratio counts."""
    clip_high: Positive
    """How far above 1."""
    scale: Literal["none", "sample", "population"]
    """What advantages are divided by: 1, or a standard deviation over the group."""
    std_eps: Positive
    """Added to that standard deviation, reward units."""
    aggregate: Literal["response", "token", "constant"]
    """What the mean is over."""
    max_tokens: Count
    """Most tokens of a response."""
    beta: NonNegative
    """KL coefficient, per nat of a token, in units of the advantage."""
    drop_equal: bool
    """Whether prompts whose responses all score alike are left out of the policy's mean."""
    overlong: Share
    """Share of `max_tokens` over which a long response's reward falls by 1; 0 for no penalty."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G] advantages, weighted for the prompts left out."""
        assert rollout.score is not None
        length = rollout.mask.sum(-1)
        reward = rollout.score
        if self.overlong > 0:
            room = self.overlong * self.max_tokens
            reward = reward - ((length - (self.max_tokens - room)) / room).clamp(0, 1)
        advantage = reward - reward.mean(1, keepdim=True)
        if self.scale != "none":
            advantage = advantage / (group_std(reward, self.scale == "sample") + self.std_eps)
        if self.drop_equal:
            kept = (rollout.score.amax(1) > rollout.score.amin(1)).to(length)
            size = length.sum(1) if self.aggregate == "token" else torch.ones_like(kept)
            weight = kept * size.sum() / (size * kept).sum().clamp_min(1)
            advantage = advantage * weight.unsqueeze(1)
        return Targets(advantage=advantage), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T] or [P,G], "penalty": likewise}."""
        assert targets.advantage is not None and rollout.logp_ref is not None
        advantage = targets.advantage.unsqueeze(-1)
        moved = self._moved(now, rollout)
        policy = surrogate(moved, advantage, self.clip_low, self.clip_high)
        penalty = self.beta * k3(now.logp, rollout.logp_ref)
        return {
            "policy": self._aggregated(policy, rollout.mask),
            "penalty": self._aggregated(penalty, rollout.mask),
        }

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"clip_fraction": [P,G,T]}."""
        assert targets.advantage is not None
        advantage = targets.advantage.unsqueeze(-1)
        moved = self._moved(now, rollout)
        return {"clip_fraction": surrogate_cut(moved, advantage, self.clip_low, self.clip_high)}

    def _moved(self, now: Forward, rollout: Rollout) -> Tensor:
        """[P,G,T] log rho, the same on all tokens of a response if it is the sequence's."""
        log_ratio = now.logp - rollout.logp_old
        if self.ratio_level == "sequence":
            length = rollout.mask.sum(-1).clamp_min(1)
            mean = sequence_sum(log_ratio, rollout.mask) / length
            log_ratio = mean.unsqueeze(-1).expand_as(log_ratio)
        return log_ratio

    def _aggregated(self, per_token: Tensor, mask: Tensor) -> Tensor:
        """[P,G,T], or [P,G] if responses are averaged."""
        if self.aggregate == "token":
            return per_token
        if self.aggregate == "constant":
            return sequence_sum(per_token, mask) / self.max_tokens
        return sequence_sum(per_token, mask) / mask.sum(-1).clamp_min(1)
