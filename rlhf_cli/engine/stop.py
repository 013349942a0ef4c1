"""Whether a run is asked to stop: by a signal, by whoever launched it, or by the clock.

The loops ask between two steps; what they answer is the same in every process. The first signal asks, the
second one is obeyed at once, as if nobody had listened for the first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only listens for signals needs no DeepSpeed
    from rlhf_cli.engine.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what schedulers are told to send ahead of time."""
DEADLINE = "RLHF_DEADLINE"
"""Variable of the environment: when to stop, by this machine's monotonic clock, which nobody sets."""


@contextmanager
def first_signal(hear: Callable[[signal.Signals], None], tell: bool) -> Iterator[None]:
    """Hands the first of each of `SIGNALS` to `hear` and, if `tell`, says so; the second is obeyed.

    Only the main thread of a process can listen.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        heard = signal.Signals(number)
        signal.signal(heard, before[heard])
        hear(heard)
        if tell:
            print(
                f"\n{heard.name}: stopping after this step; again to leave at once", file=sys.stderr
            )

    before: dict[signal.Signals, Any] = {each: signal.signal(each, ask) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Stop:
    """What a run's loops ask."""

    def __init__(self, world: World, file: Path) -> None:
        self._world, self._file = world, file
        self._heard: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Takes a signal for the wish to stop as long as this is entered."""
        with first_signal(self._hear, tell=self._world.is_main):
            yield self

    def _hear(self, heard: signal.Signals) -> None:
        self._heard = heard
        with suppress(
            OSError
        ):  # stays for whoever launched this, should the run end before it asks again
            self._file.touch()

    def asked(self) -> str:
        """Why, in a word; empty if nobody asks. All processes must call it together."""
        main = self._world.is_main
        reasons = {
            **{each.name: self._heard is each for each in SIGNALS},
            "its launcher": main and self._file.exists(),
            "train.max_hours": main and time.monotonic() > float(os.environ.get(DEADLINE, "inf")),
        }
        agreed = self._world.sum({name: float(asks) for name, asks in reasons.items()})
        return next((name for name, asks in agreed.items() if asks), "")
