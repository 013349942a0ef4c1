"""PPG, the pairwise policy gradient (Wu et al. 2023, arXiv:2310.00212; sketched in the P3O post).

    R = r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))              [P,G], no gradient flows into it
    L = -1/2 (R1 - R2) (log pi(y1|x) - log pi(y2|x))                    y1, y2 independent draws of pi

In expectation this is the policy gradient of J = E[r] - beta KL(pi || pi_ref); per pair it is blind to
any function of the prompt added to the reward. P3O is what it becomes with responses of an older policy
and clips: with neither, its first step is this one.

The paper takes two responses per prompt. With k of them all k(k-1)/2 pairs are compared and averaged,
which is leave-one-out on k responses exactly: the mean over i of (R_i - mean of the others) log pi(y_i).
One step per rollout, since nothing corrects for an older policy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Update


@dataclass(frozen=True, config=STRICT)
class PPG(Defaults):
    """Responses to one prompt compared with each other, pair by pair."""

    beta: NonNegative
    """KL coefficient, reward units per nat of sequence KL."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G] the regularised reward; the level it stands on cancels in every pair."""
        return Targets(advantage=sequence_reward(rollout, self.beta)), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        assert targets.advantage is not None
        r1, r2 = pairs(targets.advantage)
        l1, l2 = pairs(sequence_sum(now.logp, rollout.mask))
        return {"policy": -0.5 * ((r1 - r2) * (l1 - l2)).mean(-1)}
