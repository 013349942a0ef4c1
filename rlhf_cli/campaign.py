"""Many plans at once: every distinct run of them is built once, each in a process of its own.

A run is begun when those it starts from are done. What is done is left alone, so a campaign that was
interrupted, or of which a part failed, goes on when it is given again. Who builds is a `Crew`: the slots of
this machine, or a scheduler.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf_cli import neighbours
from rlhf_cli.config import freeze
from rlhf_cli.errors import GO_ON, StageFailed, Stopped, UserError
from rlhf_cli.launch import execute, set_deadline
from rlhf_cli.plan import Plan, Step, plan
from rlhf_cli.store.files import disk
from rlhf_cli.store.run import Run

POLL_SECONDS = 0.1
GRACE_SECONDS = 10
"""How long a child has to leave after an interrupt before it is killed."""
PARENT = "RLHF_PARENT"
"""Variable of the environment: whom a child ends with, as `worker.end_with_driver` reads it."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
PRELOADED = ["rlhf_cli.campaign", "rlhf_cli.worker", "rlhf_cli.stages.rl", "rlhf_cli.stages.reward"]
"""What is loaded once for all children, which is most of what a small run takes to begin."""
AGAIN = "give the same command again to go on."


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


class Job(Protocol):
    """A task that was begun."""

    def poll(self) -> int | None:
        """Its exit code; None as long as it runs."""


class Process(Job, Protocol):
    """One on this machine, at the head of a group of its own."""

    @property
    def pid(self) -> int:
        """Its number."""

    def terminate(self) -> None:
        """Send it SIGTERM."""

    def wait(self, timeout: float | None = None) -> object:
        """Wait for its end; raises subprocess.TimeoutExpired."""


class Crew(Protocol):
    """Who builds the runs."""

    early: bool
    """Whether it takes a task before those that it needs are done, and has it wait for them."""

    def begin(self, task: Task, after: Sequence[Job]) -> Job | None:
        """Begin a task, the jobs it needs being these; None if there is no room for it yet."""

    def ask(self, jobs: Mapping[Task, Job]) -> None:
        """Ask jobs to stop between two steps."""

    def end(self, jobs: Iterable[Job]) -> None:
        """See to it that none is left."""


