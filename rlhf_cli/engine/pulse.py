"""Signs of life: what a process does now, and a watch that ends it when it does nothing for too long.

One process that hangs makes all others wait for it. Each watches itself alone: whoever has not moved for the
time allowed leaves its stack and its last step in the run's log and ends, and with it ends the job. Loops
call `beat`; work that may rightly take long without a loop (loading, writing, asking a server that has a
limit of its own) calls `rest` first.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

LOOK_SECONDS = 5.0
"""Between two looks at the clock."""
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
"""Where nobody looks for the place in which a process hangs."""
WORD_SECONDS = 5.0
"""How long a process that gives up leaves the others to say where they stand."""


@dataclass
class Life:
    """What is known of one process of a run."""

    step: int = 0
    """Optimiser steps it has taken part in."""
    stuck: str = ""
    """Where it stood still, if it did."""
    waiting: bool = False
    """Whether it then waited for the other processes."""
    ended: str = ""
    """The exception that it ended with."""
    finished: bool = False
    """Whether it came to the end of its stage."""


class _Watch:
    """One per process: the file it writes, and when it was last seen to move."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.life = Life()
        self.patience = self.moved = math.inf

    def write(self) -> None:
        if self.file is not None:
            fresh = self.file.with_suffix(".part")
            try:
                fresh.write_text(json.dumps(asdict(self.life)))
                os.replace(fresh, self.file)
            except OSError:  # a full disk has a sentence of its own
                fresh.unlink(missing_ok=True)


_watch = _Watch()


def beat(step: int | None = None) -> None:
    """Says that this process moves; step: optimiser steps so far, if one was just taken."""
    _watch.moved = time.monotonic()
    if step is not None:
        _watch.life.step = step
        _watch.write()


def rest() -> None:
    """Stops the clock until the next `beat`."""
    _watch.moved = math.inf


@contextmanager
def watched(log: Path, rank: int, patience: float, alone: bool) -> Iterator[None]:
    """Watches this process until it is left.

    patience: seconds without a `beat`. alone: there is no launcher to tell the user, so that is done here.
    """
    file = log / f"rank_{rank}.json"
    _watch.file, _watch.life, _watch.patience = file, Life(), patience
    rest()
    _watch.write()
    left = threading.Event()
    thread = threading.Thread(target=_look, args=(left, log / f"rank_{rank}.stack", alone))
    thread.daemon = True
    thread.start()
    try:
        yield
        _watch.life.finished = True
        _watch.write()
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        _watch.life.ended = f"{type(error).__name__}: {first}"
        _watch.write()
        raise
    finally:
        rest()
        left.set()
        _watch.file = None


def _look(left: threading.Event, stack: Path, alone: bool) -> None:
    before = time.monotonic()
    while not left.wait(min(LOOK_SECONDS, _watch.patience / 4)):
        now = time.monotonic()
        if now - before > 2 * LOOK_SECONDS and _watch.moved < math.inf:
            _watch.moved = now  # the process itself was stopped, as a laptop's that sleeps
        before = now
        if now - _watch.moved > _watch.patience:
            _give_up(stack, alone)


def _give_up(stack: Path, alone: bool) -> None:
    with stack.open("w") as file:
        faulthandler.dump_traceback(file)
    frames = traceback.extract_stack(_main_frame())
    inner = next((f for f in reversed(frames) if not f.filename.startswith(LIBRARIES)), frames[-1])
    _watch.life.stuck = f"{inner.name} ({Path(inner.filename).name}:{inner.lineno})"
    _watch.life.waiting = any("torch/distributed" in each.filename for each in frames)
    _watch.write()
    if alone:
        print(f"\nerror: {stuck(_watch.life, 0, _watch.patience)}; stack: {stack}", file=sys.stderr)
    else:
        time.sleep(WORD_SECONDS)
    os._exit(1)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def lives(log: Path) -> dict[int, Life]:
    """By rank, what the processes of a run have left in its log."""
    return {
        int(file.stem.partition("_")[2]): Life(**json.loads(file.read_text()))
        for file in sorted(log.glob("rank_*.json"))
    }


def forget(log: Path) -> None:
    """Removes what processes of an earlier segment have left."""
    for file in (*log.glob("rank_*.json"), *log.glob("rank_*.stack")):
        file.unlink()


def stuck(life: Life, rank: int, patience: float) -> str:
    """Where a process stood still, in words."""
    return (
        f"rank {rank} made no progress for {patience:g} s after step {life.step}, in {life.stuck}"
    )


def verdict(found: dict[int, Life], patience: float) -> str:
    """Which process brought the others down, and how, as far as it can be told."""
    still = {rank: life for rank, life in found.items() if life.stuck}
    # Whoever waits for others is no culprit unless nobody else is left.
    for rank, life in sorted(still.items(), key=lambda each: each[1].waiting):
        silent = [other for other in found if other not in still and not found[other].ended]
        if life.waiting and silent:
            return (
                f"rank {silent[0]} gave no sign for {patience:g} s after step {found[silent[0]].step} and"
                f" is not to be asked (stopped, or cut off); rank {rank} waited for it in {life.stuck}"
            )
        return stuck(life, rank, patience)
    for rank, life in found.items():
        if not life.ended and not life.finished:
            return (
                f"rank {rank} was killed after step {life.step}, from outside or by the system for want of"
                " memory (then launch.micro_batch must be lower)"
            )
    for rank, life in found.items():
        if life.ended:
            return f"rank {rank} ended after step {life.step} with {life.ended}"
    return "not all processes came to their work"
