"""What every stage is handed: its recipe, its place among the processes, and where to write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_cli.config import Recipe
from rlhf_cli.core.algorithm import State
from rlhf_cli.data.corpus import Corpus
from rlhf_cli.data.tokens import AT_ONCE, Encoded, Encoder, encoded
from rlhf_cli.engine import checkpoint, pulse
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.stop import Stop
from rlhf_cli.engine.world import World
from rlhf_cli.errors import Stopped
from rlhf_cli.stages.chain import Chain
from rlhf_cli.stages.guard import Guard
from rlhf_cli.stages.progress import Progress
from rlhf_cli.store.metrics import Ledger, read
from rlhf_cli.store.run import Run
from rlhf_cli.track import Mirror

WORTH_TELLING = 50_000
"""Rows whose encoding takes long enough to be shown."""


@dataclass
class Context:
    """One process's view of the run it works on."""

    run: Run
    recipe: Recipe
    world: World
    corpus: Corpus
    parents: Mapping[str, Path]
    """sft, reward or guide -> run directory of the finished run this one starts from."""
    segment: int
    mirror: Mirror
    progress: Progress
    stop: Stop
    began: float = field(default_factory=time.perf_counter)
    wall_before: float = 0.0
    """Seconds spent by earlier segments."""
    kept: int = 0
    """Step of the newest checkpoint."""

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self.run.metrics_path)

    @cached_property
    def guard(self) -> Guard:
        """What watches the run's numbers."""
        return Guard(self.recipe.guard, self.progress.warn)

    def final(self, role: str) -> Path:
        """The model folder of a parent."""
        return Run(self.parents[role]).final

    @cached_property
    def chain(self) -> Chain:
        """The models that the parents have left."""
        finals = {role: self.final(role) for role in self.parents}
        return Chain(self.recipe, self.corpus, self.world, finals)

    def encoded(self, encoder: Encoder, rows: Sequence[tuple[str, ...]]) -> Encoded:
        """(prompt, response, …) rows as ids, encoded once for all runs that read them so."""
        cache = Path(self.recipe.paths.cache).expanduser()

        def told(done: int, total: int) -> None:
            if total < WORTH_TELLING:
                return
            if done <= AT_ONCE:
                self.progress.start(total)
            self.progress.at(done, "rows encoded")

        return encoded(encoder, rows, cache, told)

    def report(self, step: int, row: Mapping[str, float], note: str = "") -> None:
        """Writes one line of metrics (main process), mirrors it, and moves the progress bar."""
        if not self.world.is_main:
            return
        wall = self.wall_before + time.perf_counter() - self.began
        whole = {"step": step, "wall": wall, "segment": self.segment, **row}
        self._ledger.write(whole)
        self.mirror.log(whole)
        self.progress.at(step, note)

    def first(self) -> dict[str, float]:
        """The run's first line of metrics, on the main process; nothing before it is written."""
        return next(iter(read(self.run.metrics_path)), {}) if self.world.is_main else {}

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the evaluated responses of a step."""
        if not self.world.is_main:
            return
        self.run.keep_samples(step, rows)
        self.mirror.samples(step, list(rows)[:32])

    def save(self, learner: Learner, state: Mapping[str, Tensor]) -> None:
        """Makes a checkpoint to resume from."""
        wall = self.wall_before + time.perf_counter() - self.began
        keep, place = self.recipe.checkpoint.keep, {"wall": wall, **self.guard.state(learner)}
        pulse.rest()
        checkpoint.save(self.run.checkpoints, learner, self.world, dict(state), place, keep)
        self.kept = learner.step_index

    def between_steps(self, learner: Learner, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Makes a checkpoint of what `state` gives, if one is due or the run is asked to stop.

        Raises Stopped in the latter case.
        """
        reason = self.stop.asked()
        since = learner.step_index - self.kept
        if since >= self.recipe.checkpoint.every or (reason and since):
            self.save(learner, state())
        if reason:
            raise Stopped(
                f"{self.run.path} was stopped by {reason} after step {learner.step_index} of"
                f" {learner.steps}; give the same command again to go on from there."
            )

    def resume(self, learner: Learner) -> State | None:
        """Goes back to the newest checkpoint; None when starting afresh. Metrics are wound back."""
        found = checkpoint.resume(self.run.checkpoints, learner)
        if self.world.is_main:
            self._ledger.rewind(learner.step_index if found else -1)
            self._ledger.check_reaches(learner.step_index)
        if found is None:
            return None
        state, place = found
        self.wall_before, self.kept = place["wall"], learner.step_index
        self.guard.restore(place, learner)
        return {name: tensor.to(self.world.device) for name, tensor in state.items()}
