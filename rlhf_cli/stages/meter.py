"""What a run has spent on learning; equal curves at unequal budgets are no comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_cli.config import Recipe
from rlhf_cli.core.algorithm import State
from rlhf_cli.core.rollout import GIVEN, Rollout
from rlhf_cli.cost import rollout_flop
from rlhf_cli.shapes import Unknown

NAMES = ("prompts", "responses", "given", "tokens", "scored", "flops", "seconds")
STATE = "meter"


@dataclass
class Meter:
    """Totals over all rollouts so far. What evaluations cost is not among them."""

    recipe: Recipe
    scored: bool
    """Whether the chain has a reward model of its own."""
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))

    def add(self, rollout: Rollout, side: Rollout | None, seconds: float) -> None:
        """Counts a rollout, what was read beside it, and the updates on both."""
        given = rollout.where(*GIVEN)
        drawn = [g for g in range(len(rollout.source)) if g not in given]
        prompts = len(rollout.mask)
        real, replies = float(rollout.attention.sum()), float(rollout.mask.sum())
        rows = rollout.mask[..., 0].numel()
        spent = {
            "prompts": prompts,
            "responses": prompts * len(drawn),
            "given": prompts * len(given) + (0 if side is None else side.mask[..., 0].numel()),
            "tokens": float(rollout.mask[:, drawn].sum()),
            "scored": 0 if rollout.score is None else rows,
            "flops": self._flops((real - replies) / rows, replies / rows),
            "seconds": seconds,
        }
        self.spent = {name: self.spent[name] + spent[name] for name in NAMES}

    def _flops(self, prompt: float, reply: float) -> float:
        """Of one rollout and its updates, with texts of these mean lengths; nan if shapes are unknown."""
        try:
            return rollout_flop(self.recipe, self.scored, prompt, reply)
        except Unknown:
            return float("nan")

    def row(self) -> dict[str, float]:
        """The totals under their published names."""
        return {f"budget/{name}": value for name, value in self.spent.items()}

    def state(self) -> State:
        """What a checkpoint must hold."""
        return {STATE: torch.tensor([self.spent[name] for name in NAMES], dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> State:
        """Takes its own part out of a checkpoint's state and returns the rest."""
        if STATE in state:
            self.spent = dict(zip(NAMES, state[STATE].tolist(), strict=True))
        return {name: value for name, value in state.items() if name != STATE}
