"""RTO, Reinforced Token Optimization (Zhong et al. 2024, arXiv:2404.18922): PPO whose reward is dense.

    r_t = beta1 clip(log pi_guide(y_t) - log pi_ref(y_t), -c, c)                per token [P,G,T]
        - beta2 (log pi_old(y_t) - log pi_ref(y_t)) + 1[t last] beta3 r(x, y)

and then `algos/ppo.py` with its critic, GAE and clipped surrogate, at their plainest. pi_guide is a policy
trained from pi_ref by DPO: beta log(pi_guide / pi_ref) summed over a response is r(x, y) less the value of
the prompt (Rafailov et al. 2024, arXiv:2404.12358), so the first term spreads a reward over the tokens.
Unclipped, the optimum is

    pi  ~  pi_ref (pi_guide / pi_ref)^(beta1 / beta2) exp(beta3 r / beta2)

At beta1 = 0 and beta3 = 1 this is PPO, to the last bit.

The authors' code clips beta1 times the log-ratio to +-0.05 at beta1 = 0.05; here the log-ratio itself is
clipped, at 1 nat, so that beta1 can be changed alone. Its option for another reference of the guide is
without effect there and left out: pi_ref is the SFT policy in all three places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.actor_critic import aims, value_error, value_loss, value_moved
from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.returns import at_last_token
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.core.surrogate import surrogate, surrogate_cut
from rlhf_cli.recipes import STRICT, Guide, NonNegative, Optim, Positive, Share, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class RTO(Defaults):
    """PPO on the token rewards of a guide policy, a KL penalty and a score at the end."""

    guide_coef: NonNegative
    """beta1, reward units per nat that the guide prefers a token over the reference."""
    guide_clip: Positive | None
    """c: largest magnitude of that log-ratio, nats; null leaves it unclipped."""
    beta: NonNegative
    """beta2, KL coefficient, reward units per nat, charged token by token."""
    score_coef: NonNegative
    """beta3, what a unit of the score is worth."""
    reward_clip: Positive | None
    """Largest magnitude of a score, reward units; null leaves it unclipped."""
    gamma: Share
    """Discount per token."""
    lam: Share
    """lambda of GAE."""
    whiten_advantage: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens."""
    clip: Positive
    """eps of the probability ratio."""
    clip_value: Positive
    """eps_v: how far the critic may move from V_old before its loss is clipped, reward units."""
    value_coef: NonNegative
    """c_v."""
    critic_lr: Positive
    """Peak learning rate of the critic; schedule and warm-up are the policy's."""
    guide: Guide
    """The run that trains the guide."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset(
        {Model.REF, Model.REWARD, Model.CRITIC, Model.GUIDE}
    )
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt."""
        return Sampling(policy=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Advantages and returns, [P,G,T]."""
        assert rollout.logp_ref is not None and rollout.score is not None
        mask, score = rollout.mask, rollout.score
        if self.reward_clip is not None:
            score = score.clamp(-self.reward_clip, self.reward_clip)
        penalty = -self.beta * (rollout.logp_old - rollout.logp_ref) * mask
        reward = penalty + at_last_token(self.score_coef * score, mask) + self._dense(rollout)
        return aims(reward, rollout, self.gamma, self.lam, self.whiten_advantage), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert targets.advantage is not None
        policy = surrogate(now.logp - rollout.logp_old, targets.advantage, self.clip)
        value = value_loss(now, rollout, targets, self.clip_value)
        return {"policy": policy, "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """As in PPO, and what the guide pays per token, all [P,G,T]."""
        assert targets.advantage is not None
        log_ratio = now.logp - rollout.logp_old
        return {
            "clip_fraction": surrogate_cut(log_ratio, targets.advantage, self.clip),
            "value_clip_fraction": value_moved(now, rollout, self.clip_value),
            "value_error": value_error(now, targets),
            "guide_reward": self._dense(rollout),
        }

    def _dense(self, rollout: Rollout) -> Tensor:
        """[P,G,T] what the guide pays for each token."""
        assert rollout.logp_guide is not None and rollout.logp_ref is not None
        prefers = (rollout.logp_guide - rollout.logp_ref) * rollout.mask
        if self.guide_clip is not None:
            prefers = prefers.clamp(-self.guide_clip, self.guide_clip)
        return self.guide_coef * prefers
