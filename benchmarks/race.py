"""Contestants that take turns, so that whatever else a machine does hits all of them alike.

A sample that others disturbed is taken again: what matters is how much of the cores was used by anybody but
the contestant meanwhile. What is compared are medians of one race; its seconds mean nothing on another day.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

QUIET = 0.08
"""Share of the cores that others may use while a sample is taken."""
TRIES = 4
"""Of a sample; the quietest counts."""
THREADS = 2
"""Of each contestant."""
WARM = 2
"""Turns of each contestant that do not count."""


@dataclass(frozen=True)
class Contestant:
    """Who takes part."""

    name: str
    call: str
    """MODULE:FUNCTION, as `turns` has it."""
    values: Mapping[str, Any]
    threads: int = THREADS


@dataclass(frozen=True)
class Sample:
    """One turn."""

    seconds: float
    others: float
    """Share of the cores that others used."""
    memory_mb: float
    """Most it has had so far, less libraries and models."""
    parts: Mapping[str, float]


@dataclass
class Result:
    """All turns of one contestant."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    failed: str = ""
    """Why it has no more samples."""

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(each.seconds for each in self.samples)

    @property
    def parts(self) -> dict[str, float]:
        """Medians of its parts."""
        names = dict.fromkeys(name for each in self.samples for name in each.parts)
        return {
            name: statistics.median(each.parts.get(name, 0.0) for each in self.samples)
            for name in names
        }

    @property
    def memory_mb(self) -> float:
        """Most memory it had, less libraries and models."""
        return max(each.memory_mb for each in self.samples)

    @property
    def disturbed(self) -> int:
        """Samples that others disturbed every time they were taken."""
        return sum(each.others > QUIET for each in self.samples)


def spread(above: Sequence[float], below: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The ratio of two medians, and the least and the greatest ratio of a round."""
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return statistics.median(above) / statistics.median(below), (min(rounds), max(rounds))


def race(
    contestants: Sequence[Contestant],
    rounds: int,
    folder: Path,
    told: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Have all of them take so many turns; folder: where each says what it has to say.

    told: hears who took a turn. Who fails leaves the race, and its result says why.
    """
    results = [Result(each.name) for each in contestants]
    with ExitStack() as stack:
        # Who is told to end takes the contestants along.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _leave))
        runners = [stack.enter_context(_running(each, folder)) for each in contestants]
        for number in range(WARM + rounds):
            order = range(len(runners)) if number % 2 else reversed(range(len(runners)))
            for place in order:
                if results[place].failed:
                    continue
                try:
                    sample = _sample(runners[place], 1 if number < WARM else TRIES)
                except Gone as gone:
                    last = (folder / f"{results[place].name}.txt").read_text().strip()
                    results[place].failed = f"{gone}: {last.splitlines()[-1] if last else ''}"
                    continue
                if number >= WARM:
                    results[place].samples.append(sample)
                told(results[place].name)
    return results


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


class Gone(Exception):
    """A contestant's process has ended."""


@contextmanager
def _running(contestant: Contestant, folder: Path) -> Iterator[subprocess.Popen[str]]:
    values = folder / f"{contestant.name}.json"
    values.write_text(json.dumps(contestant.values))
    with (folder / f"{contestant.name}.txt").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.turns", contestant.call, str(values)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(contestant.threads), "WANDB_MODE": "disabled"},
        )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.communicate()  # closes its pipes as well


def _sample(child: subprocess.Popen[str], tries: int) -> Sample:
    """The quietest of so many turns, or the first that is quiet."""
    found = []
    for _ in range(tries):
        found.append(_turn(child))
        if found[-1].others <= QUIET:
            break
    return min(found, key=lambda each: each.others)


def _turn(child: subprocess.Popen[str]) -> Sample:
    assert child.stdin is not None and child.stdout is not None
    before, began = all_busy(), time.perf_counter()
    line = ""
    with suppress(BrokenPipeError):
        child.stdin.write("go\n")
        child.stdin.flush()
        line = child.stdout.readline()
    if not line:
        raise Gone(f"ended with code {child.wait()}")
    said = json.loads(line)
    spent = (time.perf_counter() - began) * (os.cpu_count() or 1)
    others = max(0.0, all_busy() - before - said["busy"]) / spent
    return Sample(said["seconds"], others, said["memory_mb"], said["parts"])


def all_busy() -> float:
    """Seconds of all cores that anybody has had."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - spent.iowait - getattr(spent, "guest", 0.0))
