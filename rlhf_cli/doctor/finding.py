"""What one look at the machine brought, and the picture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "note", "fault"]
STYLES: dict[Verdict, str] = {"ok": "green", "note": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    found: str
    verdict: Verdict = "ok"
    """note: a run may begin, but one should know; fault: no run of this kind can work."""
    fix: str = ""
    """What to do about it, in one line; there is none if all is well."""


def picture(findings: Sequence[Finding]) -> Group:
    """The table for a terminal, each fix below what it mends, and the count of it all."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for each in findings:
        told = Text(each.found)
        if each.fix:
            told.append(f"\n-> {each.fix}", style=STYLES[each.verdict])
        table.add_row(each.check, told, Text(each.verdict, style=STYLES[each.verdict]))
    number = {name: sum(each.verdict == name for each in findings) for name in STYLES}
    said = ", ".join(f"{count} {name}" for name, count in number.items())
    return Group(table, Text(f"\n{said}", style=STYLES["fault" if number["fault"] else "ok"]))


def sized(count: float) -> str:
    """Bytes as they are said."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
