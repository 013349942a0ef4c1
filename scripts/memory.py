"""Runs a chain and holds the peaks of its memory against `rlhf_cli.memory`, stage by stage.

    python scripts/memory.py algo=ppo sft.epochs=0.1 paths.runs=/tmp/measured

On a GPU a peak is what torch has allocated at most. On the CPU it is the resident memory of the process less
what it had before the first model was made, with an allocator that returns what is freed: what libraries,
rows and fragments take on top is not estimated. Each stage runs in a process of its own, and only those of
the chain that are not done yet; give a folder of its own with paths.runs. One process (launch=inline) alone
is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_cli import memory
from rlhf_cli.config import compose
from rlhf_cli.launch import execute
from rlhf_cli.plan import Step, plan

FIRST = {"sft": "new_policy", "reward": "new_reward_model", "rl": "_models"}
"""What of `rlhf_cli.stages` makes the first model of a stage."""
DURING = {
    "drawing": ["engine.rollout:Collector._answers"],
    "scoring": [
        "engine.rollout:Collector._ask", "engine.rollout:Collector._score",
        "stages.sft:per_token", "stages.reward:_scores",
    ],
    "learning": ["engine.learner:Learner.rehearse", "engine.learner:Learner.step"],
}  # fmt: skip
"""Where a phase happens; learning includes the step of the optimiser, and the longest texts there may be."""
PROMPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc give back at once what is freed."""


class Gauge:
    """Peaks of this process's memory in bytes, phase by phase."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.before = 0.0
        self.peaks: dict[str, float] = {}

    def begin(self) -> None:
        """From here on memory counts."""
        self.before = 0.0 if self.cuda else _status("VmRSS")

    def watch(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its peak noted."""

        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.cuda:
                self.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            try:
                return call(*args, **kwargs)
            finally:
                peak = self.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")
                self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak - self.before)

        return watched


def _status(name: str) -> float:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(step: Step, words: list[str]) -> dict[str, float]:
    """Peaks of one stage, whose parents are there."""
    gauge = Gauge()
    for phase, calls in DURING.items():
        for module, _, dotted in (call.partition(":") for call in calls):
            *owners, name = dotted.split(".")
            owner = reduce(getattr, owners, import_module(f"rlhf_cli.{module}"))
            setattr(owner, name, gauge.watch(phase, getattr(owner, name)))
    stage = import_module(f"rlhf_cli.stages.{step.stage}")
    first = getattr(stage, FIRST[step.stage])

    def begun(*args: Any, **kwargs: Any) -> Any:
        _warm()
        gauge.begin()
        return first(*args, **kwargs)

    setattr(stage, FIRST[step.stage], begun)
    execute(plan(compose([*words, f"stage={step.stage}"])), "scripts/memory.py")
    return gauge.peaks


def _warm() -> None:
    """Has the libraries make what they keep from their first use on."""
    import torch

    layer = torch.nn.Linear(64, 64)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(64, 64)).sum().backward()
    optimiser.step()


def estimated(step: Step) -> dict[str, float]:
    """The same peaks on paper."""
    found = memory.of_stage(step.stage, step.recipe, "reward" in step.parents)
    said = {phase: found.at(phase) for phase in found.phases}
    return {**said, "learning": max(said["learning"], said["stepping"])}


def main(words: list[str]) -> None:
    """Prints a line per stage and phase; with `--stage NAME` in front, one stage's peaks as JSON."""
    if words[:1] == ["--stage"]:
        _, stage, *rest = words
        (step,) = (each for each in plan(compose(rest)).steps if each.role == stage)
        print(json.dumps(measure(step, rest)))
        return
    print(f"{'stage':8} {'phase':10} {'estimated MB':>12} {'measured MB':>12} {'error':>7}")
    for step in plan(compose(words)).steps:
        done = subprocess.run(
            [sys.executable, __file__, "--stage", step.role, *words],
            env={**os.environ, **PROMPT}, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        said, peaks = estimated(step), json.loads(done.stdout.splitlines()[-1])
        overall = {"overall": max(peaks.values())} if peaks else {}
        said["overall"] = max(said.values())
        for phase, peak in {**peaks, **overall}.items():
            error = f"{said[phase] / peak - 1:+.0%}"
            sizes = f"{said[phase] / 1e6:12,.0f} {peak / 1e6:12,.0f}"
            print(f"{step.role:8} {phase:10} {sizes} {error:>7}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
