"""How an online step grows with its sizes, and what many steps leave in memory.

One size at a time grows while the others stay, and log seconds are fitted by a line in log size: its
slope is the exponent of a power law, 1 if the work is linear. A cost that every step has whatever its size
pulls it below 1; nothing is subtracted for that.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import linregress

from benchmarks.comparisons import WORDS, our_run
from benchmarks.race import WARM, Contestant, race
from benchmarks.table import Line, missing
from rlhf_cli.config import compose
from rlhf_cli.plan import plan

ROUNDS = 3
FEW, MANY = 20, 200
"""Steps after which memory is compared."""
FLAT = 1.1
"""By how much the most memory of MANY steps may exceed that of FEW."""


@dataclass(frozen=True)
class Step:
    """Sizes of an online step."""

    algo: str = "rloo"
    prompts: int = 8
    each: int = 2
    epochs: int = 1
    reply: int = 48

    def words(self, folder: Path) -> list[str]:
        """Of a run of such steps."""
        batch = self.prompts * self.each
        update = f"episodes: {batch}00000, batch: {batch}, epochs: {self.epochs}, minibatches: 1"
        grouped = [f"algo.responses={self.each}"] if self.algo == "rloo" else []
        return [
            *WORDS, f"paths.runs={folder.resolve() / 'growth'}", f"algo={self.algo}", *grouped,
            "eval.prompts=8", f"algo.update={{{update}}}", f"data.max_response_tokens={self.reply}",
        ]  # fmt: skip

    def contestant(self, name: str, folder: Path) -> Contestant:
        """Its runs, from the beginning."""
        return our_run(name, "online", self.words(folder))


@dataclass(frozen=True)
class Axis:
    """A size that grows."""

    name: str
    sizes: Sequence[int]
    step: Callable[[int], Step]
    goal: str
    met: Callable[[float], bool]


AXES = (
    Axis("prompts", (8, 24, 64), lambda n: Step(prompts=n), "<= 1.1", lambda a: a <= 1.1),
    Axis("responses to a prompt", (2, 4, 8), lambda n: Step(each=n), "<= 1.1", lambda a: a <= 1.1),
    Axis(
        "optimiser steps of a rollout", (1, 3, 8), lambda n: Step("p3o_v2", 16, epochs=n),
        "<= 1.1", lambda a: a <= 1.1,
    ),
    Axis("new tokens", (64, 192, 512), lambda n: Step(reply=n), "< 2", lambda a: a < 2),
)  # fmt: skip


def lines(folder: Path) -> list[Line]:
    """The rows of the table; runs are kept in a folder."""
    return [*(_grown(axis, folder) for axis in AXES), _memory(folder)]


def _grown(axis: Axis, folder: Path) -> Line:
    work, against = f"a step as {axis.name} grow", ", ".join(map(str, axis.sizes))
    steps = {size: axis.step(size) for size in axis.sizes}
    _parents(list(steps.values()), folder)
    names = {size: f"growth-{axis.name.partition(' ')[0]}-{size}" for size in axis.sizes}
    results = race([steps[n].contestant(names[n], folder) for n in axis.sizes], ROUNDS, folder)
    if why := "; ".join(each.failed for each in results if each.failed):
        return missing(work, against, axis.goal, why)
    seconds = {
        size: [sample.seconds for sample in each.samples]
        for size, each in zip(axis.sizes, results, strict=True)
    }
    slope, error = exponent(seconds)
    note = f"exponent of a power law, standard error {error:.2f}"
    if disturbed := sum(each.disturbed for each in results):
        note += f"; {disturbed} samples were disturbed"
    ours = ", ".join(f"{each.seconds:.2f}" for each in results) + " s"
    spread = slope - error, slope + error
    return Line(work, against, ours, "", slope, spread, axis.goal, axis.met(slope), note)


def exponent(seconds: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Of the power law that fits all samples of all sizes best, and its standard error."""
    points = [(math.log(size), math.log(t)) for size, many in seconds.items() for t in many]
    fit = linregress(*zip(*points, strict=True))
    return float(fit.slope), float(fit.stderr)


def _memory(folder: Path) -> Line:
    step = Step(prompts=4)
    _parents([step], folder)
    work, goal = f"memory of {MANY} steps, less libraries and models", f"<= {FLAT}"
    (result,) = race([step.contestant("growth-memory", folder)], MANY - WARM, folder)
    if result.failed:
        return missing(work, f"of {FEW}", goal, result.failed)
    few, many = (result.samples[count - WARM - 1].memory_mb for count in (FEW, MANY))
    ratio = many / few
    note = "at least so many: a disturbed step is taken again"
    return Line(
        work, f"of {FEW}", f"{many:.0f} MB", f"{few:.0f} MB", ratio, None, goal, ratio <= FLAT, note
    )  # fmt: skip


def _parents(steps: Sequence[Step], folder: Path) -> None:
    """Makes what the runs start from, which otherwise all of them would set about at once."""
    for words in ([*step.words(folder), "stage=reward"] for step in steps):
        if any(each.status != "done" for each in plan(compose(words)).steps):
            command = [sys.executable, "-m", "rlhf_cli", "train", *words]
            subprocess.run(command, check=True, capture_output=True)
