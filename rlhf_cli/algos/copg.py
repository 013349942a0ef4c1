"""CoPG, Contrastive Policy Gradient (Flet-Berliac et al. 2024, arXiv:2406.19185).

    h = log pi(y|x) - log pi_ref(y|x)        R_b = r(x, y) - b h        all live: nothing is stopped
    maximise  (R_{beta/2}(y) - R_{beta/2}(y')) (h(y) - h(y'))            for a pair of responses

Completing the square, this is minimising

    L = 1/(2 beta) (x1 - x2)^2        x = r - beta h      [P,G], the regularised reward under pi now

whose gradient is -(R_beta(y) - R_beta(y')) (grad log pi(y) - grad log pi(y')): over all responses to
a prompt, their within-prompt variance, 0 only where x is the same for all of them. That is
pi_ref exp(r/beta)/Z whoever drew the responses (Theorem 1 of the paper), so there is no ratio, no clip
and no critic. It holds only while R_beta is that of the current policy: with the R_beta of the rollout
nothing pulls back a policy that learns from old responses, and it runs away.

Normalisation: the mean over all G(G-1)/2 pairs of L, which is the paper's pair for G = 2 and has the
expected gradient -2 grad J on own samples for every G. The sum over pairs divided by G-1 is G/2 times
that. The paper trains on preference pairs whose two responses a reward model scores anew
(`data: offline`) and leaves sampling open; `online` draws from the policy, and `replay` rollouts are
kept to draw prompts from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, Count, Optim, Positive, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class CoPG(Defaults):
    """Regression of log-ratio differences onto reward differences, from responses of anyone."""

    beta: Positive
    """KL coefficient, reward units per nat of sequence KL."""
    data: Literal["online", "offline"]
    """Draws of the policy, or the two responses of a preference pair."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt; 2 where they come from pairs."""
    replay: Count
    """Rollouts that are kept and learned from; 1 forgets each after its update."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    @field_validator("responses")
    @classmethod
    def _pairs_are_two(cls, responses: int, info: ValidationInfo) -> int:
        if info.data.get("data") == "offline" and responses != 2:
            raise ValueError("be 2, the responses of a preference pair")
        return responses

    def sampling(self) -> Sampling:
        """Independent draws of the policy, or the dataset's pairs."""
        if self.data == "offline":
            return Sampling(dataset=2)
        return Sampling(policy=self.responses)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        x1, x2 = pairs(self._regularised(now, rollout))
        return {"policy": ((x1 - x2) ** 2).mean(-1) / (2 * self.beta)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"regularised_variance": [P]}: of R_beta over the responses, divided by G-1."""
        return {"regularised_variance": self._regularised(now, rollout).var(1)}

    def replayed(self) -> int:
        """As set."""
        return self.replay

    def _regularised(self, now: Forward, rollout: Rollout) -> Tensor:
        """[P,G] R_beta under the current policy, with gradient."""
        assert rollout.logp_ref is not None and rollout.score is not None
        return rollout.score - self.beta * sequence_sum(now.logp - rollout.logp_ref, rollout.mask)