@dataclass
class Slots:
    """Processes of this machine: so many at once, each with its share of the cores or GPUs of its own."""

    count: int
    devices: Sequence[str]
    """GPUs to be shared out; empty is a machine without."""
    leases: dict[Job, Sequence[str]] = field(default_factory=dict)
    """GPUs of each child that was begun."""
    early = False

    def begin(self, task: Task, after: Sequence[Job]) -> Job | None:
        """As many GPUs as the run has processes; raises UserError if there will never be so many."""
        launch = task.step.recipe.launch
        wanted = launch.processes if self.devices else 0
        if wanted > len(self.devices):
            raise UserError(
                f"launch.processes={wanted} takes {wanted} GPUs for one run, but there are"
                f" {len(self.devices)} ({VISIBLE}={','.join(self.devices)}); lower launch.processes, or"
                " show more of them."
            )
        self.leases = {job: gpus for job, gpus in self.leases.items() if job.poll() is None}
        taken = set(chain(*self.leases.values()))
        free = [gpu for gpu in self.devices if gpu not in taken]
        if len(self.leases) >= self.count or len(free) < wanted:
            return None
        share = {"OMP_NUM_THREADS": str(max(1, cores() // (self.count * launch.processes)))}
        if self.devices:
            share[VISIBLE] = ",".join(free[:wanted])
        child = _child(task, share)
        self.leases[child] = free[:wanted]
        return child

    def ask(self, jobs: Mapping[Task, Job]) -> None:
        """Pass a signal on, which a child takes for the wish to stop."""
        for child in jobs.values():
            cast(Process, child).terminate()

    def end(self, jobs: Iterable[Job]) -> None:
        """Interrupt the children, then kill those that do not leave."""
        _stop([cast(Process, child) for child in jobs])


def nobody() -> Collection[str]:
    """No key."""
    return ()


@dataclass
class Campaign:
    """How far its tasks have come."""

    tasks: Sequence[Task]
    crew: Crew
    console: Console
    unwanted: Callable[[], Collection[str]] = nobody
    """Keys of runs that were called off meanwhile: they are not begun."""
    children: dict[Task, Job] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    failures: dict[str, Failure] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    """Keys of runs that were asked to stop, and go on when they are given again."""
    began: dict[str, float] = field(default_factory=dict)
    stopping: bool = False
    until: float = math.inf
    """By when all has to have ended, on the clock of `time.perf_counter`."""
    spent: float = 0.0
    """Seconds, over all that is done."""

    def run(self) -> None:
        """Build what can be built; the first signal asks the children to stop, the second one ends them."""
        from rlhf_cli.engine.stop import first_signal

        waiting = list(self.tasks)
        try:
            with self._bar() as bar, first_signal(lambda _: self._stop(), tell=True):
                while waiting or self.children:
                    waiting = [] if self.stopping else self._begin(waiting)
                    self._end()
                    self._show(bar)
                    time.sleep(POLL_SECONDS)
        finally:
            self.crew.end(self.children.values())

    def _stop(self) -> None:
        self.stopping = True
        self.crew.ask(self.children)

    def _begin(self, waiting: Sequence[Task]) -> list[Task]:
        """Start what may start; returns what has to wait on, which is nothing once it is too late."""
        mean = self.spent / max(len(self.done), 1)
        if time.perf_counter() + mean > self.until:
            return []
        left, unwanted = [], self.unwanted()
        for task in waiting:
            key = task.step.key
            if key in unwanted:
                continue
            if reason := self._lost(task):
                self.failures[key] = Failure(task.step.path, reason)
                continue
            begun = {each.step.key: job for each, job in self.children.items()}
            ready = self.done | begun.keys() if self.crew.early else self.done
            after = [begun[key] for key in sorted(task.needs & begun.keys())]
            job = self.crew.begin(task, after) if task.needs <= ready else None
            if job is None:
                left.append(task)
            else:
                self.children[task] = job
                self.began[key] = time.perf_counter()
        return left

    def _end(self) -> None:
        """Take note of the children that have left."""
        for task, child in list(self.children.items()):
            code = child.poll()
            if code is not None:
                del self.children[task]
                self._note(task, code)

    def _note(self, task: Task, code: int) -> None:
        key, path = task.step.key, task.step.path
        seconds = time.perf_counter() - self.began[key]
        if code == 0:
            self.done.add(key)
            self.spent += seconds
            said = f"done {len(self.done)} of {len(self.tasks)}: {path} ({seconds:.0f} s)"
        elif code == GO_ON or self.stopping:  # some had not begun to listen
            self.stopped.add(key)
            self.stopping = True  # the rest too: who asked meant the command
            said = f"stopped: {path}"
        else:
            self.failures[key] = Failure(path, self._lost(task) or last_line(Run(path)))
            said = f"failed: {path}: {self.failures[key].reason}"
        self.console.print(said, soft_wrap=True, markup=False)

    def _lost(self, task: Task) -> str:
        """Why a run cannot be begun, if one that it needs has failed."""
        lost = task.needs & self.failures.keys()
        return f"not begun, for want of {self.failures[min(lost)].path.name}" if lost else ""

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
    Raises Stopped if that was asked for.
    """
    until = math.inf if hours is None else time.perf_counter() + 3600 * hours
    crew = Slots(slots, visible_devices())
    campaign = Campaign(tasks(plans), crew, console, until=until)
    campaign.run()
    if campaign.stopping:
        raise Stopped(f"{len(campaign.done)} of {len(campaign.tasks)} runs are done; {AGAIN}")
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


def visible_devices() -> list[str]:
    """The GPUs this process may use: those that CUDA_VISIBLE_DEVICES names, or else all there are."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _child(task: Task, share: Mapping[str, str]) -> Process:
    return child(Run(task.step.path), freeze(task.step.node), task.command, share)


@dataclass(frozen=True, eq=False)
class Child:
    """A process that builds one run."""

    process: BaseProcess

    @property
    def pid(self) -> int:
        """Its number."""
        return cast(int, self.process.pid)

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None as long as it runs."""
        return self.process.exitcode

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.process.terminate()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("a run", timeout or 0.0)

    def lasts(self) -> None:
        """Wait for its end, unnoted: for a handler, whose signal may have come during `poll`."""
        connection.wait([self.process.sentinel])


def child(run: Run, config: str, command: str, share: Mapping[str, str], node: int = 0) -> Child:
    """A process that builds one run, in a session of its own: a signal is ours to pass on.

    It is forked from one that has loaded what every run needs and has done nothing else.
    config: frozen; share: what of the environment is its own; node: the rank of this host among the run's.
    """
    with disk(run.log):
        run.log.mkdir(parents=True, exist_ok=True)
        _console(run, node).touch()
    load_ahead()
    environment = {**os.environ, **share, PARENT: f"{socket.gethostname()} {os.getpid()}"}
    process = multiprocessing.get_context("forkserver").Process(
        target=_begin,
        args=(config, command, str(_console(run, node).absolute()), environment, os.getcwd()),
    )
    process.start()
    return Child(process)


def load_ahead() -> None:
    """Have that process begin to load, which takes seconds, while this one goes on."""
    neighbours.settle()
    # Has torch count GPUs without touching them, after which a forked process could not use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    forkserver.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def _begin(
    config: str, command: str, console: str, environment: Mapping[str, str], folder: str
) -> None:
    """What a child does first: become one of its own, in its own folder and environment."""
    os.setsid()
    said = os.open(console, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    # It has read the variable already, as it was then.
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", cores())))
    sys.exit(build(config, command))


def _stop(children: Iterable[Process]) -> None:
    """Interrupt children, which then end their own workers; kill those that do not leave."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, sign)
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=GRACE_SECONDS)


def _console(run: Run, node: int = 0) -> Path:
    return run.log / (f"console_{node}.txt" if node else "console.txt")


def last_line(run: Run) -> str:
    """What a child said last, which is why it failed."""
    return (_said(run) or "it said nothing").removeprefix("error: ")


def refusal(run: Run) -> str:
    """Why a child would not even begin the run; "" if it did not say so last."""
    said = _said(run)
    return said.removeprefix("error: ") if said.startswith("error: ") else ""


def _said(run: Run) -> str:
    try:
        lines = _console(run).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:  # of a scheduler's job that did not begin
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


def build(config: str, command: str) -> int:
    """Build the one run of a frozen configuration, and end with whom the environment names; the exit code."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's, whose own process hears it for us
    node = OmegaConf.create(config)
    assert isinstance(node, DictConfig)
    try:
        from rlhf_cli.worker import end_with_driver

        end_with_driver(os.environ[PARENT])
        found = plan(node)
        set_deadline([found])
        execute(found, command)
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return GO_ON
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
