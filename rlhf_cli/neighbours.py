"""How threads wait for each other: by how much of the machine others use, settled before torch is loaded.

A thread that spins while it waits is at hand at once, and takes a core meanwhile. On idle cores that makes
drawing 1.6 to 1.8 times as quick as threads that sleep; with another busy process on two cores, 2.7 times as
slow (docs/log.md).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import psutil

CHOSEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
"""By any of these a user has chosen."""
BUSY = 0.25
"""Cores that others may use beyond those that no thread of ours is to have."""
LEAST = 0.2
"""Seconds to look for at least."""


@dataclass(frozen=True)
class Moment:
    """Seconds so far: on the clock, of the cores by anybody, of the cores by this process."""

    clock: float
    all: float
    own: float

    @staticmethod
    def now() -> Moment:
        """Of the cores that this process may use."""
        each = psutil.cpu_times(percpu=True)
        mine = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
        used = [each[i] for i in mine if i < len(each)] if mine else each
        spent = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) for core in used)
        return Moment(time.monotonic(), spent, time.process_time())

    def others(self, later: Moment) -> float:
        """Cores that others have used on average from here to a later moment."""
        spent = later.all - self.all - (later.own - self.own)
        return max(0.0, spent) / (later.clock - self.clock)


@cache
def first() -> Moment:
    """When it was asked for first: the longer ago, the better is known what others do."""
    return Moment.now()


def settle() -> None:
    """Has threads that torch will start sleep while they wait if others need the cores."""
    if CHOSEN & os.environ.keys() or "torch" in sys.modules:
        return
    time.sleep(max(0.0, first().clock + LEAST - time.monotonic()))
    if crowded(first().others(Moment.now()), len(os.sched_getaffinity(0)), os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def crowded(others: float, cores: int, environment: Mapping[str, str]) -> bool:
    """Whether others, using so many of the cores, leave too few for our threads."""
    said = environment.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(said) if said.isdecimal() else cores
    return threads > 1 and others > max(0, cores - threads) + BUSY
