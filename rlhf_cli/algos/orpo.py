"""ORPO, Odds Ratio Preference Optimization (Hong, Lee, Thorne 2024, arXiv:2403.07691, eqs. 6 and 7):
fine-tuning on the preferred response, and the odds of preferring it, in one loss without a reference.

    m = log pi(y|x) / |y|        log odds = m - log(1 - exp m)                                 [P]
    L = -m_w - lambda log sigma(log odds_w - log odds_l)

With lambda = 0 it is supervised fine-tuning on the preferred responses, whose end is their distribution;
the odds then sharpen it further. pi_ref exp(r / beta) plays no part, and there is no beta.

Both terms are means over the tokens of one response, as the paper writes them. TRL averages the first
over all tokens of the batch, those of the prompts included. A response that is certain has infinite
odds: m is cut at -1e-6, beyond which the odds no longer push.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, Targets, Terms
from rlhf_cli.core.later import torch
from rlhf_cli.core.preference import sequence_mean
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Update

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN = -1e-6
"""Mean log-probability above which a response counts as certain, nats per token."""


@dataclass(frozen=True, config=STRICT)
class ORPO(Defaults):
    """Supervised fine-tuning with an odds-ratio penalty, on the pairs of a dataset."""

    lam: NonNegative
    """lambda, weight of the odds against the log-likelihood."""
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
        """{"policy": [P], "nll": [P]}."""
        level = sequence_mean(now.logp, rollout.mask)
        better, worse = self._log_odds(level).unbind(1)
        return {
            "policy": -self.lam * torch.nn.functional.logsigmoid(better - worse),
            "nll": -level[:, 0],
        }

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P]}: whether the preferred response has the better odds."""
        better, worse = self._log_odds(sequence_mean(now.logp, rollout.mask)).unbind(1)
        return {"accuracy": (better > worse).float()}

    def _log_odds(self, level: Tensor) -> Tensor:
        """[P,2] -> [P,2]."""
        level = level.clamp_max(CERTAIN)
        return level - torch.log(-torch.expm1(level))
