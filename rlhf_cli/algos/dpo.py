"""DPO (Rafailov, Sharma, Mitchell, Ermon, Manning, Finn 2023, arXiv:2305.18290, eq. 7) and IPO (Azar,
Rowland, Piot, Guo, Calandriello, Valko, Munos 2023, arXiv:2310.12036, eq. 17): a policy learned from
preference pairs (y_w, y_l), without a reward model and without drawing a response.

    h = log pi(y|x) - log pi_ref(y|x)        g = h_w - h_l                                    [P]

    sigmoid (DPO)   l(g) = -log sigma(beta g)
    ipo             l(g) = (g - 1 / (2 beta))^2         beta is the paper's tau

A share `noise` of the labels may be wrong:

    conservative    (1 - noise) l(g) + noise l(-g)      Mitchell 2023, cDPO: label smoothing
    robust         ((1 - noise) l(g) - noise l(-g)) / (1 - 2 noise)
                                                        Chowdhury et al. 2024, arXiv:2403.00409, rDPO

The robust loss has, over wrong labels, the mean of the clean one; on a finite set it has no lower end.

With labels of a Bradley-Terry reward r, DPO's optimum is pi_ref exp(r / beta) / Z for every law of the
pairs that reaches all responses. IPO's is linear in the preference instead: for two independent draws
of mu, h(y) = E_{y' of mu} P(y > y') / beta + c.

What the papers leave open: IPO sums log-ratios as printed, while its authors recommended their mean
over the tokens to the libraries (`ipo_norm: mean`, as in TRL and HALOs); the two betas do not compare.
DPO always sums.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.preference import (
    Norm,
    PairLoss,
    gaps,
    implicit_rewards,
    preference_loss,
    watched,
)
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class DPO(Defaults):
    """DPO (`pair_loss: sigmoid`) and IPO (`pair_loss: ipo`) on the preference pairs of a dataset."""

    beta: Positive
    """Inverse temperature of the implicit reward, reward units per nat; IPO's tau."""
    pair_loss: PairLoss
    """sigmoid: DPO; ipo: a square that a pair ranked confidently enough does not exceed."""
    ipo_norm: Norm
    """Whether IPO's log-ratios are summed over a response's tokens or averaged."""
    noise: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of pairs that are believed to be labelled the wrong way round."""
    robust: bool
    """Whether that noise is undone (rDPO) or only hedged against (cDPO)."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """The two responses of a preference pair."""
        return Sampling(dataset=2)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}."""
        right = 1 - self.noise
        label = right / (right - self.noise) if self.robust else right
        gap = gaps(now, rollout, self.pair_loss, self.ipo_norm)
        return {"policy": preference_loss(gap, label, self.beta, self.pair_loss).squeeze(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy", "margin", "implicit_chosen", "implicit_rejected"}, all [P]."""
        seen = watched(gaps(now, rollout, self.pair_loss, self.ipo_norm), 1.0)
        return {**seen, **implicit_rewards(now, rollout, 1.0, self.beta)}
