"""REBEL, Regression to Relative Reward Based RL (Gao, Chang, Zhan, Oertell, Swamy, Brantley, Joachims,
Bagnell, Lee, Sun 2024, arXiv:2404.16767, Algorithm 1).

    d = log pi(y|x) - log pi_old(y|x)                            pi_old drew the responses
    R = r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))
    L = ((d1 - d2) - eta (R1 - R2))^2

Solved exactly, a round is a mirror descent step: pi = pi_old exp(eta R)/Z. Its fixed point is
pi_ref exp(r/beta)/Z; each round keeps the share 1 - eta beta of the distance in log-probability, so it
is reached while eta beta < 2. The anchor is the policy of the round, not the reference: within a round
nothing changes R, and the KL acts from one round to the next.

The paper divides d by eta instead of multiplying R by it, which scales the loss by 1/eta^2; here as in
the authors' code. Its objective has no KL; the code puts one into the reward, as here, and beta = 0 is
the paper's. More than two responses are compared in all pairs, averaged; the paper uses two.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class REBEL(Defaults):
    """Regression of how much a pair moved apart in this round onto its reward difference."""

    beta: NonNegative
    """KL coefficient, reward units per nat of sequence KL."""
    eta: Positive
    """Step size of a round, nats per reward unit."""
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

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        assert rollout.logp_ref is not None and rollout.score is not None
        kl = sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)
        moved = sequence_sum(now.logp - rollout.logp_old, rollout.mask)
        short1, short2 = pairs(moved - self.eta * (rollout.score - self.beta * kl))
        return {"policy": ((short1 - short2) ** 2).mean(-1)}
