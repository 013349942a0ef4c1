"""Nash-MD, in its policy-gradient form (Munos, Valko, Calandriello et al. 2023, arXiv:2312.00886,
section 7): learn to beat a policy that is mixed with the reference.

    y drawn from pi, y' from pi^(1-a) pi_ref^a / Z token by token, a = mixture                 [P]
    A = P(y > y') - 1/2 - beta (log pi_old(y|x) - log pi_ref(y|x))        P = sigma(r - r')
    L = -A log pi(y|x)

The 1/2 is a baseline. At rest h(y) = E[P(y > y')] / beta + c with y' drawn from the mixture: at a = 0
the equilibrium of the game with a KL penalty on both players, at a = 1 the best answer to the
reference, and never pi_ref exp(r / beta). Nothing corrects for responses of an older policy, so there
is one optimiser step per rollout.

The paper asks a preference model; here the reward model is asked, as a Bradley-Terry model. The penalty
is that of the whole response. TRL's trainer weighed the log-probability of each token by the log-ratio of
that token alone, which leaves out what a token does to the log-ratios of those that follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Share, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class NashMD(Defaults):
    """REINFORCE on the chance of beating a mixture of policy and reference."""

    beta: NonNegative
    """KL coefficient, win rate per nat of sequence KL."""
    mixture: Share
    """Weight of the reference's log-probabilities in the opponent's; the rest is the policy's."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy and one of the mixture per prompt."""
        return Sampling(policy=1, mixture=1, mixture_ref=self.mixture)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,1] the policy's centred chance of winning, less the penalty."""
        assert rollout.logp_ref is not None
        h = sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)
        penalty = self.beta * h[:, rollout.where("policy")]
        return Targets(advantage=self._chance(rollout) - 0.5 - penalty), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}: the opponent's response is not learned from."""
        assert targets.advantage is not None
        logp = sequence_sum(now.logp, rollout.mask)[:, rollout.where("policy")]
        return {"policy": -(targets.advantage * logp).squeeze(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"win_rate": [P]} against the mixture."""
        return {"win_rate": self._chance(rollout).squeeze(-1)}

    def _chance(self, rollout: Rollout) -> Tensor:
        """[P,1] P(y > y')."""
        assert rollout.score is not None
        ours, theirs = rollout.where("policy"), rollout.where("mixture")
        return (rollout.score[:, ours] - rollout.score[:, theirs]).sigmoid()
