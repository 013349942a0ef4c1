"""RLOO, REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740).

    R_i = r(x, y_i) - beta (log pi_old(y_i|x) - log pi_ref(y_i|x))      [P,G], no gradient flows into it
    A_i = R_i - mean of R_j over j != i  =  k / (k-1) (R_i - mean of all k)
    L   = -A_i log pi(y_i|x)                                            the sum over tokens, not their mean

The others are draws of their own, so the baseline leaves the expected gradient that of E[r] - beta KL,
and any function of the prompt added to r cancels. A mean that includes y_i would shrink it by (k-1)/k.

What is called RLOO elsewhere is here under two options.

    variant   paper    as above: the KL is in what the siblings are compared by
              outside  A_it = r_i - mean of r_j - beta sum_{s>=t} (log pi_old(y_is) - log pi_ref(y_is)):
                       scores are compared, the KL still to come is charged token by token and without
                       a baseline (OpenRLHF). Equal in expectation, another estimator sample by sample.
    ratio     none     as above, on-policy; the paper takes two steps per rollout all the same
              clip     L = max(-A rho, -A clip(rho, 1-eps, 1+eps)),  rho = pi / pi_old of what A belongs to:
                       the response (as TRL has it), or the token where A is a token's (as OpenRLHF has it)

A single response has no siblings: one library then keeps its raw score and another makes it zero; here
fewer than two are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.groups import leave_one_out
from rlhf_cli.core.returns import to_go
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.core.surrogate import surrogate, surrogate_cut
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class RLOO(Defaults):
    """Each response against the mean of its siblings."""

    beta: NonNegative
    """KL coefficient, reward units per nat."""
    variant: Literal["paper", "outside"]
    """Whether siblings are compared by reward with KL, or by score with the KL charged outside."""
    ratio: Literal["none", "clip"]
    """Whether staleness is corrected for and clipped."""
    clip: Positive
    """eps of the probability ratio."""
    responses: Annotated[int, Field(ge=2)]
    """k, responses per prompt."""
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
        """What each response did better than its siblings: [P,G], or [P,G,T] with the KL outside."""
        assert rollout.logp_ref is not None and rollout.score is not None
        if self.variant == "paper":
            reward = sequence_reward(rollout, self.beta)
            return Targets(advantage=reward - leave_one_out(reward)), state
        better = (rollout.score - leave_one_out(rollout.score)).unsqueeze(-1)
        charge = self.beta * to_go(rollout.logp_old - rollout.logp_ref, rollout.mask)
        return Targets(advantage=better - charge), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G]}, tokens summed where they are judged one by one."""
        assert targets.advantage is not None
        advantage = targets.advantage
        if self.ratio == "none":
            logp = now.logp if advantage.dim() == 3 else sequence_sum(now.logp, rollout.mask)
            term = -advantage * logp
        else:
            term = surrogate(self._moved(now, rollout, advantage), advantage, self.clip)
        return {"policy": sequence_sum(term, rollout.mask) if term.dim() == 3 else term}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"clip_fraction": [P,G] or [P,G,T]} where there is a clip."""
        assert targets.advantage is not None
        if self.ratio == "none":
            return {}
        moved = self._moved(now, rollout, targets.advantage)
        return {"clip_fraction": surrogate_cut(moved, targets.advantage, self.clip)}

    def _moved(self, now: Forward, rollout: Rollout, advantage: Tensor) -> Tensor:
        """log pi - log pi_old of the responses, or of the tokens, as the advantage has it."""
        moved = now.logp - rollout.logp_old
        return moved if advantage.dim() == 3 else sequence_sum(moved, rollout.mask)
