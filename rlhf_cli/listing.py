"""What `rlhf runs` and `rlhf show` say about run directories: plain data, and its picture.

Tables of numbers are drawn here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from rlhf_cli.evals.grid import Grid, numeric, shown
from rlhf_cli.printable import on_one_line, visible
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run

LATEST = ("eval/kl", "eval/reward", "eval/gold")
WIDE = 100
"""Columns from which on every cell of `table` has room."""
GAP = 2
"""Columns of a terminal between two of a table without lines."""


def summary(run: Run) -> dict[str, Any]:
    """One run in a line: identity, status, how far it came and its last evaluation."""
    manifest = run.manifest()
    rows = read(run.metrics_path)
    last = next((row for row in reversed(rows) if any(name in row for name in LATEST)), {})
    return {
        "stage": run.stage,
        "label": run.label,
        "key": run.key,
        "status": run.status(),
        "step": int(rows[-1]["step"]) if rows else None,
        **{name: _finite(last.get(name)) for name in LATEST},
        "when": manifest.get("finished") or manifest.get("started"),
        "path": str(run.path),
    }


def details(run: Run) -> dict[str, Any]:
    """One run in full: manifest, last value of every metric, report, files, one sample."""
    metrics: dict[str, float] = {}
    for row in read(run.metrics_path):
        metrics |= row
    samples = sorted(run.samples.glob("*.jsonl"))
    rows = run.responses(int(samples[-1].stem)) if samples else []
    files = (path for path in sorted(run.path.rglob("*")) if path.is_file())
    return {
        "path": str(run.path),
        "manifest": {**run.manifest(), "status": run.status()},
        "metrics": {name: _finite(value) for name, value in metrics.items()},
        "report": json.loads(run.report_path.read_text()) if run.report_path.exists() else None,
        "files": {path.relative_to(run.path).as_posix(): path.stat().st_size for path in files},
        "sample": rows[0] if rows else None,
    }


def table(rows: Sequence[Mapping[str, Any]], wide: bool = True) -> Table:
    """Draw summaries, one a line; without step and age where a name would be cut in two for them."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "run", "key", "status"):
        drawn.add_column(column, no_wrap=column != "run", overflow="fold")
    for column in ("step", "KL", "reward", "gold", "age") if wide else ("KL", "reward", "gold"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in LATEST]
        if wide:
            cells = [_number(row["step"]), *cells, _age(row["when"])]
        names = (Text(on_one_line(row[word])) for word in ("stage", "label", "key", "status"))
        drawn.add_row(*names, *cells)
    return drawn


def page(shown: Mapping[str, Any]) -> Group:
    """Draw the details of one run."""
    manifest, parts = shown["manifest"], []
    told = ("stage", "key", "status", "reason", "title", "started", "finished", "segment", "group")
    facts = {word: manifest[word] for word in told if manifest.get(word) is not None}
    parents = (f"{stage} {key}" for stage, key in manifest.get("parents", {}).items())
    facts |= {"parents": ", ".join(parents) or "none", "command": manifest.get("command", "")}
    parts.append(_pairs(shown["path"], facts))
    parts.append(_pairs("last metrics", {n: _number(v) for n, v in shown["metrics"].items()}))
    if shown["report"]:
        parts.append(_pairs("on held-out pairs", dict(_worth(shown["report"]))))
    parts.append(_pairs("files", {n: f"{size:,} bytes" for n, size in shown["files"].items()}))
    if shown["sample"]:
        parts.append(_pairs("a sample", shown["sample"]))
    return Group(*parts)


@dataclass(frozen=True)
class _Drawn:
    """A grid within the terminal's width: columns that do not fit go below, beside the names again."""

    grid: Grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(visible(self.grid.title), style="bold")
        for part in _cut(self.grid, options.max_width):
            yield _columns(part, options.max_width)
        for note in self.grid.notes:
            yield Text(visible(note), style="dim")


def grid_table(grid: Grid) -> RenderableType:
    """Draw a grid with its title above and its notes below."""
    return _Drawn(grid)


def _cut(grid: Grid, width: int) -> Iterator[Grid]:
    """The grid by parts, each with the names of its rows and as many columns as there is room for."""
    first, *widths = (max(map(cell_len, column)) + GAP for column in _texts(grid))
    widths = [min(first, width // 2), *widths]
    names = [*range(grid.names)]
    room = width + GAP - sum(widths[: grid.names])
    places, left = names, room
    for place in range(grid.names, len(widths)):
        if widths[place] > left and len(places) > grid.names:
            yield grid.only(places)
            places, left = names, room
        places = [*places, place]
        left -= widths[place]
    yield grid.only(places)


def _columns(grid: Grid, width: int) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    columns = _texts(grid)
    for place, (column, right) in enumerate(zip(columns, numeric(grid), strict=True)):
        drawn.add_column(
            Text(column[0]),
            justify="right" if right else "left",
            no_wrap=place > 0,
            overflow="fold",
            max_width=None if place else width // 2,
        )
    for row in zip(*(column[1:] for column in columns), strict=True):
        drawn.add_row(*map(Text, row))
    return drawn


def _texts(grid: Grid) -> list[list[str]]:
    """Every column as it is read, its name first."""
    cells = ([shown(row[place]) for row in grid.rows] for place in range(len(grid.columns)))
    columns = zip(grid.columns, cells, strict=True)
    return [[on_one_line(text) for text in (name, *column)] for name, column in columns]


def _worth(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a reward model's report goes into a few lines."""

    def said(accuracy: Mapping[str, Any]) -> str:
        ends = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}"
        return f"{accuracy['share']:.3f}  ({ends}; {accuracy['pairs']:,} pairs)"

    yield "accuracy", said(report["accuracy"])
    for name, accuracy in {**report["subsets"], **report["by_length"]}.items():
        yield f"accuracy, {name}", said(accuracy)
    rule, again = report["length_rule"], report["agreement"]
    yield "length alone", f"{rule['heldout']:.3f}  (prefers the {rule['prefers']} answer)"
    yield "calibration error", f"{report['calibration']['error']:.3f}"
    yield "alone and batched", f"{again['largest']:.2g} apart at most ({again['answers']} answers)"


def _pairs(title: str, values: Mapping[str, Any]) -> RenderableType:
    drawn = Table(box=None, pad_edge=False, show_header=False, title_justify="left")
    drawn.add_column(no_wrap=True, style="dim")
    drawn.add_column(overflow="fold")
    for name, value in values.items():
        text = _number(value) if isinstance(value, float) else str(value)
        drawn.add_row(Text(f"  {on_one_line(name)}"), Text(visible(text.strip("\n"))))
    return Group(Text(on_one_line(title), style="bold"), drawn, Text())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _age(when: str | None) -> str:
    """Time since `when` in the largest unit that counts at least one."""
    if when is None:
        return "-"
    seconds = int((datetime.now(timezone.utc) - datetime.fromisoformat(when)).total_seconds())
    for unit, size in ("d", 86400), ("h", 3600), ("min", 60):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{max(seconds, 0)} s"
