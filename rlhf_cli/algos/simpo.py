"""SimPO (Meng, Xia, Chen 2024, arXiv:2405.14734, eq. 6): DPO without a reference, by the log-probability
of the average token.

    m = log pi(y|x) / |y|                                                                      [P]
    L = -log sigma(beta (m_w - m_l) - gamma)

The mean takes away the advantage a long response has in DPO; gamma asks for a margin. Nothing refers
to the policy it started from, so only the small number of steps keeps it near: with gamma = 0 and
Bradley-Terry labels a policy free to place every response ends at exp(|y| r / beta) / Z, whatever it was
before. The evaluation measures the KL all the same.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.later import torch
from rlhf_cli.core.preference import sequence_mean
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class SimPO(Defaults):
    """Length-normalised preference loss with a target margin, on the pairs of a dataset."""

    beta: Positive
    """Scale of the implicit reward, per nat of mean log-probability."""
    gamma: NonNegative
    """Margin by which the preferred response should lead, in units of the implicit reward."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset()
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """The two responses of a preference pair."""
        return Sampling(dataset=2)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}."""
        better, worse = sequence_mean(now.logp, rollout.mask).unbind(1)
        return {
            "policy": -torch.nn.functional.logsigmoid(self.beta * (better - worse) - self.gamma)
        }

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P]}: whether the preferred response is the likelier one per token."""
        better, worse = sequence_mean(now.logp, rollout.mask).unbind(1)
        return {"accuracy": (better > worse).float()}
