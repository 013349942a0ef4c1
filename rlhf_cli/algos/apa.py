"""APA, Advantage-Induced Policy Alignment (Zhu, Sharma, Vieira Frujeri, Dong, Zhu, Jordan, Jiao 2023,
arXiv:2306.02231), and AWR, the baseline it is compared with (Peng, Kumar, Zhang, Levine 2019,
arXiv:1910.00177). Per token, A = GAE(r(x,y) on the last token, V_old; gamma, lambda), no KL in it:

    APA   L = mean_t (log pi(y_t) - log pi_ref(y_t) - A_t / beta)^2
    AWR   L = -mean_t exp(A_t / beta) log pi(y_t)
    both  + c_v 1/2 mean_t (V_t - R_t)^2          R = A + V_old, before A is whitened

beta is the papers' lambda. In every state the best policy for the advantages of pi_old, at a price of
beta per nat, is pi_ref exp(A/beta)/Z; APA regresses onto it with Z = 1. Where E_ref[exp(A/beta)] is not
1, no policy has zero loss and the minimiser leans towards the law that drew the responses. AWR fits that
law times exp(A/beta): the reference enters only as the policy it starts from, and nothing holds it there.

What the papers leave open: `subtract_log_z` moves A by -beta log mean_t exp(A_t/beta) over the rollout,
one constant for all states, after which the batch has Z = 1 (under AWR: the weights average 1). Without
whitening beta is in reward units; whitened advantages have unit variance, and 1/beta is in nats per
standard deviation. The authors' code takes GAE and whitening over padded columns and per minibatch;
here only response tokens count, over the whole rollout. It also divides the reward by its running
standard deviation; the scores here have standard deviation 1 under the SFT policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, TypeAlias

from pydantic.dataclasses import dataclass

from rlhf_cli.core.actor_critic import aims, value_error, value_loss
from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.kl import ratio
from rlhf_cli.core.later import torch
from rlhf_cli.core.returns import paid
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Share, Update


@dataclass(frozen=True, config=STRICT)
class APA(Defaults):
    """Squared regression of token log-ratios to the reference onto advantages."""

    beta: Positive
    """lambda of the paper: reward units (or standard deviations of A) per nat, token by token."""
    gamma: Share
    """Discount per token."""
    lam: Share
    """lambda of GAE."""
    normalize_adv: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens."""
    subtract_log_z: bool
    """Whether they are then moved so that exp(A / beta) averages 1 over those tokens."""
    value_coef: NonNegative
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
        """Advantages and returns, [P,G,T]."""
        return advantages(self, rollout), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert rollout.logp_ref is not None and targets.advantage is not None
        left = now.logp - rollout.logp_ref - targets.advantage / self.beta
        value = value_loss(now, rollout, targets, eps=None)
        return {"policy": left**2, "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"value_error": [P,G,T]}."""
        return {"value_error": value_error(now, targets)}


@dataclass(frozen=True, config=STRICT)
class AWR(Defaults):
    """Log-likelihood of the sampled tokens, weighted by the exponential of their advantages."""

    beta: Positive
    """lambda of the paper: reward units (or standard deviations of A) per unit of the exponent."""
    gamma: Share
    """Discount per token."""
    lam: Share
    """lambda of GAE."""
    normalize_adv: bool
    """Whether advantages get mean 0 and variance 1 over the rollout's tokens."""
    subtract_log_z: bool
    """Whether they are then moved so that the weights average 1 over those tokens."""
    value_coef: NonNegative
    """c_v."""
    critic_lr: Positive
    """Peak learning rate of the critic; schedule and warm-up are the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REWARD, Model.CRITIC})
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt."""
        return Sampling(policy=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Advantages and returns, [P,G,T]."""
        return advantages(self, rollout), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert targets.advantage is not None
        policy = -ratio(targets.advantage / self.beta) * now.logp
        value = value_loss(now, rollout, targets, eps=None)
        return {"policy": policy, "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"value_error": [P,G,T]}."""
        return {"value_error": value_error(now, targets)}


Weighted: TypeAlias = APA | AWR


def advantages(algorithm: Weighted, rollout: Rollout) -> Targets:
    """Advantages and returns of response tokens, [P,G,T], 0 elsewhere."""
    mask, beta = rollout.mask, algorithm.beta
    targets = aims(paid(rollout), rollout, algorithm.gamma, algorithm.lam, algorithm.normalize_adv)
    if algorithm.subtract_log_z:
        assert targets.advantage is not None
        exponent = (targets.advantage / beta).masked_fill(mask == 0, -torch.inf)
        log_z = exponent.flatten().logsumexp(0) - mask.sum().log()
        targets = replace(targets, advantage=(targets.advantage - beta * log_z) * mask)
    return targets
