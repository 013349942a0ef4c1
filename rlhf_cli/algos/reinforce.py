"""REINFORCE (Williams 1992) with a moving-average baseline, as revisited for RLHF by Ahmadian et al. 2024
(arXiv:2402.14740, "Back to Basics").

    R = r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))      [P,G], no gradient flows into it
    b = mean of R over all responses of earlier rollouts        one number, 0 before there are any
    L = -(R - b) log pi(y|x)                                    the sum over tokens, not their mean

The whole response is one action and its KL is part of its reward. The rollout at hand enters b only
afterwards: a baseline that holds the response it judges is no longer independent of it, and scales the
gradient down. b knows nothing of the prompt, so a reward shifted prompt by prompt changes gradients.

The paper averages over the whole training and names no window; so it is here. It takes two steps per
rollout without a ratio, the second of which is slightly off-policy. Summaries of the paper were read,
not its appendix. Without the baseline this is `vpg`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.moments import absorb
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.recipes import STRICT, Count, NonNegative, Optim, Update


@dataclass(frozen=True, config=STRICT)
class Reinforce(Defaults):
    """Better or worse than what the policy has earned so far."""

    beta: NonNegative
    """KL coefficient, reward units per nat of sequence KL."""
    baseline: Literal["past", "none"]
    """b: the mean of all that was earned before this rollout, or 0."""
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
        """[P,G] how much better than the past each response did; then it becomes part of the past."""
        reward = sequence_reward(rollout, self.beta)
        past = state.get("earned/mean") if self.baseline == "past" else None
        advantage = reward if past is None else reward - past.to(reward)
        return Targets(advantage=advantage), absorb(state, "earned", reward)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G]}."""
        assert targets.advantage is not None
        return {"policy": -targets.advantage * sequence_sum(now.logp, rollout.mask)}
