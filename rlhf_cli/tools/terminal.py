"""How credit and decoded responses look on a terminal, with colours and without."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.figures.credit import Answer, Heatmap, lines, tint, width
from rlhf_cli.printable import on_one_line, visible
from rlhf_cli.tools.decode import Response

BESIDE = 80
"""Columns from which on two answers stand side by side."""
GAP = 3
"""Columns between them."""


def heatmap(drawn: Heatmap, columns: int, colour: bool) -> RenderableType:
    """Each token on its colour or, without colours, over its number."""
    head = Table.grid(padding=(0, 2))
    for name, value in drawn.facts.items():
        head.add_row(Text(name, style="dim"), Text(visible(value)))
    beside = len(drawn.answers) if columns >= BESIDE else 1
    room = (columns - GAP * (beside - 1)) // beside
    grid = Table.grid(padding=(0, GAP, 0, 0))
    for _ in range(beside):
        grid.add_column(width=room)
    blocks = [
        Group(
            Text(answer.name, style="bold"),
            _coloured(drawn, answer, room) if colour else _numbered(drawn, answer, room),
        )
        for answer in drawn.answers
    ]
    for start in range(0, len(blocks), beside):
        grid.add_row(*blocks[start : start + beside])
    parts: list[RenderableType] = [head, Text(f"\n{visible(drawn.prompt).strip()}\n", "dim"), grid]
    if colour:
        parts.append(_scale(drawn))
    parts.append(Text("\n".join(["", *drawn.sums()])))
    return Group(*parts)


def responses(rows: Sequence[Response]) -> RenderableType:
    """Prompts with their responses and numbers, and the means where there are several."""
    parts: list[RenderableType] = []
    for row in rows:
        parts.append(Text(visible(row.prompt).strip(), style="dim"))
        parts.append(Text(visible(row.response).strip() or "(nothing)", style="bold"))
        parts.append(Text(f"{_numbers([row])}{'' if row.ended else ', cut'}\n"))
    if len(rows) > 1:
        parts.append(Text(f"mean of {len(rows)}: {_numbers(rows)}"))
    return Group(*parts)


def _numbers(rows: Sequence[Response]) -> str:
    """log pi, log-ratio, reward and gold, averaged over those that have them."""
    columns: dict[str, Sequence[float | None]] = {
        "log pi": [row.logp for row in rows],
        "log pi/sft": [row.kl for row in rows],
        "reward": [row.score for row in rows],
        "gold": [row.gold for row in rows],
        "tokens": [row.tokens for row in rows],
    }
    said = []
    for name, column in columns.items():
        known = [value for value in column if value is not None]
        if known:
            mean = math.fsum(known) / len(known)
            said.append(f"{name} {mean:g}" if name == "tokens" else f"{name} {mean:.2f}")
    return ", ".join(said)


def _coloured(drawn: Heatmap, answer: Answer, room: int) -> Text:
    texts = [on_one_line(token) for token in answer.tokens]
    text = Text()
    for row in lines([width(each) for each in texts], room):
        for index in row:
            style = f"black on {tint(answer.credit[index], drawn.limit)}"
            text.append(texts[index], style=style)
        text.append("\n")
    return text


def _numbered(drawn: Heatmap, answer: Answer, room: int) -> Text:
    texts = [on_one_line(token) for token in answer.tokens]
    numbers = [drawn.number(value) for value in answer.credit]
    broad = [max(width(t), len(n)) + 1 for t, n in zip(texts, numbers, strict=True)]
    text = Text()
    for row in lines(broad, room):
        above = (texts[i] + " " * (broad[i] - width(texts[i])) for i in row)
        text.append(f"{''.join(above).rstrip()}\n")
        text.append(f"{''.join(numbers[i].ljust(broad[i]) for i in row).rstrip()}\n", style="dim")
    return text


def _scale(drawn: Heatmap) -> Text:
    text = Text(f"{drawn.number(-drawn.limit)} ")
    for step in range(-10, 11):
        text.append(" ", style=f"on {tint(step / 10, 1)}")
    return text.append(f" {drawn.number(drawn.limit)} per token")
