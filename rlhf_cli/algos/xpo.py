"""XPO, Exploratory Preference Optimization (Xie, Foster, Krishnamurthy, Rosset, Awadallah, Rakhlin 2024,
arXiv:2405.21046, algorithm 1): online DPO that is paid for leaving the reference.

    y drawn from pi, y' from pi_ref        h = log pi(y|x) - log pi_ref(y|x)                   [P]
    L = -p log sigma(beta (h - h')) - (1 - p) log sigma(beta (h' - h)) + alpha log pi(y'|x)

p = P(y > y') by the scores, as in `dpo_online`. In expectation the bonus is -alpha KL(pi_ref || pi)
and a constant: it pulls nowhere at the reference, and harder the further the policy has gone.

alpha must be small: the bonus sums log-probabilities, and falls without end where the preferences do
not hold it. Over whole responses the loss has a minimum if and only if, for every set S of some but not
all of them,

    alpha pi_ref(S) < beta sum over l in S, c not in S of w(l, c) P(l > c)

w: how often the two are compared. Hence two settings are refused. With `label: argmax` nothing ever
prefers the worst response, so any alpha is too much. And alpha >= beta is too much whatever the labels
(S: responses with half of the reference's probability or more). What is left is watched: `unheld` is
the share of pairs with alpha >= beta P(y' > y), in which nothing would ever stop y' from falling.

The bonus is of the reference's sample only, whoever won, and stays when both responses are the same:
there the preference teaches nothing and exploring is all that is left. OAT's code masks it; TRL's
keeps it. The theory fits all pairs drawn so far (`replay` of as many rollouts as there are); TRL and
OAT learn from the newest only (`replay: 1`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.preference import (
    Label,
    gaps,
    implicit_rewards,
    labels,
    preference_loss,
    watched,
)
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, Count, NonNegative, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class XPO(Defaults):
    """Online DPO against the reference's own sample, whose probability is pushed down."""

    beta: Positive
    """Inverse temperature of the implicit reward, reward units per nat."""
    label: Label
    """How two scores become a preference; argmax only without a bonus."""
    alpha: NonNegative
    """Weight of the bonus, loss per nat; below beta."""
    replay: Count
    """Rollouts that are learned from: 1 is the newest alone."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    @field_validator("alpha")
    @classmethod
    def _held(cls, alpha: float, info: ValidationInfo) -> float:
        """Refuses a bonus that no preference can hold."""
        if alpha and info.data.get("label") == "argmax":
            raise ValueError("be 0 with algo.label=argmax, or the loss has no lower end")
        if alpha >= info.data.get("beta", float("inf")):
            raise ValueError(
                f"be less than algo.beta={info.data['beta']}, or the loss has no lower end"
            )
        return alpha

    def sampling(self) -> Sampling:
        """One draw of the policy and one of the reference per prompt."""
        return Sampling(policy=1, ref=1)

    def replayed(self) -> int:
        """`replay` rollouts."""
        return self.replay

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,1] probability that the policy's response is preferred."""
        return Targets(label=labels(rollout, self.label)), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P], "bonus": [P]}."""
        assert targets.label is not None
        paired = preference_loss(gaps(now, rollout), targets.label, self.beta, "sigmoid")
        (ref,) = rollout.where("ref")
        bonus = self.alpha * sequence_sum(now.logp, rollout.mask)[:, ref]
        return {"policy": paired.squeeze(-1), "bonus": bonus}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy", "margin", "implicit_chosen", "implicit_rejected", "unheld"}, all [P]."""
        assert targets.label is not None
        unheld = (self.alpha >= self.beta * (1 - targets.label)).float().squeeze(-1)
        seen = watched(gaps(now, rollout), targets.label)
        traces = implicit_rewards(now, rollout, targets.label, self.beta)
        return {**seen, **traces, "unheld": unheld}
