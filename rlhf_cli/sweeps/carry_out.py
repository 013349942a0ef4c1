"""Who carries a sweep out, one job after the other or many at once, and what is said at its end."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_cli import launch
from rlhf_cli.campaign import (
    AGAIN,
    Campaign,
    Crew,
    Failure,
    Slots,
    cores,
    tasks,
    visible_devices,
)
from rlhf_cli.errors import GO_ON, StageFailed, Stopped, UserError
from rlhf_cli.plan import Plan, check_downloads, plan
from rlhf_cli.printable import told, visible
from rlhf_cli.store.run import Run
from rlhf_cli.sweeps import index, search
from rlhf_cli.sweeps.index import Job, Sweep
from rlhf_cli.sweeps.standing import Standing, page, standings
from rlhf_cli.words import Line, flags


@dataclass(frozen=True)
class Outcome:
    """What came of a sweep in this command."""

    sweep: Sweep
    failures: Sequence[Failure]
    cancelled: int
    """Jobs that were called off and are not done."""


def run(
    jobs: Sequence[tuple[Sequence[str], Plan]], line: Line, command: str, console: Console
) -> Outcome:
    """Write down what a command means, and build what is missing of it.

    jobs: each by its words; of a search the first alone. Raises Stopped, and KeyboardInterrupt, with nothing
    left running.
    """
    plans = [each for _, each in jobs]
    for each in plans:
        check_downloads(each)
    if line.sweeper is not None:
        return _seek(index.study(plans[0], search.of(line), command, line.launcher), console)
    more = flags(line.words)
    sweep = index.grid([((*more, *words), each) for words, each in jobs], command, line.launcher)
    return _run(sweep, plans, console)


def retry(sweep: Sweep, console: Console) -> Outcome:
    """Take up what failed, is missing or was called off, as its index has it. Raises as `run` does."""
    for job in sweep.jobs:
        sweep.marker(job).unlink(missing_ok=True)
    if sweep.search is not None:
        return _seek(sweep, console, again=True)
    return _run(sweep, [sweep.plan(job) for job in sweep.jobs], console)


def _run(sweep: Sweep, plans: Sequence[Plan], console: Console) -> Outcome:
    """plans: of its jobs, in their order."""
    if not sweep.launcher["kind"].startswith("submitit"):  # whose jobs have clocks of their own
        launch.set_deadline(plans)
    pairs = list(zip(sweep.jobs, plans, strict=True))
    crew = _crew(sweep, pairs)
    by = _at_once(sweep, pairs, crew, console) if crew else _one_by_one(sweep, pairs)
    return Outcome(sweep, by, sum(each.state == "cancelled" for each in standings(sweep)))


def _seek(sweep: Sweep, console: Console, again: bool = False) -> Outcome:
    """Trial after trial, as many at once as there are slots; again: those that failed are run once more."""
    assert sweep.search is not None
    failures: list[Failure] = []
    while True:
        found = standings(sweep)
        ended = {"done"} if again else {"done", "failed"}
        lost = {one.path for one in failures}
        left = [e.job for e in found if e.state not in ended and e.run.path not in lost]
        cancelled = sum(each.state == "cancelled" for each in found)
        wanted = sweep.search.trials - len(sweep.jobs)
        if cancelled or (not left and wanted <= 0):
            return Outcome(sweep, failures, cancelled)
        if left:
            plans = [sweep.plan(job) for job in left]
            failures += _run(replace(sweep, jobs=tuple(left)), plans, console).failures
            continue
        for _ in range(min(wanted, _width(sweep))):
            words, values, node = search.ask(sweep.search, standings(sweep))
            sweep = index.added(sweep, words, plan(node), values)


def _crew(sweep: Sweep, pairs: Sequence[tuple[Job, Plan]]) -> Crew | None:
    """Who builds, by what the command said; None is this process alone."""
    slots = _slots(sweep.launcher, pairs[0][1])
    if sweep.launcher["kind"].startswith("submitit"):
        from rlhf_cli.sweeps.submit import Scheduler

        markers: dict[str, list[Path]] = {}
        for job, each in pairs:
            for step in each.steps:
                markers.setdefault(step.key, []).append(sweep.marker(job))
        return Scheduler(sweep.launcher, sweep.path / "submitit", slots or cores(), markers)
    return None if slots is None else Slots(slots, visible_devices())


def _slots(launcher: Mapping[str, Any], first: Plan) -> int | None:
    """Runs at once: launch.slots, or what the launcher says of it; None is one after the other."""
    count: int | None = first.recipe.launch.slots or launcher.get("array_parallelism")
    if launcher["kind"] != "joblib" or count:
        return count
    jobs: int = launcher["n_jobs"]
    if jobs == 0:
        raise UserError(
            "hydra.launcher.n_jobs=0 is not allowed: give how many runs at once, or -1 for all cores."
        )
    return jobs if jobs > 0 else max(1, cores() + 1 + jobs)


def _width(sweep: Sweep) -> int:
    """Trials that are chosen at once."""
    assert sweep.search is not None
    return _slots(sweep.launcher, plan(search.ask(sweep.search, [])[2])) or 1


def _unwanted(sweep: Sweep, pairs: Sequence[tuple[Job, Plan]]) -> Callable[[], Collection[str]]:
    """What to ask for the keys of runs that only jobs which were called off would need."""

    def look() -> Collection[str]:
        keys: dict[bool, set[str]] = {True: set(), False: set()}
        for job, each in pairs:
            keys[sweep.marker(job).exists()] |= {step.key for step in each.steps}
        return keys[True] - keys[False]

    return look


def _at_once(
    sweep: Sweep, pairs: Sequence[tuple[Job, Plan]], crew: Crew, console: Console
) -> list[Failure]:
    plans = {job.command: each for job, each in pairs}
    campaign = Campaign(tasks(plans), crew, console, _unwanted(sweep, pairs))
    campaign.run()
    left = [job for job, _ in pairs if sweep.run(job).status() != "done"]
    if campaign.stopping and not all(sweep.marker(job).exists() for job in left):
        raise Stopped(f"{len(campaign.done)} of {len(campaign.tasks)} runs are done; {AGAIN}")
    return list(campaign.failures.values())


def _one_by_one(sweep: Sweep, pairs: Sequence[tuple[Job, Plan]]) -> list[Failure]:
    """In this process; the others go on when one of them fails."""
    failures = []
    for job, each in pairs:
        if sweep.marker(job).exists():
            continue
        path = each.steps[-1].path
        try:
            launch.execute(each, sweep.command)
        except Stopped:  # the rest too: who asked meant the command
            if sweep.marker(job).exists():
                continue
            raise
        except Exception as error:
            said = str(error)
            if not isinstance(error, (UserError, StageFailed)):
                traceback.print_exc()  # a fault of ours says where it was
                said = f"{type(error).__name__}: {error}"
            failures.append(Failure(path, said))
            print(f"error: {told(said)}", file=sys.stderr)
            continue
        print(visible(f"run: {path}"))
    return failures


def end(outcome: Outcome, command: str, console: Console) -> int:
    """Say what came of a sweep, draw its frontier beside its index; returns the exit code."""
    sweep, failures = outcome.sweep, outcome.failures
    found = standings(sweep)
    console.print()
    console.print(page(sweep, found))
    if sweep.search is not None and (best := search.best(sweep.search, found)):
        print(visible(f"best: {best[1]:.4g} at {' '.join(best[0].words)}"))
    for line in _drawn(sweep, found, command):
        print(visible(line))
    if not failures and not outcome.cancelled:
        print("next: rlhf frontier, rlhf compare, rlhf runs")
        return 0
    print(f"next: rlhf sweep retry {sweep.key}, rlhf sweep status {sweep.key}")
    if not failures:
        return GO_ON
    print(f"error: {len(failures)} of {len(sweep.jobs)} runs failed:", file=sys.stderr)
    for one in failures:
        print(f"  {one.path}: {told(one.reason)}", file=sys.stderr)
    return 1


def _drawn(sweep: Sweep, found: Sequence[Standing], command: str) -> Iterator[str]:
    """The files of the frontier, or why there is none; nothing if no RL run is done."""
    from rlhf_cli.figures.frontier import frontier

    runs = {each.job.key: each.run for each in found if each.state == "done"}
    trained = [run for run in runs.values() if run.stage == "rl"]
    if not trained:
        return
    try:
        files = frontier(trained, sweep.path / "frontier", command)
    except UserError as error:  # measured differently, on purpose perhaps
        yield f"no frontier: {error}"
        return
    yield f"figure: {files['png']}"
    yield f"csv: {files['csv']}"


def cancel(sweep: Sweep) -> tuple[int, int]:
    """Call off what is not done: how many jobs that are, and how many runs were asked to stop for it."""
    left = [each.job for each in standings(sweep) if each.state != "done"]
    for job in left:
        sweep.marker(job).touch()
    runs = {at: Run(sweep.runs / at) for job in left for at in job.chain}
    running = [run for run in runs.values() if run.status() == "running"]
    for run in running:
        run.stop_request.touch()
    return len({job.key for job in left}), len(running)
