"""Progress of a stage: a live bar on a terminal, a line now and then in a pipe or a scheduler's log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

from rlhf_cli.printable import visible

LINES = 8
"""Lines a stage prints where there is no terminal."""


class Progress:
    """Shows one stage's steps; silent in every process but the main one."""

    def __init__(self, title: str, enabled: bool) -> None:
        self.title, self.enabled = title, enabled
        self.console = Console(highlight=False)
        self.total = 1
        self._bar: Bar | None = None
        self._began = time.perf_counter()
        self._first = 0
        self._shown = 0
        self._note = ""

    def __enter__(self) -> Progress:
        if self.enabled and self.console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, note="loading")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, done: int = 0) -> None:
        """Begins to count `total` steps, `done` of them by an earlier segment."""
        self.total, self._first, self._began = total, done, time.perf_counter()
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done, note="")

    def at(self, step: int, note: str = "") -> None:
        """Moves to `step`; `note` says in a few words how it goes."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note or self._note)
            self._note = note or self._note
        elif self.enabled and (
            step * LINES // self.total > self._shown or (step == self.total and self._shown < LINES)
        ):
            self._shown = step * LINES // self.total
            spent = time.perf_counter() - self._began
            left = spent / max(step - self._first, 1) * (self.total - step)
            self.console.print(
                f"{self.title}  {step}/{self.total}  {note}  about {left:.0f} s left",
                soft_wrap=True,
            )

    def warn(self, sentence: str) -> None:
        """Says something that must not be missed, above the bar."""
        if self.enabled:
            said = visible(f"{self.title}  warning: {sentence}")
            self.console.print(said, soft_wrap=True, markup=False)
