"""The rollouts of the last few iterations, for algorithms that learn from old responses too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from rlhf_cli.core.algorithm import State
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.engine.order import shuffled

PREFIX = "replay/"


@dataclass
class Replay:
    """At most `most` rollouts, the newest last."""

    most: int
    seed: int
    kept: list[Rollout] = field(default_factory=list)

    def exchange(self, rollout: Rollout, index: int) -> Rollout:
        """Takes a rollout in and gives as many prompts back, drawn evenly out of all that are kept."""
        self.kept = [*self.kept, rollout][-self.most :]
        if self.most == 1:
            return rollout
        pool = Rollout.join(self.kept)
        size, device = rollout.mask.shape[0], rollout.mask.device
        drawn = shuffled(pool.mask.shape[0], self.seed, index)[:size]
        return pool.take(torch.from_numpy(drawn).to(device))

    def state(self) -> State:
        """What a checkpoint must hold; nothing if only the newest rollout is ever learned from."""
        if self.most == 1:
            return {}
        return {
            f"{PREFIX}{place}/{f.name}": value
            for place, rollout in enumerate(self.kept)
            for f in fields(rollout)
            if isinstance(value := getattr(rollout, f.name), Tensor)
        }

    def restore(self, state: Mapping[str, Tensor], sources: tuple) -> State:
        """Takes its own part out of a checkpoint's state and returns the rest."""
        parts: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith(PREFIX):
                _, place, word = name.split("/")
                parts.setdefault(int(place), {})[word] = value
        optional = dict.fromkeys(("logp_ref", "score", "value_old"))
        self.kept = [
            Rollout(source=sources, **{**optional, **parts[i]})  # type: ignore[arg-type]
            for i in sorted(parts)
        ]
        return {name: value for name, value in state.items() if not name.startswith(PREFIX)}
