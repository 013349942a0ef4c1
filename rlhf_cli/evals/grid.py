"""A table of numbers, written the same way for a spreadsheet, a program, a web page and a paper.

csv and json hold the numbers as they are, to be computed with. md and tex round them for reading; tex is
a table of the package booktabs, its text escaped. nan and None are left empty (null in json).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_cli.printable import in_cell, in_markdown
from rlhf_cli.store.files import atomic_write, disk

Kind = Literal["csv", "json", "md", "tex"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_ESCAPES = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        **{sign: f"{{{sign}}}" for sign in "[]*"},  # else read as part of a row's end before them
    }
)
_ENDS = ("", " se", " low", " high")
"""What the name of a column of raw numbers ends in, for each part of a number."""
_WHOLE, _LONG = 1e3, 1e9
"""A float from the one on is rounded to a whole number; from the other on, a number is in powers of 10."""
_MOST_PLACES = 6


@dataclass(frozen=True)
class Cell:
    """A number and how far it may be off: by its standard error, or within an interval."""

    value: float
    se: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def parts(self) -> dict[str, float]:
        """What there is of it, by the ending that a column of raw numbers gets."""
        low, high = self.interval or (None, None)
        parts = zip(_ENDS, (self.value, self.se, low, high), strict=True)
        return {end: x for end, x in parts if x is not None and not math.isnan(x)}


@dataclass(frozen=True)
class Grid:
    """Rows under columns; a cell is a str, an int, a float, a `Cell` or None."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    notes: tuple[str, ...] = ()
    """How to read it, a sentence each."""
    names: int = 1
    """How many columns, from the first, say which row it is."""

    def without_empty_columns(self) -> Grid:
        """The same, less the columns in which no row has anything."""
        filled = (any(map(shown, column)) for column in _columns(self))
        return self.only([place for place, some in enumerate(filled) if some])

    def only(self, places: Sequence[int]) -> Grid:
        """The same, less the columns that are not at one of these places."""
        columns = tuple(self.columns[place] for place in places)
        rows = tuple(tuple(row[place] for place in places) for row in self.rows)
        return replace(self, columns=columns, rows=rows)


def write(grid: Grid, base: Path, kinds: Iterable[Kind] = KINDS) -> dict[str, Path]:
    """Write `base` with each kind as its ending, a file each; the folder is made.

    Returns the files by kind. Raises UserError if the disk refuses.
    """
    files: dict[str, Path] = {kind: Path(f"{base}.{kind}") for kind in kinds}
    with disk(base.parent):
        base.parent.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        atomic_write(files[kind], text(grid, kind))
    return files


def text(grid: Grid, kind: Kind) -> str:
    """The table in one of the formats, its last line ended."""
    match kind:
        case "csv":
            return _csv(grid)
        case "json":
            return json.dumps(plain(grid), indent=2, ensure_ascii=False) + "\n"
        case "md":
            return _markdown(grid)
        case "tex":
            return _latex(grid)


def plain(grid: Grid) -> dict[str, Any]:
    """The table as JSON has it: {title, columns, rows, notes}, every row by column."""
    rows = [dict(zip(grid.columns, map(_plain, row), strict=True)) for row in grid.rows]
    return {"title": grid.title, "columns": [*grid.columns], "rows": rows, "notes": [*grid.notes]}


def shown(value: object) -> str:
    """A cell as it is read: `1.23 ± 0.04`, `1.23 [1.10, 1.35]`, 4,096, or nothing."""
    match value:
        case None:
            return ""
        case Cell():
            return _spread(value, " ± ", " ")
        case float() | int():
            return _number(value)
    return str(value)


def numeric(grid: Grid) -> list[bool]:
    """[columns] whether a column holds numbers, which stand at its right."""
    return [any(map(_is_number, column)) for column in _columns(grid)]


def _is_number(cell: object) -> bool:
    return isinstance(cell, Cell | int | float)


def _spread(cell: Cell, plus_minus: str, gap: str) -> str:
    """As many places as show the first digit of the error, at least two."""
    value, se, low, high = (cell.parts.get(end, math.nan) for end in _ENDS)
    error = se if math.isnan(low) else (high - low) / 2
    first = -math.floor(math.log10(error)) if 0 < error < math.inf else 0
    places = min(max(2, first), _MOST_PLACES)

    def said(x: float) -> str:
        return f"{x:.{places}f}"

    if math.isnan(value):
        return ""
    if not math.isnan(low):
        return f"{said(value)}{gap}[{said(low)}, {said(high)}]"
    return said(value) if math.isnan(se) else f"{said(value)}{plus_minus}{said(se)}"


def _number(value: float | int) -> str:
    if math.isnan(value):
        return ""
    full = isinstance(value, int) or abs(value) >= _WHOLE
    return f"{value:,.0f}" if full and abs(value) < _LONG else f"{value:.4g}"


def _csv(grid: Grid) -> str:
    """One column for each part of a number that any row has."""
    columns = [
        (name + end, [_raw(cell).get(end) for cell in column])
        for name, column in zip(grid.columns, _columns(grid), strict=True)
        for end in _ENDS
        if not end or any(end in _raw(cell) for cell in column)
    ]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(in_cell(name) for name, _ in columns)
    writer.writerows(zip(*(map(in_cell, cells) for _, cells in columns), strict=True))
    return written.getvalue()


def _columns(grid: Grid) -> list[list[object]]:
    return [[row[place] for row in grid.rows] for place in range(len(grid.columns))]


def _raw(cell: object) -> dict[str, object]:
    """The parts of a cell; what is no `Cell` has one, if any."""
    if isinstance(cell, Cell):
        return {"": None, **cell.parts}
    return {"": None if isinstance(cell, float) and math.isnan(cell) else cell}


def _plain(cell: object) -> object:
    if isinstance(cell, Cell):
        parts = {name.strip() or "value": _plain(x) for name, x in cell.parts.items()}
        return parts or None
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _markdown(grid: Grid) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: object) -> str:
        return in_markdown(value) if isinstance(value, str) else shown(value)

    rules = ("---:" if right else "---" for right in numeric(grid))
    body = [line(map(cell, grid.columns)), line(rules)]
    body += [line(map(cell, row)) for row in grid.rows]
    title = f"**{in_markdown(grid.title)}**"
    return "\n\n".join([title, "\n".join(body), *map(in_markdown, grid.notes)]) + "\n"


def _latex(grid: Grid) -> str:
    def line(cells: Iterable[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escaped(grid.title)}}}",
        rf"  \begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric(grid))}}}",
        r"    \toprule",
        line(map(escaped, grid.columns)),
        r"    \midrule",
        *(line(map(_mathematics, row)) for row in grid.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        *(rf"  \par\smallskip{{\footnotesize {escaped(note)}\par}}" for note in grid.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escaped(words: str) -> str:
    """Write text for LaTeX so that no character of it is taken for a command."""
    return words.translate(_ESCAPES).replace("±", r"$\pm$")


def _mathematics(cell: object) -> str:
    """A cell for LaTeX: numbers in math mode, where a minus is one, and powers of ten written out."""
    if isinstance(cell, Cell):
        spread = _spread(cell, r" \pm ", r"\ ")
        return f"${spread}$" if spread else ""
    said = shown(cell)
    if not said or not _is_number(cell):
        return escaped(said)
    mantissa, e, power = said.replace(",", "{,}").partition("e")
    return rf"${mantissa} \times 10^{{{int(power)}}}$" if e else f"${mantissa}$"
