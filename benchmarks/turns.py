"""The contestant's side of a race: a process that does one step whenever it is its turn.

    python -m benchmarks.turns MODULE:FUNCTION FILE

calls FUNCTION(turns, **VALUES) with the values of that file, which prepares and then does one step per turn.
The race writes a line for each turn, and hears what it took in a line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import psutil


class Over(Exception):
    """There are no more turns."""


class Turns:
    """Turns as they come."""

    def __init__(self, asked: TextIO, told: TextIO) -> None:
        self._asked, self._told = asked, told
        self._begun = (0.0, 0.0)
        self.parts: dict[str, float] = {}
        """Seconds by part of the step, for whoever notes them."""
        self._loaded_mb: float | None = None

    def loaded(self) -> None:
        """What is in memory now, libraries and models, does not count as memory of the training.

        To be said before the first computation: what that leaves behind in the process counts.
        """
        self._loaded_mb = psutil.Process().memory_info().rss / 2**20

    def begin(self) -> None:
        """Wait for the next turn; raises Over if there is none."""
        if self._loaded_mb is None:
            self.loaded()
        if not self._asked.readline().strip():
            raise Over
        self.parts = {}
        self._begun = (time.perf_counter(), _busy())

    def end(self) -> None:
        """Tell what the turn took."""
        wall, busy = time.perf_counter() - self._begun[0], _busy() - self._begun[1]
        memory = peak() - (self._loaded_mb or 0.0)
        said = {"seconds": wall, "busy": busy, "memory_mb": memory, "parts": self.parts}
        self._told.write(json.dumps(said) + "\n")
        self._told.flush()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One of them."""
        self.begin()
        yield
        self.end()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step, which is added up under its name."""
        began = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began


def peak() -> float:
    """Most memory this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _busy() -> float:
    """Seconds of all cores that this process has had."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return spent.ru_utime + spent.ru_stime


def main(name: str, file: str) -> None:
    """Entry point of a contestant."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not ours to say
    module, _, function = name.partition(":")
    given: dict[str, Any] = json.loads(Path(file).read_text())
    with suppress(Over):
        getattr(import_module(module), function)(Turns(sys.stdin, told), **given)


if __name__ == "__main__":
    main(*sys.argv[1:])
