"""The bench: python -m benchmarks."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import comparisons, table
from benchmarks.race import Result, race
from benchmarks.table import Line

OTHERS = ("start", "growth")
"""Modules that measure for themselves."""
NAMES = (*comparisons.RACES, *OTHERS)


def main(
    rounds: Annotated[int, typer.Option(help="turns of each contestant that count")] = 5,
    only: Annotated[
        list[str] | None, typer.Option(help=f"what to measure, any of: {', '.join(NAMES)}")
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="for runs, logs, speed.json and speed.md")
    ] = comparisons.FOLDER,
    page: Annotated[Path | None, typer.Option(help="where to put a copy of speed.md")] = None,
) -> None:
    """Compare this project with TRL, with a bare loop and with what the machine can do."""
    if unknown := set(only or []) - set(NAMES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose among {', '.join(NAMES)}")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    lines: list[Line] = []
    races: dict[str, list[Result]] = {}
    for name in only or NAMES:
        console.rule(name)
        if name in OTHERS:
            lines += import_module(f"benchmarks.{name}").lines(folder)
        else:
            found, races[name] = _raced(name, rounds, folder, console)
            lines += found
    written = table.write(lines, races, folder, "python -m benchmarks " + shlex.join(sys.argv[1:]))
    _show(lines, console)
    for name, results in races.items():
        bad, all_of_them = (
            sum(each.disturbed for each in results),
            sum(len(each.samples) for each in results),
        )
        console.print(f"{name}: {bad} of {all_of_them} samples were disturbed by others")
    console.print(f"{written} has it, {written.with_suffix('.json')} every sample")
    if page is not None:
        shutil.copy(written, page)


def _raced(
    name: str, rounds: int, folder: Path, console: Console
) -> tuple[list[Line], list[Result]]:
    contestants, judge = comparisons.RACES[name].enter(folder)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def told(who: str) -> None:
            progress.update(task, description=f"{name}: {who}", advance=1)

        results = race(contestants, rounds, folder, told)
    for each in results:
        if each.failed:
            console.print(f"{each.name} {each.failed}", style="red")
    return judge({each.name: each for each in results}), results


def _show(lines: list[Line], console: Console) -> None:
    shown = Table("work", "against", "ratio", "goal", "met")
    for line in lines:
        work, against, _, _, ratio, _, goal, met, _ = table.cells(line)
        shown.add_row(work, against, ratio, goal, met.strip("*"))
    console.print(shown)
    for why in dict.fromkeys(line.note for line in lines if line.ratio is None):
        console.print(why, style="red")


if __name__ == "__main__":
    typer.run(main)
