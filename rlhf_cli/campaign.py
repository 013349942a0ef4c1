"""Many plans at once: every distinct run of them is built once, each in a process of its own.

A run is begun when those it starts from are done. What is done is left alone, so a campaign that was
interrupted, or of which a part failed, goes on when it is given again.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_cli.config import freeze
from rlhf_cli.errors import StageFailed, UserError
from rlhf_cli.launch import execute
from rlhf_cli.plan import Plan, Step, plan
from rlhf_cli.store.files import disk
from rlhf_cli.store.run import Run

POLL_SECONDS = 0.1
GRACE_SECONDS = 10
"""How long a child has to leave after an interrupt before it is killed."""


@dataclass(frozen=True, eq=False)
class Task:
    """One run that is not done."""

    step: Step
    command: str
    """What the user would type for the chain that it is first needed by."""
    needs: frozenset[str]
    """Keys of the runs that it starts from and that are not done either."""


@dataclass(frozen=True)
class Failure:
    """A run that there is none of at the end."""

    path: Path
    reason: str


@dataclass
class Campaign:
    """How far its tasks have come."""

    tasks: Sequence[Task]
    slots: int
    console: Console
    children: dict[Task, subprocess.Popen[bytes]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    until: float = math.inf
    """By when all has to have ended, on the clock of `time.perf_counter`."""
    spent: float = 0.0
    """Seconds, over all that is done."""

    def run(self) -> None:
        """Build what can be built. An interrupt ends the children before it is passed on."""
        waiting = list(self.tasks)
        try:
            with self._bar() as bar:
                while waiting or self.children:
                    waiting = self._begin(waiting)
                    self._end()
                    self._show(bar)
                    time.sleep(POLL_SECONDS)
        finally:
            _stop(self.children.values())

    def _begin(self, waiting: Sequence[Task]) -> list[Task]:
        """Start what may start; returns what has to wait on, which is nothing once it is too late."""
        mean = self.spent / max(len(self.done), 1)
        if time.perf_counter() + mean > self.until:
            return []
        left = []
        for task in waiting:
            key = task.step.key
            if lost := task.needs & self.failures.keys():
                name = self.failures[min(lost)].path.name
                self.failures[key] = Failure(task.step.path, f"not begun, for want of {name}")
            elif task.needs <= self.done and len(self.children) < self.slots:
                self.children[task] = _child(task, self.slots)
                self.began[key] = time.perf_counter()
            else:
                left.append(task)
        return left

    def _end(self) -> None:
        """Take note of the children that have left."""
        for task, child in list(self.children.items()):
            if child.poll() is None:
                continue
            del self.children[task]
            self._note(task, child.returncode)

    def _note(self, task: Task, code: int) -> None:
        key, path = task.step.key, task.step.path
        seconds = time.perf_counter() - self.began[key]
        if code == 0:
            self.done.add(key)
            self.spent += seconds
            said = f"done {len(self.done)} of {len(self.tasks)}: {path} ({seconds:.0f} s)"
        else:
            self.failures[key] = Failure(path, _last_line(Run(path)))
            said = f"failed: {path}: {self.failures[key].reason}"
        self.console.print(said, soft_wrap=True, markup=False)

    @contextmanager
    def _bar(self) -> Iterator[Progress]:
        """A live bar on a terminal; elsewhere the lines of finished runs have to do."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns,
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600,
        ) as bar:
            bar.add_task("", total=len(self.tasks))
            yield bar

    def _show(self, bar: Progress) -> None:
        done, failed = len(self.done), len(self.failures)
        said = f"{done} done, {len(self.children)} running, {failed} failed of {len(self.tasks)}"
        bar.update(bar.task_ids[0], completed=done + failed, description=said)


def run(
    plans: Mapping[str, Plan], slots: int, console: Console, hours: float | None = None
) -> list[Failure]:
    """Build every run of the plans that is not done, up to `slots` at once; returns what failed.

    plans: by the command that makes each, the first ones first. A failure keeps nothing waiting but what
    starts from it. hours: no run is begun that would end later, going by those that have ended.
    """
    until = math.inf if hours is None else time.perf_counter() + 3600 * hours
    campaign = Campaign(tasks(plans), slots, console, until=until)
    campaign.run()
    return list(campaign.failures.values())


def tasks(plans: Mapping[str, Plan]) -> list[Task]:
    """Every distinct run of the plans that is not done: first those that others start from."""
    found: dict[str, Task] = {}
    for command, each in plans.items():
        missing = {step.key: step for step in each.steps if step.status != "done"}
        for key, step in missing.items():
            needs = missing.keys() & set(step.parents.values())
            found.setdefault(key, Task(step, command, frozenset(needs)))
    needed = frozenset().union(*(task.needs for task in found.values()))
    return sorted(found.values(), key=lambda task: task.step.key not in needed)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _child(task: Task, slots: int) -> subprocess.Popen[bytes]:
    """A process that builds one run, in a session of its own: an interrupt is ours to pass on."""
    run = Run(task.step.path)
    with disk(run.log):
        run.log.mkdir(parents=True, exist_ok=True)
        log = _console(run).open("ab")
    with log:
        child = subprocess.Popen(
            [sys.executable, "-m", "rlhf_cli.campaign", task.command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // slots))},
            start_new_session=True,
        )
    assert child.stdin is not None
    with child.stdin as pipe:
        pipe.write(freeze(task.step.node).encode())
    return child


def _stop(children: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupt children, which then end their own workers; kill those that do not leave."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, sign)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE_SECONDS)


def _console(run: Run) -> Path:
    return run.log / "console.txt"


def _last_line(run: Run) -> str:
    """What a child said last, which is why it failed."""
    lines = _console(run).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return last.removeprefix("error: ")


def main() -> int:
    """A child: builds the one run whose frozen configuration is on stdin."""
    node = OmegaConf.create(sys.stdin.read())
    assert isinstance(node, DictConfig)
    try:
        execute(plan(node), sys.argv[1])
    except KeyboardInterrupt:
        return 130
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
