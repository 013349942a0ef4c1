"""A report as one file of HTML: no script, no font, no picture and no request beside it.

Everything that the page says is escaped, and what would be invisible in it, control characters and changes
of the direction of writing, is shown by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_cli.evals.grid import Cell, numeric, shown
from rlhf_cli.printable import visible
from rlhf_cli.report.material import Material
from rlhf_cli.report.parts import Report, report
from rlhf_cli.store.files import atomic_write, disk
from rlhf_cli.store.run import Run

NAME = "report.html"
"""Of the file, where only a folder is given."""


def write(runs: Sequence[Run], out: Path, kls: Sequence[float], command: str) -> Path:
    """Write the page about the RL runs among `runs`, into `out` or, if that is a folder, into it.

    kls: nats at which curves are compared, by default the usual ones. The same runs give the same page.
    Raises UserError if no run was evaluated or the disk refuses.
    """
    file = out / NAME if out.is_dir() else out
    text = html(report(Material.of(runs, kls), command))
    with disk(file.parent, key="--out"):
        file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, text)
    return file


def html(made: Report) -> str:
    """The page."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalised,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"numeric": numeric}
    environment.filters |= {"shown": shown, "tint": tint}
    return environment.get_template("page.html").render(report=made) + "\n"


def tint(cell: Cell | None) -> int:
    """Percent of colour behind a share: none up to one half, 100 at 1."""
    return 0 if cell is None else round(200 * max(cell.value - 0.5, 0.0))


def _finalised(value: object) -> object:
    """Text as it may stand on the page; what is marked as safe passes."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return visible(value)
