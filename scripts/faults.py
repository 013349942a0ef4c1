"""Injects every fault that the tests know of and prints, fault by fault, what came of it.

    python scripts/faults.py [--write]

Runs the tests that are marked `faults` or ask for the fixture `fault`, as `make faults` does. What they note
of themselves once they have passed are the rows; a test that failed has a row that says so. With --write the
table becomes docs/faults.md. Exits 1 if a test failed, or if two rows tell different things of one fault.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_cli.store.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "faults.md"
TESTS = ("-m", "faults or injects", "-n", "2", "--dist", "loadfile")
KINDS = {
    **dict.fromkeys(
        ("test_stopping", "test_chaos", "test_resume", "test_resume_verb", "test_slurm"),
        "Signals, kills and deadlines",
    ),
    "test_pulse": "Processes that hang or vanish",
    "test_guard": "Numbers that go wrong",
    "test_memory": "Memory that does not suffice",
    "test_faults_storage": "Disks and damaged files",
    "test_faults_together": "Several commands at once",
    "test_faults_network": "Networks and services",
    "test_preflight": "Mistakes caught before the first step",
    "test_extremes": "Texts at the edges",
    "test_untrusted": "Untrusted input",
}
"""Module of the tests -> what its faults have in common; another is called by its own name."""
FAILED = "FAILED"
INTRODUCTION = """\
# Faults, and what comes of them

A run that is stopped, killed or refused something by its machine goes on, when the same command is given
again, as if nothing had happened: on one machine with one number of processes, its weights, metrics and
samples equal those of an undisturbed run, and no run looks finished that is not whole. Lost at most are the
optimiser steps since the last checkpoint, which are taken again: none after a signal, and after a kill
`checkpoint.every` of them, rounded up to whole rollouts. The exit code is 0 if all was done, 2 with one
sentence where something has to be mended first, 75 if it was asked to stop, 130 after an interrupt that was
obeyed at once, and 1 if a process died or a part of a sweep failed.
"""


@dataclass(frozen=True, order=True)
class Row:
    """One fault."""

    kind: str
    injected: str
    outcome: str
    lost: str


def rows(report: Path) -> list[Row]:
    """What the tests of a junit report have noted, each fact once, in order."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    # A file of tests that is skipped while it is read has no class: it is of peers, and injects nothing.
    return sorted({row for case in cases if case.get("classname") for row in _rows(case)})


def _rows(case: Element) -> Iterator[Row]:
    module = case.get("classname", "").rpartition(".")[2]
    kind = KINDS.get(module, module.removeprefix("test_").replace("_", " ").capitalize())
    name = case.get("name", "").removeprefix("test_").replace("_", " ")
    if case.find("failure") is not None or case.find("error") is not None:
        yield Row(kind, name, FAILED, "unknown")
    elif (skipped := case.find("skipped")) is not None:
        yield Row(kind, name, f"not tested here: {skipped.get('message')}", "unknown")
    for noted in case.iterfind("properties/property[@name='fault']"):
        yield Row(kind, *json.loads(noted.get("value", "")))


def contradictions(found: Iterable[Row]) -> list[str]:
    """Faults of which two rows tell different things."""
    times = Counter((row.kind, row.injected) for row in found)
    return [f"{kind}: {injected}" for (kind, injected), count in times.items() if count > 1]


def table(found: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table("fault", "outcome", "lost", show_lines=True)
    for kind, some in groupby(found, key=lambda row: row.kind):
        shown.add_section()
        shown.add_row(f"[bold]{kind}[/bold]")
        for row in some:
            style = "red" if row.outcome == FAILED else None
            shown.add_row(*(Text(word) for word in astuple(row)[1:]), style=style)
    return shown


def page(found: Sequence[Row], command: str, commit: str) -> str:
    """docs/faults.md."""
    parts = [INTRODUCTION]
    for kind, some in groupby(found, key=lambda row: row.kind):
        lines = ["| fault | outcome | lost |", "|---|---|---|"]
        lines += ["| " + " | ".join(map(_cell, astuple(row)[1:])) + " |" for row in some]
        parts.append(f"## {kind}\n\n" + "\n".join(lines) + "\n")
    parts.append(f"{len(found)} faults, injected by `{command}` at commit {commit}.\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", r"\|").replace("\n", " ")


def main(words: Sequence[str]) -> int:
    """Run the tests, show the table; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    said = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *TESTS, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            return code
        found = rows(report)
    console = Console()
    console.print(table(found))
    failed = sum(row.outcome == FAILED for row in found)
    console.print(
        f"{len(found)} faults, {failed} of them with another outcome than the tests demand"
    )
    twice = contradictions(found)
    for each in twice:
        console.print(f"two rows tell different things of this: {each}", markup=False)
    if said.write:
        origin = provenance()
        commit = f"{origin['commit']}{', with changes' if origin['patch'] else ''}"
        PAGE.write_text(page(found, "make faults", commit), encoding="utf-8")
    return 1 if code or twice else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
