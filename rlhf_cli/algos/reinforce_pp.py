"""REINFORCE++ (Hu 2025, arXiv:2501.03262): PPO without a critic, the batch itself being the baseline.

    A_t   = r(x, y) - beta sum_{s>=t} (log pi_old(y_s) - log pi_ref(y_s))       reward to go, gamma = 1
    N_t   = (A_t - mean A) / std A                                              over all tokens of the rollout
    rho_t = pi(y_t) / pi_old(y_t)

    L = mean_t max(-N_t rho_t, -N_t clip(rho_t, 1-eps, 1+eps))

This is PPO with lambda = 1 and V = 0. Whitening is over the whole rollout, as the name of the method's
"global" normalisation says, so it depends on neither minibatch nor process; it divides by the population's
deviation with 1e-8 under the root. A mean over the batch removes one constant, not one per prompt: a reward
shifted prompt by prompt changes gradients. On the policy's own samples the expected gradient is that of
E[r] - beta KL divided by the deviation, so near the optimum, where the deviation falls, steps grow.

Of what later versions of the paper add, a group mean for several responses per prompt and a k2 penalty in
the loss, nothing is here; nor are its clipping and scaling of scores, which this project's reward models
do not need: their scores have mean 0 and deviation 1 under the SFT policy.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.masked import whiten
from rlhf_cli.core.returns import to_go
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.core.shaping import token_reward
from rlhf_cli.core.surrogate import surrogate, surrogate_cut
from rlhf_cli.recipes import STRICT, Count, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class ReinforcePP(Defaults):
    """Whitened reward to go with PPO's clip."""

    beta: NonNegative
    """KL coefficient, reward units per nat, charged token by token."""
    whiten_advantage: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens."""
    clip: Positive
    """eps of the probability ratio of a token."""
    responses: Count
    """Responses per prompt, each judged by itself."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Reward to go, whitened over the rollout, [P,G,T]."""
        advantage = to_go(token_reward(rollout, self.beta), rollout.mask)
        if self.whiten_advantage:
            advantage = whiten(advantage, rollout.mask)
        return Targets(advantage=advantage), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T]}."""
        assert targets.advantage is not None
        moved = now.logp - rollout.logp_old
        return {"policy": surrogate(moved, targets.advantage, self.clip)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"clip_fraction": [P,G,T]}."""
        assert targets.advantage is not None
        moved = now.logp - rollout.logp_old
        return {"clip_fraction": surrogate_cut(moved, targets.advantage, self.clip)}
