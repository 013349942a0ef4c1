"""AIHF without a reward model (Li, Zeng, Liao, Li, Kang, Garcia, Hong 2024, arXiv:2406.06874).

Putting r = beta h, h = log pi(y|x) - log pi_ref(y|x), the reward whose optimal policy is pi, into the
two losses of AIHF (`algos/aihf.py`) leaves losses of the policy alone, for pairs (y_w, y_l) and
demonstrations y_E, each from prompts of their own:

    direct      L = -log sigma(beta (h_w - h_l)) - w log pi(y_E|x)                          both [P]

    self-play   L = -log sigma(beta (h_w - h_l)) - w log sigma(b (d(y_E) - d(y)))           both [P]
                d(y) = log pi(y|x) - log pi_old(y|x),   y drawn from pi_old

The second term of self-play is SPIN (Chen et al. 2024, arXiv:2401.01335) with the policy of the rollout
as its opponent; the number of steps per rollout is the length of a round. At w = 0 both are DPO; without
pairs they are supervised fine-tuning and SPIN. On the policy's own samples the mean gradient of
self-play is that of the direct form at w b / 2, so the two have one optimum when sampling is fresh.

The likelihood of a demonstration is that of the whole response, a sum over its tokens. What weights the
paper used for these forms we could not find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.preference import demo_lead, gaps, preference_loss, watched
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class DirectAIHF(Defaults):
    """DPO on preference pairs and imitation of demonstrations at once."""

    beta: Positive
    """Inverse temperature of the implicit reward, reward units per nat."""
    demo_weight: NonNegative
    """w."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """Preference pairs."""
        return Sampling(dataset=2)

    def side(self) -> Sampling:
        """Demonstrations."""
        return Sampling(demo=1)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the pairs."""
        return {"policy": _ranked(gaps(now, rollout), self.beta)}

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """{"demo": [P]}."""
        return {"demo": -self.demo_weight * sequence_sum(now.logp, rollout.mask).squeeze(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P], "margin": [P]} of the pairs."""
        return watched(gaps(now, rollout), 1.0)


@dataclass(frozen=True, config=STRICT)
class SelfPlayAIHF(Defaults):
    """DPO on preference pairs, and demonstrations preferred to the policy's own samples."""

    beta: Positive
    """Inverse temperature of the implicit reward of the pairs, reward units per nat."""
    play_beta: Positive
    """b: the same of a demonstration against a sample, relative to the policy that drew it."""
    demo_weight: NonNegative
    """w."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """A demonstration and a draw of the policy."""
        return Sampling(policy=1, demo=1)

    def side(self) -> Sampling:
        """Preference pairs, of prompts of their own."""
        return Sampling(dataset=2)

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, demonstration against sample."""
        return {"policy": self.demo_weight * _ranked(demo_lead(now, rollout), self.play_beta)}

    def side_loss(self, now: Forward, rollout: Rollout) -> Terms:
        """{"preference": [P]}."""
        return {"preference": _ranked(gaps(now, rollout), self.beta)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P], "margin": [P]} of demonstrations against samples."""
        return watched(demo_lead(now, rollout), 1.0)


def _ranked(gap: Tensor, beta: float) -> Tensor:
    """[P,1] -> [P]: -log sigma(beta gap)."""
    return preference_loss(gap, 1.0, beta, "sigmoid").squeeze(-1)
