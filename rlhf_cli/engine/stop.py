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
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rlhf_cli.engine.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what schedulers are told to send ahead of time."""
DEADLINE = "RLHF_DEADLINE"
"""Variable of the environment: seconds since the epoch after which to stop."""


class Stop:
    """Listens while it is entered."""

    def __init__(self, world: World, file: Path) -> None:
        self._world, self._file = world, file
        self._heard: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._hear) for each in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number)
        signal.signal(number, self._before[self._heard])
        if self._world.is_main:
            print(
                f"\n{self._heard.name}: stopping after this step; again to leave at once",
                file=sys.stderr,
            )

    def asked(self) -> str:
        """Why, in a word; empty if nobody asks. All processes must call it together."""
        main = self._world.is_main
        reasons = {
            **{each.name: self._heard is each for each in SIGNALS},
            "its launcher": main and self._file.exists(),
            "train.max_hours": main and time.time() > float(os.environ.get(DEADLINE, "inf")),
        }
        agreed = self._world.sum({name: float(asks) for name, asks in reasons.items()})
        return next((name for name, asks in agreed.items() if asks), "")
