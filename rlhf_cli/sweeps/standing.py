"""How far a sweep came, by what its runs say: nothing of it is kept anywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_cli.campaign import refusal
from rlhf_cli.listing import LATEST
from rlhf_cli.printable import on_one_line
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from rlhf_cli.sweeps.index import Job, Sweep

State = Literal["done", "running", "failed", "stopped", "interrupted", "missing", "cancelled"]
ORDER: tuple[State, ...] = (
    "done",
    "running",
    "failed",
    "stopped",
    "interrupted",
    "missing",
    "cancelled",
)
"""In which states are counted."""


@dataclass(frozen=True)
class Standing:
    """How far one job came."""

    job: Job
    run: Run
    state: State
    reason: str
    """Why it failed or stopped; "" otherwise."""
    last: dict[str, float]
    """Metrics of its last evaluation."""
    seconds: float | None
    """Spent in its own run, over all segments; None before its first row of metrics."""


def standings(sweep: Sweep) -> list[Standing]:
    """All jobs in their order. Raises UserError if a manifest is damaged."""
    return [_standing(sweep, job) for job in sweep.jobs]


def _standing(sweep: Sweep, job: Job) -> Standing:
    run = sweep.run(job)
    state, reason = _state(sweep, job)
    rows = read(run.metrics_path)
    last = next((row for row in reversed(rows) if any(name in row for name in LATEST)), {})
    return Standing(job, run, state, reason, last, rows[-1].get("wall") if rows else None)


def _state(sweep: Sweep, job: Job) -> tuple[State, str]:
    """That of its own run; before it is begun, that of the run which it waits for."""
    state, reason = _state_of(sweep.run(job))
    if state == "missing":
        for at in job.chain[:-1]:
            before, why = _state_of(Run(sweep.runs / at))
            if before != "done":
                state, reason = before, f"{at}: {why}" if why else ""
                break
    if state not in ("done", "running") and sweep.marker(job).exists():
        return "cancelled", ""
    return state, reason


def _state_of(run: Run) -> tuple[State, str]:
    status, reason = run.status(), str(run.manifest().get("reason") or "")
    if status == "interrupted" and reason:
        return "stopped", reason
    if status == "missing" and (why := refusal(run)):
        return "failed", why
    return status, reason


def counts(found: Sequence[Standing]) -> dict[State, int]:
    """How many jobs are in each state, those that there are."""
    number = {state: sum(each.state == state for each in found) for state in ORDER}
    return {state: count for state, count in number.items() if count}


def seconds_left(found: Sequence[Standing]) -> float | None:
    """An estimate of what is still to come: the mean job that is done, shared among those that run.

    None if nothing runs, or nothing is done to tell by.
    """
    spent = [each.seconds for each in found if each.state == "done" and each.seconds is not None]
    running = [each for each in found if each.state == "running"]
    if not spent or not running:
        return None
    mean = sum(spent) / len(spent)
    begun = sum(min(each.seconds or 0, mean) for each in running)
    left = [each for each in found if each.state in ("running", "missing", "interrupted")]
    return (mean * len(left) - begun) / len(running)


def plain(sweep: Sweep, found: Sequence[Standing]) -> dict[str, Any]:
    """The same for a program."""
    return {
        "name": sweep.name,
        "command": sweep.command,
        "started": sweep.started,
        "counts": counts(found),
        "seconds_left": seconds_left(found),
        "jobs": [
            {
                "run": str(each.run.path),
                "words": list(each.job.words),
                "values": each.job.values,
                "status": each.state,
                "reason": each.reason,
                **{name: _finite(each.last.get(name)) for name in LATEST},
                "seconds": each.seconds,
            }
            for each in found
        ],
    }


def page(sweep: Sweep, found: Sequence[Standing]) -> Group:
    """Draw a sweep: its jobs, a line each, and how many are in which state."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("run", overflow="fold")
    drawn.add_column("status", no_wrap=True)
    for column in ("KL", "reward", "gold", "time"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for each in {each.job.key: each for each in found}.values():
        values = [_finite(each.last.get(name)) for name in LATEST]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        drawn.add_row(Text(on_one_line(each.run.path.name)), each.state, *cells, span(each.seconds))
    lines = [
        Text(f"{on_one_line(sweep.name)}: {tally(found)}", style="bold"),
        *(Text(f"  {line}", style="dim") for line in _reasons(found)),
    ]
    return Group(drawn, Text(), *lines)


def tally(found: Sequence[Standing]) -> str:
    """Counts in words."""
    said = ", ".join(f"{count} {state}" for state, count in counts(found).items())
    left = seconds_left(found)
    return f"{said} of {len(found)}" + (f"; about {span(left)} left" if left is not None else "")


def _reasons(found: Sequence[Standing]) -> Iterator[str]:
    for each in {each.job.key: each for each in found}.values():
        if each.reason:
            yield f"{on_one_line(each.run.path.name)}: {on_one_line(each.reason)}"


def table(sweeps: Sequence[tuple[Sweep, Sequence[Standing]]]) -> Table:
    """Draw a list of sweeps, a line each."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("sweep", overflow="fold")
    drawn.add_column("started", no_wrap=True)
    drawn.add_column("jobs")
    for sweep, found in sweeps:
        began = datetime.fromisoformat(sweep.started).astimezone(timezone.utc)
        drawn.add_row(Text(on_one_line(sweep.name)), f"{began:%Y-%m-%d %H:%M}", tally(found))
    return drawn


def span(seconds: float | None) -> str:
    """A time as people say it, to two digits or so."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
