"""ETPO, Entropy-Regularised Token-level Policy Optimisation (Wen, Liao, Deng, Wang, Zhang, Wen 2024,
arXiv:2402.06700): a soft Q function of tokens, for tasks of one or several turns.

    V(s_t) = sum_a pi(a|s_t) [ Qbar(s_t, a) - beta log(pi(a|s_t) / pi_ref(a|s_t)) ]        [P,G,T]

over the whole vocabulary and under the policy and the slow copy Qbar that the rollout was drawn with.
With r_t what is paid after token t, t' the next token the policy chose, and V = 0 after the last one:

    y_t = r_t + d_t [ (1 - lambda) V(s_t') + lambda (y_t' - beta u_t') ]
    d_t = 1 inside a turn, gamma where the other side spoke in between
    u_t = log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)

    policy   sum_a pi(a|s_t) [ beta log(pi(a|s_t) / pi_ref(a|s_t)) - sg Q(s_t, a) ]        [P,G,T]
    value    c_v Huber( Q(s_t, a_t) - y_t )                                                [P,G,T]
             Qbar <- tau Qbar + (1 - tau) Q after every step

The policy's term is beta KL(pi || pi_ref exp(Q / beta) / Z) plus a constant. Discounting between turns
alone makes the backup over tokens agree with the one over whole turns. Where nothing is paid by the
token, the score stands on the last one: one turn.

lambda = 0 is the paper's backup. A reward then moves back by one token per rollout, so a run of a few
dozen rollouts never hears of it at the beginning of a response. What lambda puts in the place of V has
the same mean on the policy's own samples, with more variance and none of Q's errors.

We had the authors' code and the abstract, not the body of the paper. The code differs from this page,
and should not be followed, in three places: its policy term weighs all tokens alike, so that Q drops
out of its gradient, and leaves pi_ref out; its target charges the KL of the wrong step; its Huber loss
stays quadratic for errors below -delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.later import torch
from rlhf_cli.core.returns import paid
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, Optim, Positive, Share, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class ETPO(Defaults):
    """Soft Q-learning of tokens, and a policy that follows Q over the whole vocabulary."""

    beta: Positive
    """KL coefficient, reward units per nat."""
    gamma: Share
    """Discount from one turn to the next."""
    lam: Share
    """lambda: how far a target looks along what was really drawn; 0 looks one token ahead."""
    huber: Positive
    """delta: errors of Q beyond it count linearly, reward units."""
    value_coef: Positive
    """c_v."""
    tau: Share
    """How much of the slow copy of Q stays at each step."""
    q_lr: Positive
    """Peak learning rate of Q; schedule and warm-up are the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD, Model.Q})
    couples_group: ClassVar[bool] = False
    shift_invariant: ClassVar[bool] = False
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt."""
        return Sampling(policy=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G,T] the targets of Q."""
        assert rollout.value_old is not None and rollout.logp_ref is not None
        spent = self.beta * (rollout.logp_old - rollout.logp_ref)
        returns = backed_up(
            paid(rollout), rollout.value_old, spent, rollout.mask, self.gamma, self.lam
        )
        return Targets(returns=returns), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G,T], "value": [P,G,T]}."""
        assert now.logps is not None and now.logps_ref is not None and now.q is not None
        assert now.q_taken is not None and targets.returns is not None
        cost = self.beta * (now.logps - now.logps_ref) - now.q.detach()
        value = torch.nn.functional.huber_loss(
            now.q_taken, targets.returns, reduction="none", delta=self.huber
        )
        return {"policy": (now.logps.exp() * cost).sum(-1), "value": self.value_coef * value}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"value_error": [P,G,T]}."""
        assert now.q_taken is not None and targets.returns is not None
        return {"value_error": (now.q_taken - targets.returns) ** 2}


def backed_up(
    reward: Tensor, value: Tensor, spent: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """y of the module's equation: [..., T], 0 where mask is 0. The mask may have gaps, which end turns.

    spent: [..., T] beta u.
    """
    targets = torch.zeros_like(value)
    ahead = followed = torch.zeros_like(value[..., 0])
    for t in reversed(range(value.shape[-1])):
        here = mask[..., t]
        discount = gamma + (1 - gamma) * followed
        targets[..., t] = (reward[..., t] + discount * ahead) * here
        seen = (1 - lam) * value[..., t] + lam * (targets[..., t] - spent[..., t])
        ahead, followed = torch.where(here > 0, seen, ahead), here
    return targets
