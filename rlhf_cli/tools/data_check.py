"""What a run would make of a dataset: every row is read, every fault is listed, nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.data.corpus import Corpus, Dataset, Demo, Pair
from rlhf_cli.data.custom import Custom, Survey
from rlhf_cli.errors import UserError
from rlhf_cli.printable import on_one_line

T = TypeVar("T")

NAMED = 3
"""Rows that are named of each cause, unless all are asked for."""
SHOWN = 160
"""Characters that are shown of a text."""


@dataclass(frozen=True)
class Checked:
    """What there is to say about a dataset."""

    survey: Survey
    fault: UserError | None
    """What a run would end with, because of a row or for lack of rows."""


def check(data: Dataset) -> Checked:
    """Read a dataset to its end, whatever its rows are like. Raises UserError if it cannot be read."""
    strict = getattr(data, "on_bad_row", None) == "error"
    lenient: Dataset = replace(cast(Any, data), on_bad_row="drop") if strict else data
    if isinstance(lenient, Custom):
        survey = lenient.survey()
    else:
        survey = Survey(f"data={data.name}", lenient.load(), {}, frozenset())
    try:
        if strict and survey.corpus.drops:
            data.load()
        else:
            survey.usable()
    except UserError as fault:
        return Checked(survey, fault)
    return Checked(survey, None)


def report(checked: Checked, every: bool) -> RenderableType:
    """The same for a terminal of 80 columns, or for a file; every: name each row that is left out."""
    return Group(summary(checked.survey, every), *examples(checked.survey.corpus, 1))


def summary(survey: Survey, every: bool = False) -> RenderableType:
    """What there is, what was left out, and what a user may not expect."""
    parts: list[RenderableType] = [_counts(survey)]
    if survey.corpus.drops:
        parts += [Text(), named("left out", survey.corpus.drops, every)]
    if remarks := list(_remarks(survey)):
        parts.append(Text("\n".join(["", *remarks])))
    return Group(*parts)


def named(what: str, rows: Mapping[str, Sequence[str]], every: bool = False) -> Table:
    """How many rows there are of each kind, and where the first of them stand, or all."""
    drawn = table(what, "rows")
    drawn.add_column("where", overflow="fold")
    for kind, where in rows.items():
        most = len(where) if every else NAMED
        said = ", ".join([*where[:most], *(["..."] if len(where) > most else [])])
        drawn.add_row(kind, str(len(where)), Text(on_one_line(said)))
    return drawn


def examples(corpus: Corpus, count: int) -> Iterator[RenderableType]:
    """Training rows with their whitespace, the first and others, so that one sees where a prompt ends."""
    rows: Sequence[Pair | Demo] = corpus.train.pairs or corpus.train.demos
    fit = [row for row in rows if fit_to_show(row)]
    if fit:
        title = "the first one" if count == 1 else "examples"
        yield Text(f"\n{title}, as a run reads {'it' if count == 1 else 'them'}", style="bold")
    for place, row in enumerate(spread(fit, count)):
        yield from [Text()] if place else []
        yield _example(row)
    if len(fit) < len(rows):
        yield Text("\nrows of harmless-base are not shown: they were written to provoke")


def fit_to_show(row: Pair | Demo) -> bool:
    """Not if it is of HH's harmless-base, or of HH as a whole, which contains it."""
    return "harmless" not in row.where and ("hh-rlhf" not in row.where or "helpful" in row.where)


def spread(rows: Sequence[T], count: int) -> Sequence[T]:
    """At most so many of the rows, the first of them and others evenly spread over the rest."""
    if len(rows) <= count:
        return rows
    return [rows[place * len(rows) // count] for place in range(count)]


def table(first: str, *numbers: str) -> Table:
    """With a column of words and others of numbers."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column(Text(first), no_wrap=True)
    for name in numbers:
        drawn.add_column(name, justify="right", no_wrap=True)
    return drawn


def _counts(survey: Survey) -> Table:
    corpus = survey.corpus
    drawn = table(corpus.title, *corpus.splits())
    kinds = {shape for split in survey.shapes.values() for shape in split}
    for shape in sorted(kinds):
        found = (survey.shapes[split].get(shape, 0) for split in corpus.splits())
        drawn.add_row(f"rows: {shape}", *map(str, found))
    for name, kind in ("demonstrations", "demos"), ("pairs", "pairs"), ("prompts", "prompts"):
        found = (len(getattr(split, kind)) for split in corpus.splits().values())
        drawn.add_row(name, *map(str, found))
    return drawn


def _remarks(survey: Survey) -> Iterator[str]:
    """What a user may not expect of the rows."""
    for name, split in survey.corpus.splits().items():
        for kind, rows in (("demonstrations", split.demos), ("pairs", split.pairs)):
            if repeats := len(rows) - len(set(rows)):
                yield f"repeated: {repeats} of {len(rows)} {name} {kind}"
        if not split.pairs:
            yield f"no {name} pairs: a reward model needs some; stage=sft does not"
    if survey.unread:
        columns = ", ".join(
            name if name.isprintable() else ascii(name) for name in sorted(survey.unread)
        )
        yield f"not read: {columns}"


def _example(row: Pair | Demo) -> Table:
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True, style="dim")
    drawn.add_column(overflow="fold")
    names = ("prompt", "response") if isinstance(row, Demo) else ("prompt", "chosen", "rejected")
    for name in names:
        text = getattr(row, name)
        cut = "..." if len(text) > SHOWN else ""
        # A prompt is shown where it ends, an answer where it begins: there they meet.
        shown = f"{cut}{text[-SHOWN:]!r}" if name == "prompt" else f"{text[:SHOWN]!r}{cut}"
        drawn.add_row(name, Text(shown))
    return drawn
