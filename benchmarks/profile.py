"""Where a step of ours spends its time, beside what each part needs: python -m benchmarks.profile."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import floor
from benchmarks.comparisons import FOLDER, RACES, Online, Start
from benchmarks.race import race

PARTS = ("drawing", "reference", "reward", "forward", "backward", "optimiser")


def main(
    algo: str = "p3o_v2",
    rounds: Annotated[int, typer.Option(help="steps that count")] = 5,
    folder: Annotated[Path, typer.Option(help="for runs and logs")] = FOLDER,
) -> None:
    """Say what takes how long in an online step of the main shape."""
    online = RACES["online"]
    assert isinstance(online, Online)
    folder.mkdir(parents=True, exist_ok=True)
    start = Start.of(folder, online.words)
    contestants = [online.ours(algo, folder, parts=True), online.products(start)]
    ours, products = race(contestants, rounds, folder)
    console = Console()
    if failed := ours.failed or products.failed:
        console.print(failed, style="red")
        raise typer.Exit(1)
    rate = statistics.median(floor.rate(each.parts) for each in products.samples)
    least = online.operations(start, apart=False)
    shown = Table("part", "s", "share", "floor s", "times the floor")
    took = {name: ours.parts.get(name, 0.0) for name in PARTS}
    took["bookkeeping"] = ours.seconds - sum(took.values())
    took["step"] = ours.seconds
    least["step"] = sum(least.values())
    for name, seconds in took.items():
        needed = least.get(name, 0.0) / rate
        shown.add_row(
            name, f"{seconds:.3f}", f"{seconds / ours.seconds:.0%}",
            *((f"{needed:.3f}", f"{seconds / needed:.1f}") if needed else ("", "")),
        )  # fmt: skip
    console.print(shown)
    console.print(
        f"{algo}, {online.size}: medians of {rounds} steps, {ours.disturbed} of them disturbed by others;"
        f" the floor is at {rate / 1e9:.0f} GFLOP/s, a prompt read once for all its responses."
        " Bookkeeping is all the rest."
    )


if __name__ == "__main__":
    typer.run(main)
