"""What a run would make of a dataset: every row is read, every fault is listed, nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.data.corpus import Corpus, Dataset
from rlhf_cli.data.custom import Custom, Survey
from rlhf_cli.errors import UserError

NAMED = 3
"""Rows that are named of each cause."""
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


def report(checked: Checked) -> RenderableType:
    """The same for a terminal of 80 columns, or for a file."""
    survey, corpus = checked.survey, checked.survey.corpus
    parts: list[RenderableType] = [_counts(survey)]
    if corpus.drops:
        parts += [Text(), _left_out(corpus)]
    if remarks := list(_remarks(survey)):
        parts.append(Text("\n".join(["", *remarks])))
    if example := _example(corpus):
        parts += [Text(), example]
    return Group(*parts)


def _counts(survey: Survey) -> Table:
    corpus = survey.corpus
    drawn = _table(corpus.title, "training", "held-out")
    kinds = {shape for split in survey.shapes.values() for shape in split}
    for shape in sorted(kinds):
        found = (survey.shapes[split].get(shape, 0) for split in ("training", "held-out"))
        drawn.add_row(f"rows: {shape}", *map(str, found))
    for name, kind in ("demonstrations", "demos"), ("pairs", "pairs"), ("prompts", "prompts"):
        found = (len(getattr(split, kind)) for split in (corpus.train, corpus.heldout))
        drawn.add_row(name, *map(str, found))
    return drawn


def _left_out(corpus: Corpus) -> Table:
    drawn = _table("left out", "rows")
    drawn.add_column("where", overflow="fold")
    for cause, where in corpus.drops.items():
        named = ", ".join([*where[:NAMED], *(["..."] if len(where) > NAMED else [])])
        drawn.add_row(cause, str(len(where)), Text(named))
    return drawn


def _remarks(survey: Survey) -> Iterator[str]:
    """What a user may not expect of the rows."""
    corpus = survey.corpus
    for name, split in (("training", corpus.train), ("held-out", corpus.heldout)):
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


def _example(corpus: Corpus) -> RenderableType | None:
    """The first training row with its whitespace, so that one sees where a prompt ends."""
    rows = [*corpus.train.pairs[:1], *corpus.train.demos[:1]]
    if not rows:
        return None
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True, style="dim")
    drawn.add_column(overflow="fold")
    for name, text in vars(rows[0]).items():
        cut = text[-SHOWN:] if name == "prompt" else text[:SHOWN]
        drawn.add_row(name, Text(repr(cut)))
    return Group(Text("the first one, as a run reads it", style="bold"), drawn)


def _table(first: str, *numbers: str) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column(Text(first), no_wrap=True)
    for name in numbers:
        drawn.add_column(name, justify="right", no_wrap=True)
    return drawn
