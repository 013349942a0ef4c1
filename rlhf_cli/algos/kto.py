"""KTO, Kahneman-Tversky Optimization (Ethayarajh, Xu, Muennighoff, Jurafsky, Kiela 2024,
arXiv:2402.01306, section 4): each response is good or bad by itself, judged against a level z0.

    h = log pi(y|x) - log pi_ref(y|x)        z0 = max(0, mean of h over mismatched responses), no gradient

    good   lambda_D (1 - sigma(beta (h - z0)))       the preferred response of a pair
    bad    lambda_U (1 - sigma(beta (z0 - h)))       the other one                             both [P]
    L      the mean over all of them

A mismatched response answers another prompt of the batch, and z0 is one number for the whole batch,
formed before its update. It estimates KL(pi || pi_ref) from responses the policy did not draw, hence is
often negative and then cut to 0.

The value sigma is bounded, so a response that lies far on either side no longer matters, wrong label or
not. In exchange nothing holds a policy that is free to place every response: where y is good more often
than bad (by their weights) its loss only falls with h, and else only rises. There is no
pi_ref exp(r / beta).

The dataset's labels are pairs, split up here as in the paper's experiments; with equal weights the good
and the bad half of a pair pull on equal responses with equal force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Positive, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class KTO(Defaults):
    """Prospect-theoretic loss on the responses of a dataset's pairs, each by itself."""

    beta: Positive
    """Sharpness of the value, per nat of log-ratio: loss aversion and risk aversion in one."""
    desirable: NonNegative
    """lambda_D, weight of preferred responses."""
    undesirable: NonNegative
    """lambda_U, weight of the others."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """The two responses of a preference pair, and one to another prompt."""
        return Sampling(dataset=2, mismatch=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P] z0, the same for all."""
        assert rollout.logp_ref is not None
        h = sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)
        level = h[:, rollout.where("mismatch")].mean().clamp_min(0)
        return Targets(baseline=level.expand(len(h))), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean of the two responses."""
        gain = self._gain(now, rollout, targets)
        good = self.desirable * (-self.beta * gain[:, 0]).sigmoid()
        bad = self.undesirable * (self.beta * gain[:, 1]).sigmoid()
        return {"policy": 0.5 * (good + bad)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P], "margin": [P], "baseline": [P]}: right sides of z0, the gap, and z0, nats."""
        assert targets.baseline is not None
        good, bad = self._gain(now, rollout, targets).unbind(1)
        right = 0.5 * ((good > 0).float() + (bad < 0).float())
        return {"accuracy": right, "margin": (good - bad).abs(), "baseline": targets.baseline}

    def _gain(self, now: Forward, rollout: Rollout, targets: Targets) -> Tensor:
        """[P,2] h - z0 of the preferred response and of the other."""
        assert rollout.logp_ref is not None and targets.baseline is not None
        h = sequence_sum(now.logp - rollout.logp_ref, rollout.mask)[:, rollout.where("dataset")]
        return h - targets.baseline.unsqueeze(-1)
