"""Vanilla policy gradient on whole responses: REINFORCE (Williams 1992) as set against P3O by Wu et al.
2023 (arXiv:2310.00212), the response being the one action of a bandit.

    R = r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))      [P,G], no gradient flows into it
    L = -(R - b) log pi(y|x)                                    the sum over tokens, not their mean

On the policy's own samples the expected slope is that of J = E[r] - beta KL(pi || pi_ref), whatever the
constant b: E[grad log pi] = 0, which is also why R may be held fixed. Per response it is not blind to
the level of the reward: a constant added to r multiplies the noise. Nothing corrects for responses of an
older policy, so a rollout is learned from in one step.

No baseline is published with it, so there is a choice: a constant (0 for none), or the mean of the
rollout. That mean contains the response it is compared with, which shrinks the expected gradient by the
factor 1 - 1/N for N independent responses and turns it nowhere else.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.recipes import STRICT, Count, NonNegative, Optim, Update


@dataclass(frozen=True, config=STRICT)
class VPG(Defaults):
    """The score-function gradient with a baseline that knows nothing of the prompt."""

    beta: NonNegative
    """KL coefficient, reward units per nat of sequence KL."""
    baseline: Literal["constant", "batch"]
    """What R is compared with: a number, or the mean of R over the rollout."""
    level: float
    """The number, reward units; 0 compares with nothing."""
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
        """[P,G] how much better than the baseline each response did."""
        reward = sequence_reward(rollout, self.beta)
        baseline = reward.mean() if self.baseline == "batch" else self.level
        return Targets(advantage=reward - baseline), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G]}."""
        assert targets.advantage is not None
        return {"policy": -targets.advantage * sequence_sum(now.logp, rollout.mask)}
