"""One row of a user's own data to the texts in it, whatever its shape.

A shape is told by the columns in which a row holds something:

    preference      chosen, rejected, prompt       two conversations need no prompt beside them
    labelled        label, with an answer          true or false, 1 or 0
    scored          score, with an answer          a number
    demonstration   an answer: messages, or prompt and response
    prompt          prompt alone

Plain texts are taken as they are. Lists of {role, content} are conversations, and are written by a
`Writer`; a plain text beside one stands for a single message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from typing import Literal, TypeAlias

from pydantic.dataclasses import dataclass

from rlhf_cli.data.chat import Message, Writer, check_order, listed, read_messages
from rlhf_cli.data.corpus import BadRow
from rlhf_cli.data.rows import Row
from rlhf_cli.data.transcript import first_turn
from rlhf_cli.recipes import STRICT

Shape: TypeAlias = Literal["preference", "labelled", "scored", "demonstration", "prompt"]
Words: TypeAlias = str | tuple[Message, ...]
Said: TypeAlias = tuple[Words, Mapping[str, str]]
"""What was asked, and the answers by the columns they are from, the preferred one first."""

ALIASES = {
    "prompt": ("instruction", "question", "query", "input"),
    "chosen": ("preferred", "better"),
    "rejected": ("dispreferred", "worse"),
    "response": ("completion", "answer", "output"),
    "messages": ("conversations", "conversation"),
}
"""What others call a column: named in a complaint, never read unasked."""
LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
"""As they are spelt, since a csv file knows text alone."""


@dataclass(frozen=True, config=STRICT)
class Columns:
    """What the data call each column."""

    prompt: str
    """What is answered."""
    chosen: str
    """The preferred of two answers."""
    rejected: str
    """The other one."""
    response: str
    """One answer."""
    messages: str
    """A conversation that ends in an answer."""
    label: str
    """Whether an answer is a good one."""
    score: str
    """How good an answer is; higher is better."""
    id: str | None
    """The name of a row, unique in its split; null reads none."""

    def __post_init__(self) -> None:
        names = [getattr(self, part.name) for part in fields(self)]
        if len(set(names)) < len(names):
            raise ValueError("name another column for each of its keys")


@plain_dataclass(frozen=True)
class Example:
    """What a row says, as text."""

    where: str
    shape: Shape
    opening: str
    """The first human turn, or the whole of a prompt that has no turns."""
    prompt: str
    answers: tuple[str, ...]
    """The preferred one first."""
    worth: float
    """Label or score; 0 where the shape has neither."""
    read: frozenset[str]
    """The columns it was made of."""


@plain_dataclass(frozen=True)
class Parser:
    """Rows to examples."""

    columns: Columns
    writer: Callable[[], Writer]
    """Asked for at the first conversation: a tokenizer need not be there for plain texts."""

    def __call__(self, row: Row) -> Example:
        """Raises BadRow for whatever is wrong with the row."""
        shape, worth, read = self._shape(row), 0.0, {self.columns.prompt}
        if shape == "preference":
            asked, said = self._compared(row)
        elif shape == "prompt":
            asked, said = self._words(row, "prompt"), {}
        elif self._holds(row, "messages"):
            asked, said = self._conversation(row)
            read.clear()
        else:
            asked, said = self._together(row, self._words(row, "prompt"), "response")
        if shape == "labelled":
            worth, read = self._label(row), {*read, self.columns.label}
        elif shape == "scored":
            worth, read = self._score(row), {*read, self.columns.score}
        opening, prompt, answers = self._written(row, asked, said)
        return Example(row.where, shape, opening, prompt, answers, worth, frozenset({*read, *said}))

    def _name(self, part: str) -> str:
        return str(getattr(self.columns, part))

    def _holds(self, row: Row, part: str) -> bool:
        return row.values.get(self._name(part)) is not None

    def _shape(self, row: Row) -> Shape:
        if self._holds(row, "chosen") or self._holds(row, "rejected"):
            return "preference"
        if self._holds(row, "label"):
            return "labelled"
        if self._holds(row, "score"):
            return "scored"
        if self._holds(row, "messages") or self._holds(row, "response"):
            return "demonstration"
        # Answers under another name would make a row of prompts without a word of warning.
        for part in ("messages", "chosen", "response"):
            if _other_name(row, part):
                raise self._missing(row, part)
        return "prompt"

    def _words(self, row: Row, part: str) -> Words:
        column = self._name(part)
        value = row.values.get(column)
        if value is None:
            raise self._missing(row, part)
        return read_messages(row, column, value) if isinstance(value, list) else row.text(column)

    def _compared(self, row: Row) -> Said:
        """Both sides of a preference; without a prompt, what comes before the answer is it."""
        chosen = self._words(row, "chosen")
        asked: Words = chosen[:-1] if isinstance(chosen, tuple) else ()
        if not asked or self._holds(row, "prompt"):
            asked = self._words(row, "prompt")
        return self._together(row, asked, "chosen", "rejected")

    def _conversation(self, row: Row) -> Said:
        """The last message answers the others."""
        turns, column = self._words(row, "messages"), self.columns.messages
        if isinstance(turns, str):
            raise row.bad("wrong type", f"column {column} holds text, not a list of messages")
        return turns[:-1], {column: _last(row, column, turns[:-1], turns)}

    def _together(self, row: Row, asked: Words, *parts: str) -> Said:
        """Answers to what was asked: if any of it is a conversation, all of it is."""
        said = {self._name(part): self._words(row, part) for part in parts}
        if isinstance(asked, str) and any(isinstance(words, tuple) for words in said.values()):
            asked = (Message("user", asked),)
        return asked, {column: _last(row, column, asked, words) for column, words in said.items()}

    def _written(
        self, row: Row, asked: Words, said: Mapping[str, str]
    ) -> tuple[str, str, tuple[str, ...]]:
        """The opening, the prompt and the answers."""
        for column, answer in said.items():
            if not answer.strip():
                raise row.bad("empty answer", f"the answer in column {column} is empty")
        if isinstance(asked, str):
            last, opening = asked, first_turn(asked) or asked.strip()
            prompt, answers = asked, tuple(said.values())
        else:
            check_order(row, asked)
            last, opening = asked[-1].content, _first(asked).content.strip()
            prompt, answers = self.writer()(row, asked, tuple(said.values()))
        if not last.strip():
            raise row.bad("empty prompt", "its prompt is empty")
        if len(set(answers)) < len(answers):
            raise row.bad("identical pair", f"{' and '.join(said)} are the same")
        return opening, prompt, answers

    def _label(self, row: Row) -> float:
        column = self.columns.label
        value = LABELS.get(str(row.values[column]).strip().lower())
        if value is None:
            raise row.bad("wrong type", f"column {column} holds neither true nor false (1 nor 0)")
        return value

    def _score(self, row: Row) -> float:
        column, number = self.columns.score, math.nan
        value = row.values[column]
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                number = float(value)
        if not math.isfinite(number):
            raise row.bad("not a number", f"column {column} holds no finite number")
        return number

    def _missing(self, row: Row, part: str) -> BadRow:
        held = [name for name, value in row.values.items() if value is not None]
        hints = [
            f"data.columns.{each}={other}"
            for each in ALIASES
            if not self._holds(row, each) and (other := _other_name(row, each))
        ]
        what = f"it holds nothing in column {self._name(part)}, "
        what += f"only in {listed(held)}" if held else "nor in any other"
        return row.bad("missing column", what + (f" (try {' '.join(hints)})" if hints else ""))


def _other_name(row: Row, part: str) -> str | None:
    """A column that holds something under one of a part's other names."""
    return next((name for name in ALIASES[part] if row.values.get(name) is not None), None)


def _first(asked: tuple[Message, ...]) -> Message:
    return next(turn for turn in asked if turn.role == "user")


def _last(row: Row, column: str, asked: Words, words: Words) -> str:
    """The answer in a column: a text, or one message, before which what was asked may be repeated."""
    if isinstance(words, str):
        return words
    rest = words[len(asked) :] if words[: len(asked)] == asked else words
    if len(rest) != 1:
        raise row.bad(
            "prompts differ", f"column {column} does not go on from the prompt by a single message"
        )
    if rest[0].role != "assistant":
        raise row.bad(
            "broken role order",
            f"the last message in column {column} is of {listed([rest[0].role])}, not of assistant",
        )
    return rest[0].content
