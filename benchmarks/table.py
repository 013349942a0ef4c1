"""What a bench says: one line for each comparison, as JSON with all that was measured, and as a page.

The page holds ratios of one race, since seconds mean nothing on another day.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.race import QUIET, THREADS, Result

PACKAGES = ("torch", "transformers", "trl")
"""Whose versions matter."""


@dataclass(frozen=True)
class Line:
    """One comparison."""

    work: str
    against: str
    ours: str
    """What we took, with its unit: "0.71 s", "240 MB"."""
    theirs: str
    """What the other took, with its unit."""
    ratio: float | None
    """As the goal words it; None where it could not be measured, and `note` says why."""
    spread: tuple[float, float] | None
    """The least and the greatest ratio of single rounds."""
    goal: str
    """"<= 1.2", ">= 2.5"; empty where there is none."""
    met: bool | None
    """None without a goal or a measurement."""
    note: str = ""


def judged(ratio: float, goal: str) -> bool | None:
    """Whether a goal, "<= 1.2" or ">= 2.5", is met; None for the empty goal."""
    if not goal:
        return None
    sign, bound = goal.split()
    return ratio <= float(bound) if sign == "<=" else ratio >= float(bound)


def missing(work: str, against: str, goal: str, why: str) -> Line:
    """A comparison that could not be made."""
    return Line(work, against, "", "", None, None, goal, None, why)


def write(
    lines: Sequence[Line], races: Mapping[str, Sequence[Result]], folder: Path, command: str
) -> Path:
    """speed.json, with every sample, and speed.md in a folder; returns the page."""
    about = {"command": command, "date": date.today().isoformat(), **machine(), **versions()}
    whole = {
        **about,
        "lines": [asdict(each) for each in lines],
        "races": {name: [asdict(each) for each in results] for name, results in races.items()},
    }
    (folder / "speed.json").write_text(json.dumps(whole, indent=1) + "\n")
    target = folder / "speed.md"
    target.write_text(page(lines, races, about))
    return target


def page(
    lines: Sequence[Line], races: Mapping[str, Sequence[Result]], about: Mapping[str, Any]
) -> str:
    """The page as markdown."""
    samples = [sample for results in races.values() for each in results for sample in each.samples]
    disturbed = sum(each.disturbed for results in races.values() for each in results)
    judged_lines = [each for each in lines if each.met is not None]
    rows = [
        "| work | against | ours | theirs | ratio | rounds | goal | met | note |",
        "|---|---|---|---|---|---|---|---|---|",
        *("| " + " | ".join(cells(each)) + " |" for each in lines),
    ]
    return (
        f"""# How fast

Written by `{about["command"]}` on {about["date"]}, at commit {about["commit"]}.

{about["processor"]}, {about["cores"]} cores, {about["memory_gb"]} GB, {about["threads"]} threads each;
{", ".join(f"{name} {about[name]}" for name in PACKAGES)}. {len(samples)} samples, {disturbed} of them taken
while others used more than {QUIET:.0%} of the cores.

Contestants are processes that take turns; a number is the median of its turns, a ratio that of two medians,
and `rounds` the least and the greatest ratio of a single round. Seconds mean nothing on another machine.
{sum(bool(each.met) for each in judged_lines)} of {len(judged_lines)} goals that were measured are met.

"""
        + "\n".join(rows)
        + "\n"
    )


def cells(line: Line) -> list[str]:
    """As a row of a table."""
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    rounds = "" if line.spread is None else "{:.2f} to {:.2f}".format(*line.spread)
    met = {None: "", True: "yes", False: "**no**"}[line.met]
    return [
        line.work, line.against, line.ours, line.theirs, ratio, rounds, line.goal, met, line.note
    ]  # fmt: skip


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
    }


def _processor() -> str:
    """The name the kernel has for it, where it says."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of what was measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    asked = ["git", "describe", "--always", "--dirty=, with changes", "--exclude=*"]
    said = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {**found, "commit": said.stdout.strip() or "unknown"}
