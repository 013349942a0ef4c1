"""SPPO, Self-Play Preference Optimization (Wu, Sun, Yuan, Ji, Yang, Gu 2024, arXiv:2405.00675, algorithm 1):
each response's log-probability is regressed on how often it beats the policy that drew it.

    y_1 .. y_k drawn from pi_t = pi_old        P_i = mean over j /= i of sigma(r_i - r_j)      [P,G]
    L_i = (log pi(y_i|x) - log pi_t(y_i|x) - (P_i - 1/2) / beta)^2

1 / beta is the paper's eta. It is a step of multiplicative weights, pi_t exp(P / beta) / Z, with log Z
taken for 1 / (2 beta), which it is while all P are near 1/2. The anchor is the last policy and never
the reference, so round after round the policy goes on towards the response that beats all others, and
only the number of rounds and steps keeps it near the reference.

What the paper leaves to its code: the chance of winning, here by the reward model as a Bradley-Terry
model (the paper asks PairRM), is averaged over the *other* responses. Counting the response against
itself, as the authors' code does, draws P_i to 1/2 by the factor (k - 1) / k, i.e. raises beta. Their
code learns from the best and the worst response only; here all are learned from, as in the paper.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class SPPO(Defaults):
    """Self-play: the square of a log-ratio to the sampling policy off a centred win rate."""

    beta: Positive
    """How much win rate buys a nat within one rollout; the inverse of the paper's eta."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt, each other's opponents."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G] the log-ratio each response should get, nats."""
        assert rollout.score is not None
        r, others = rollout.score, rollout.score.shape[1] - 1
        wins = (r.unsqueeze(2) - r.unsqueeze(1)).sigmoid().sum(2)
        # Each response also met itself, and beat itself half the time.
        return Targets(advantage=((wins - 0.5) / others - 0.5) / self.beta), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G]}."""
        assert targets.advantage is not None
        moved = sequence_sum(now.logp - rollout.logp_old, rollout.mask)
        return {"policy": (moved - targets.advantage) ** 2}
