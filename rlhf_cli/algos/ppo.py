"""PPO for RLHF, token level (Ziegler et al. 2019, arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031).

    r_t  = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t last] r(x, y)
    A    = GAE(r, V_old; gamma, lambda)        R = A + V_old        then A is whitened over all tokens
    rho_t = pi(y_t) / pi_old(y_t)

    L = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1-eps, 1+eps))
      + c_v 1/2 mean_t max((V_t - R_t)^2, (clip(V_t, V_old - eps_v, V_old + eps_v) - R_t)^2)

The score stands on the last response token (Ziegler et al.; Zheng et al. 2023, arXiv:2307.04964). The
returns are formed before whitening. Whitening is over the whole rollout, so it depends on neither the
minibatch nor the number of processes. PPO is not blind to a prompt-only shift of the reward: the critic
must first learn it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.masked import whiten
from rlhf_cli.core.returns import at_last_token, gae
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Share, Update


@dataclass(frozen=True, config=STRICT)
class PPO(Defaults):
    """Clipped surrogate with a learned critic and a token-level KL penalty in the reward."""

    beta: NonNegative
    """KL coefficient, reward units per nat, charged token by token."""
    gamma: Share
    """Discount per token."""
    lam: Share
    """lambda of GAE."""
    clip: Positive
    """eps of the probability ratio."""
    clip_value: Positive
    """eps_v: how far the critic may move from V_old before its loss is clipped, reward units."""
    value_coef: NonNegative
    """c_v."""
    whiten_advantage: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens."""
    critic_lr: Positive
    """Peak learning rate of the critic; schedule and warm-up are the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD, Model.CRITIC})
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt."""
        return Sampling(policy=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Advantages and returns, [P,G,T]."""
        assert rollout.logp_ref is not None and rollout.score is not None
        assert rollout.value_old is not None
        mask = rollout.mask
        penalty = -self.beta * (rollout.logp_old - rollout.logp_ref) * mask
        reward = penalty + at_last_token(rollout.score, mask)
        advantage = gae(reward, rollout.value_old, mask, self.gamma, self.lam)
        targets = Targets(advantage=advantage, returns=(advantage + rollout.value_old) * mask)
        if self.whiten_advantage:
            targets = replace(targets, advantage=whiten(advantage, mask))
        return targets, state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert targets.advantage is not None and targets.returns is not None
        assert now.value is not None and rollout.value_old is not None
        ratio = (now.logp - rollout.logp_old).exp()
        policy = torch.maximum(
            -targets.advantage * ratio,
            -targets.advantage * ratio.clamp(1 - self.clip, 1 + self.clip),
        )
        near = rollout.value_old + (now.value - rollout.value_old).clamp(
            -self.clip_value, self.clip_value
        )
        value = 0.5 * torch.maximum(
            (now.value - targets.returns) ** 2, (near - targets.returns) ** 2
        )
        return {"policy": policy, "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """Clip fractions of policy and critic, and the critic's squared error, all [P,G,T]."""
        assert targets.advantage is not None and targets.returns is not None
        assert now.value is not None and rollout.value_old is not None
        ratio = (now.logp - rollout.logp_old).exp()
        cut = torch.where(targets.advantage > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        moved = (now.value - rollout.value_old).abs() > self.clip_value
        return {
            "clip_fraction": cut.float(),
            "value_clip_fraction": moved.float(),
            "value_error": (now.value - targets.returns) ** 2,
        }
