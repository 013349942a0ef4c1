"""SPIN, Self-Play Fine-Tuning (Chen, Deng, Yuan, Ji, Gu 2024, arXiv:2401.01335, eq. 4.7): tell a
demonstration from the policy's own answer.

    y_d demonstrated, y drawn from pi_old = pi_t        u = log pi - log pi_old                [P]
    L = -log sigma(beta (u(y_d) - u(y)))

DPO with the demonstration as the winner, the own sample as the loser and the previous iterate as the
reference: here the policy that drew the rollout. The paper makes an iterate last for epochs over tens
of thousands of rows; `update.batch`, `epochs` and `minibatches` say how long one lasts. In the first
step of each, and so in a run of one step per rollout, u is 0 and the gradient is beta / 2 times that of
supervised fine-tuning on the demonstrations, less a term whose mean is 0. At rest the policy is the
distribution of the demonstrations, whatever beta is: there is no reward, and no pull to the reference.
It can therefore gain only what the demonstrations have over the policy. On the embedded corpora they are
of mixed quality on purpose, little better than the SFT policy, and so little is gained
(docs/results/algorithms-nano.md).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.preference import demo_lead, preference_loss, watched
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class SPIN(Defaults):
    """Demonstrations against the policy's own samples."""

    beta: Positive
    """Inverse temperature of the comparison with the last iterate; lambda in the paper."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset()
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """A demonstration and one draw of the policy per prompt."""
        return Sampling(policy=1, demo=1)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}."""
        lead = demo_lead(now, rollout)
        return {"policy": preference_loss(lead, 1.0, self.beta, "sigmoid").squeeze(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P], "margin": [P]}: whether the demonstration gained more, and the difference."""
        return watched(demo_lead(now, rollout), 1.0)
