"""PPO for RLHF, token level (Ziegler et al. 2019, arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031),
with the tricks of PPO-max as options (Zheng et al. 2023, "Secrets of RLHF I", arXiv:2307.04964).

    r_t  = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t last] r(x, y)        per token [P,G,T]
    A    = GAE(r, V_old; gamma, lambda)        R = A + V_old        then A is whitened over all tokens
    rho_t = pi(y_t) / pi_old(y_t)

    L = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1-eps, 1+eps))
      + c_v 1/2 mean_t max((V_t - R_t)^2, (clip(V_t, V_old - eps_v, V_old + eps_v) - R_t)^2)
      - c_e mean_t H_t,  or + c_e mean_t |H_t - H*|
      - c_ptx mean_t log pi(d_t)                        over the tokens of demonstrations d

The numbers at the fields are those of the tricks in figure 5 of Zheng et al. Four more are elsewhere:
the critic starts as the reward model (8), the policy as the SFT model (9), `optim.grad_clip` is 12, and
10 is GAE. An option that is null, 0, false or `none` is off; all options off is the formula above.

The score stands on the last response token (Ziegler et al.; Zheng et al.). Huang et al.'s place, one
step later, needs the value V' of the state after that token, which a rollout does not hold; at gamma 1
it would put lambda r + (1 - lambda) V' in the place of r. Whitening is over the whole rollout, so it
depends on neither the minibatch (where Zheng et al. take it) nor the number of processes. PPO is not
blind to a prompt-only shift of the reward: the critic must first learn it.

Left open and settled here. Scores are scaled first and clipped then; the running moments take in a
rollout before it is scaled by them (the authors' code). H* is compared token by token, for a mean over
the minibatch would be no mean of terms: the two agree while all H_t lie on one side of H*, as they must
for the paper's 30 nats, more than the log of any vocabulary. The infinite buffer of trick 2 is read as
responses of the reference itself, weighted by pi / pi_ref; the adaptive coefficient then steers
KL(pi_ref || pi), the one that such responses measure. The paper gives neither the length of the
critic's pre-training nor the weight of ptx.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.actor_critic import aims, value_error, value_loss, value_moved
from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.kl import adapted
from rlhf_cli.core.later import torch
from rlhf_cli.core.masked import whiten
from rlhf_cli.core.moments import absorb, moments
from rlhf_cli.core.returns import at_last_token
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.surrogate import surrogate, surrogate_cut
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Share, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class PPO(Defaults):
    """Clipped surrogate with a learned critic and a token-level KL penalty in the reward."""

    beta: NonNegative
    """KL coefficient, reward units per nat, charged token by token (trick 1); the first one if it adapts."""
    kl_target: Positive | None
    """Sequence KL in nats towards which beta adapts after each rollout (Ziegler et al., section 2.2)."""
    kl_horizon: Positive
    """Responses in which beta changes by at most 20%; without effect unless it adapts."""
    reward_scale: Literal["none", "scale", "normalize"]
    """Scores divided by their running standard deviation (trick 4), after subtracting their running
    mean (trick 5), or neither."""
    reward_clip: Positive | None
    """Largest magnitude of a score, once scaled (trick 5)."""
    whiten_reward: bool
    """Whether token rewards get variance 1 over the rollout's tokens; their mean stays (Ziegler et al.)."""
    gamma: Share
    """Discount per token."""
    lam: Share
    """lambda of GAE (trick 10)."""
    whiten_advantage: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens (trick 6)."""
    advantage_clip: Positive | None
    """Largest magnitude of an advantage, once whitened (trick 6)."""
    clip: Positive | None
    """eps of the probability ratio (trick 11)."""
    ratio_to: Literal["old", "ref"]
    """Who draws the responses and is the ratio's denominator: the policy before the update, or the
    reference, as in a buffer that is never renewed (trick 2)."""
    clip_value: Positive | None
    """eps_v: how far the critic may move from V_old before its loss is clipped, reward units (trick 7)."""
    value_coef: NonNegative
    """c_v."""
    entropy_coef: NonNegative
    """c_e, per nat of a token's entropy (trick 3)."""
    entropy_target: Positive | None
    """H* in nats; null rewards entropy without end. Without effect at c_e = 0."""
    ptx_coef: NonNegative
    """c_ptx, per nat of a demonstration's token; 0 reads no demonstrations (PPO-ptx)."""
    critic_rollouts: Annotated[int, Field(ge=0)]
    """Rollouts at the beginning that teach the critic alone (trick 8)."""
    critic_lr: Positive
    """Peak learning rate of the critic; schedule and warm-up are the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD, Model.CRITIC})
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt, or of the reference."""
        return Sampling(policy=1) if self.ratio_to == "old" else Sampling(ref=1)

    def side(self) -> Sampling:
        """One demonstration per prompt if its likelihood is part of the loss."""
        return Sampling(demo=1) if self.ptx_coef > 0 else Sampling()

    def wants_entropy(self) -> bool:
        """If it is part of the loss."""
        return self.entropy_coef > 0

    def critic_only(self) -> int:
        """`critic_rollouts`."""
        return self.critic_rollouts

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Advantages and returns, [P,G,T]; remembers the moments of the scores and the adapted beta."""
        assert rollout.logp_ref is not None and rollout.score is not None
        mask = rollout.mask
        score, state = self._scaled(rollout.score, state)
        beta, state = self._coefficient(rollout, state)
        penalty = -beta * (rollout.logp_old - rollout.logp_ref) * mask
        reward = penalty + at_last_token(score, mask)
        if self.whiten_reward:
            reward = whiten(reward, mask, shift_mean=False)
        targets = aims(reward, rollout, self.gamma, self.lam, self.whiten_advantage)
        if self.advantage_clip is not None:
            assert targets.advantage is not None
            kept = targets.advantage.clamp(-self.advantage_clip, self.advantage_clip)
            targets = replace(targets, advantage=kept)
        return targets, state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy", "value", and "entropy_loss" if it counts}, all [P,G,T]."""
        assert targets.advantage is not None
        policy = surrogate(self._log_ratio(now, rollout), targets.advantage, self.clip)
        value = value_loss(now, rollout, targets, self.clip_value)
        terms = {"policy": policy, "value": self.value_coef * value}
        if self.wants_entropy():
            assert now.entropy is not None
            target = self.entropy_target
            miss = -now.entropy if target is None else (now.entropy - target).abs()
            terms["entropy_loss"] = self.entropy_coef * miss
        return terms

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """Clip fractions of policy and critic, and the critic's squared error, all [P,G,T]."""
        assert targets.advantage is not None
        log_ratio = self._log_ratio(now, rollout)
        return {
            "clip_fraction": surrogate_cut(log_ratio, targets.advantage, self.clip),
            "value_clip_fraction": value_moved(now, rollout, self.clip_value),
            "value_error": value_error(now, targets),
        }

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """{"demo": [P,1,T]}, negative log-likelihood of the demonstrations."""
        return {"demo": -self.ptx_coef * now.logp} if self.ptx_coef > 0 else {}

    def _log_ratio(self, now: Forward, rollout: Rollout) -> Tensor:
        drawer = rollout.logp_old if self.ratio_to == "old" else rollout.logp_ref
        assert drawer is not None
        return now.logp - drawer

    def _scaled(self, score: Tensor, state: State) -> tuple[Tensor, State]:
        """The scores as they are paid out, and the state with them in its moments."""
        if self.reward_scale != "none":
            state = absorb(state, "score", score)
            mean, std = moments(state, "score")
            shift = mean if self.reward_scale == "normalize" else 0.0
            # Equal scores have no scale of their own.
            score = ((score - shift) / torch.where(std > 1e-8, std, 1.0)).to(score.dtype)
        if self.reward_clip is not None:
            score = score.clamp(-self.reward_clip, self.reward_clip)
        return score, state

    def _coefficient(self, rollout: Rollout, state: State) -> tuple[Tensor | float, State]:
        """beta of this rollout, and the state with the next one's."""
        if self.kl_target is None:
            return self.beta, state
        assert rollout.logp_ref is not None
        first = torch.tensor(self.beta, dtype=torch.float64, device=rollout.mask.device)
        beta = state.get("beta", first)
        kl = sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)
        kl = kl if self.ratio_to == "old" else -kl
        after = adapted(beta, kl.mean(), self.kl_target, self.kl_horizon, kl.numel())
        return beta, {**state, "beta": after}
