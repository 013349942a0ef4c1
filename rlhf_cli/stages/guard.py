"""What a stage does when its numbers go wrong: leave a step out, warn, back off, stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rlhf_cli import recipes
from rlhf_cli.engine.learner import Learner
from rlhf_cli.errors import UserError

GROWN = 1.5
"""Factor by which the KL must have grown since the last word on it before there is another one."""
BACK_OFF = 0.5
"""Factor on all learning rates each time a run backs off."""


@dataclass
class Guard:
    """Counts what has gone wrong in a run so far, all of its segments together."""

    rule: recipes.Guard
    warn: Callable[[str], None]
    skipped: int = 0
    said: float = 0.0
    """KL of the last word on it."""

    def after(self, metrics: dict[str, float], learner: Learner) -> bool:
        """Whether a step was taken. Raises UserError if too many were left out, or if the loss is no number.

        metrics: of `Learner.step`; its `skipped` is taken out.
        """
        step = learner.step_index
        if not metrics.pop("skipped"):
            if not math.isfinite(metrics["loss"]):
                raise UserError(f"the loss is {metrics['loss']} at step {step}: {_DIVERGED}.")
            return True
        self.skipped += 1
        what = f"step {step}: the gradient is no number (loss {metrics['loss']:g})"
        if self.skipped > self.rule.skips:
            raise UserError(
                f"{what}, {self.skipped} times in this run, and guard.skips={self.rule.skips}: {_DIVERGED}."
            )
        self.warn(f"{what}; the step is left out ({self.skipped} of at most {self.rule.skips}).")
        return False

    def kl(self, kl: float, learner: Learner) -> None:
        """Acts if the mean KL of a rollout, in nats, runs away."""
        bound = self.rule.kl
        if bound is not None and kl > max(bound, GROWN * self.said):
            self.said = kl
            self.alarm(f"the KL to the SFT policy is {kl:.0f} nats (guard.kl={bound:g})", learner)

    def alarm(self, what: str, learner: Learner) -> None:
        """Acts by the rule. Raises UserError if that says stop."""
        sentence = f"step {learner.step_index}: {what}"
        if self.rule.action == "stop":
            raise UserError(
                f"{sentence}, and guard.action=stop; raise algo.beta or lower algo.optim.lr, or go on with"
                " guard.action=warn."
            )
        if self.rule.action == "back_off":
            learner.ease *= BACK_OFF
            sentence += f"; learning rates are {learner.ease:g} of their schedule from now on"
        else:
            sentence += "; raise algo.beta"
        self.warn(f"{sentence}.")

    def state(self, learner: Learner) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"skipped": self.skipped, "kl_said": self.said, "ease": learner.ease}

    def restore(self, place: Mapping[str, float], learner: Learner) -> None:
        """Takes up what a checkpoint held."""
        # Checkpoints from before there was a guard hold nothing of it, for it had done nothing.
        self.skipped, self.said = int(place.get("skipped", 0)), place.get("kl_said", 0.0)
        learner.ease = place.get("ease", 1.0)

    def row(self, learner: Learner) -> dict[str, float]:
        """For the metrics; nothing while all is well."""
        found = {"guard/skipped": self.skipped, "guard/rate": learner.ease}
        return found if self.skipped or learner.ease < 1 else {}


_DIVERGED = "the run diverged; lower the learning rate or raise beta (the last checkpoint is kept)"
