"""AIHF, Alignment with Integrated Human Feedback (Li, Zeng, Liao, Li, Kang, Garcia, Hong 2024,
arXiv:2406.06874): reward model and policy learn together, from demonstrations and preferences.

    min_r  w L1 + v L2      L1 = -E_demo[ log pi_r(y_E|x) ]      L2 = -E_pairs[ log sigma(r_w - r_l) ]
    where  pi_r = argmax_pi E_pi[r] - beta KL(pi || pi_ref)

The demonstrations must be likely under the policy that the reward brings about. With y_1..y_k drawn from
the policy, which follows pi_r, the reward model's share of L1 is

    linear  (w / beta) mean_i [ r(y_i) - r(y_E) ]              [P]   its gradient is that of w L1
    bt      w mean_i [ -log sigma(r(y_E) - r(y_i)) ]           [P]   bounded; the authors' code

and the policy follows r by REINFORCE against the other samples' mean, R = sg[ r - beta h ], h the
sequence log-ratio to pi_ref when the responses were drawn:

    -mean_i (R_i - mean_{j != i} R_j) log pi(y_i|x)            [P]

Without demonstrations (w = 0) this is RLHF with a reward model that keeps learning; without preferences
(v = 0) it is inverse reinforcement learning. Under `bt` the demonstrations alone do not lead back to
their own distribution: where policy and demonstrators agree, its gradient is not zero. `linear` has no
lower bound in r but for the policy that follows it, so a reward_lr far above what the policy can follow
lets the scores run away.

What the paper leaves to the user is how the policy follows r: the authors' code alternates rounds of
reward learning with rounds of APA or PPO; here both take a step together on every minibatch, and how far
the one runs ahead of the other is reward_lr against lr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.groups import leave_one_out
from rlhf_cli.core.later import torch
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class AIHF(Defaults):
    """A reward model inside the loop, taught by demonstrations and pairs while the policy follows it."""

    demo_loss: Literal["linear", "bt"]
    """How a demonstration is compared with the policy's samples."""
    demo_weight: NonNegative
    """w."""
    preference_weight: NonNegative
    """v."""
    beta: Positive
    """KL coefficient, reward units per nat of sequence KL."""
    responses: Annotated[int, Field(ge=2)]
    """Draws of the policy per prompt; the demonstration comes on top."""
    reward_lr: Positive
    """Peak learning rate of the reward model; schedule and warm-up are the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    trains_reward: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` draws of the policy beside the prompt's demonstration."""
        return Sampling(policy=self.responses, demo=1)

    def side(self) -> Sampling:
        """Preference pairs, of prompts of their own."""
        return Sampling(dataset=2)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,k] how much better each draw of the policy did than the others, KL included."""
        regularised = sequence_reward(rollout, self.beta)[:, rollout.where("policy")]
        return Targets(advantage=regularised - leave_one_out(regularised)), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P], "demo": [P]}; means over the draws, in which the demonstration has no part."""
        assert targets.advantage is not None
        drawn = rollout.where("policy")
        logp = sequence_sum(now.logp, rollout.mask)[:, drawn]
        gap = self._gap(now, rollout)
        linear = self.demo_loss == "linear"
        demo = (-gap / self.beta if linear else -torch.nn.functional.logsigmoid(gap)).mean(-1)
        return {"policy": -(targets.advantage * logp).mean(-1), "demo": self.demo_weight * demo}

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """{"preference": [P]}."""
        assert now.score is not None
        chosen, rejected = now.score[:, rollout.where("dataset")].unbind(-1)
        return {
            "preference": -self.preference_weight
            * torch.nn.functional.logsigmoid(chosen - rejected)
        }

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"demo_accuracy": [P], "demo_gap": [P]}: how well the reward model tells them apart."""
        gap = self._gap(now, rollout)
        return {"demo_accuracy": (gap > 0).float().mean(-1), "demo_gap": gap.mean(-1)}

    @staticmethod
    def _gap(now: Forward, rollout: Rollout) -> Tensor:
        """[P,k] the demonstration's score over each draw's."""
        assert now.score is not None
        return now.score[:, rollout.where("demo")] - now.score[:, rollout.where("policy")]
