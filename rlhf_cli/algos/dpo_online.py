"""Online DPO: the DPO loss (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) on pairs the policy itself
draws and a reward model labels, as compared in the P3O paper (arXiv:2310.00212) and in Guo et al. 2024
(arXiv:2402.04792).

    h = log pi(y|x) - log pi_ref(y|x)
    L = -p log sigma(beta (h1 - h2)) - (1 - p) log sigma(beta (h2 - h1))

    p = P(y1 preferred):  argmax     1[r1 > r2], ties to the first
                          bernoulli  a coin that lands heads with sigma(r1 - r2)
                          soft       sigma(r1 - r2) itself

With soft or tossed labels the optimum is pi_ref exp(r/beta)/Z; with argmax labels a tabular policy has
no optimum and runs away, so its beta is not comparable to that of the other methods. Which rule the P3O
paper used is not stated; all three are here. More than two responses are compared in all pairs.

`pair_loss: ipo` puts the square of IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17) in the place of the
sigmoid, as Calandriello et al. 2024 (arXiv:2403.08635) do. A policy that learns from its own samples
then rests where h(y) = E_{y' of pi} P(y > y') / beta + c: the equilibrium of the regularised game that
Nash-MD plays against itself.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.preference import (
    Label,
    Norm,
    PairLoss,
    gaps,
    implicit_rewards,
    labels,
    preference_loss,
    watched,
)
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class OnlineDPO(Defaults):
    """DPO on the policy's own samples, labelled by the reward model."""

    beta: Positive
    """Inverse temperature of the implicit reward, reward units per nat; IPO's tau."""
    label: Label
    """How two scores become a preference."""
    pair_loss: PairLoss
    """sigmoid: DPO; ipo: IPO's square."""
    ipo_norm: Norm
    """Whether IPO's log-ratios are summed over a response's tokens or averaged."""
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
        """Label every pair: [P,C] probability that its first response is preferred."""
        return Targets(label=labels(rollout, self.label)), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        assert targets.label is not None
        gap = gaps(now, rollout, self.pair_loss, self.ipo_norm)
        return {"policy": preference_loss(gap, targets.label, self.beta, self.pair_loss).mean(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy", "margin", "implicit_chosen", "implicit_rejected"}, all [P]."""
        assert targets.label is not None
        seen = watched(gaps(now, rollout, self.pair_loss, self.ipo_norm), targets.label)
        return {**seen, **implicit_rewards(now, rollout, targets.label, self.beta)}
