"""Vanilla policy gradient, token by token with a learned baseline: what is left of PPO in Ahmadian et al.
2024 (arXiv:2402.14740) when lambda is 1 and both the ratio and the clip are gone.

    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t last] r(x, y)
    G_t = sum_{s>=t} r_s                            the reward to go, which GAE with lambda = 1 comes to
    A_t = G_t - V_old(s_t)

    L = mean_t -A_t log pi(y_t) + c_v 1/2 mean_t (V_t - G_t)^2

V_old is the critic as it stood at the rollout; as a function of the state before the token it shifts no
expected gradient, right or wrong. That the learned V stays as the baseline is what lambda = 1 implies;
summaries of the paper do not spell it out. There is neither whitening nor a clip of the critic. Nothing
corrects for an older policy, but the paper takes two steps per rollout.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.actor_critic import value_error, value_loss
from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.returns import to_go
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.core.shaping import token_reward
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class VanillaPG(Defaults):
    """Reward to go against a learned value, nothing clipped."""

    beta: NonNegative
    """KL coefficient, reward units per nat, charged token by token."""
    value_coef: Positive
    """c_v."""
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
        """Reward to go and what it exceeds the critic's word by, [P,G,T]."""
        assert rollout.value_old is not None
        returns = to_go(token_reward(rollout, self.beta), rollout.mask)
        advantage = (returns - rollout.value_old) * rollout.mask
        return Targets(advantage=advantage, returns=returns), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert targets.advantage is not None
        value = value_loss(now, rollout, targets, eps=None)
        return {"policy": -targets.advantage * now.logp, "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"value_error": [P,G,T]}: the critic's squared error."""
        return {"value_error": value_error(now, targets)}
