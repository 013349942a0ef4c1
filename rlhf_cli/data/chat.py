"""Conversations, lists of {role, content}, and the two ways in which they become prompt and answer.

`transcript` is the layout of HH. A `Template` is the chat template that comes with a model's tokenizer: an
answer is what the template adds to the prompt once it is there, without the end token, which every
response is given later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rlhf_cli.data import rows
from rlhf_cli.data.rows import Row
from rlhf_cli.data.transcript import TURN, render
from rlhf_cli.errors import UserError
from rlhf_cli.trust import refuse_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTEAD = "set data.template=transcript, or data.tokenizer to a model that has one"
_SAME_DAY = '{% macro strftime_now(format) %}2025-01-01{% endmacro %}{{ "" }}'
"""What a template that writes the date writes: rows must not change from one day to the next."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


Writer: TypeAlias = Callable[[Row, Sequence[Message], Sequence[str]], tuple[str, tuple[str, ...]]]
"""What was asked and the answers to it, in that order, to their texts. Raises BadRow about the row."""


def read_messages(row: Row, column: str, value: Sequence[object]) -> tuple[Message, ...]:
    """The turns that a list in a column holds. Raises BadRow unless each is {role, content}, both text."""
    if not value:
        raise row.bad("wrong type", f"the list in column {column} is empty")
    found = []
    for number, item in enumerate(value, 1):
        place = f"message {number} in column {column}"
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise row.bad("wrong type", f"{place} is no object with role and content")
        role = row.checked(item["role"], f"the role of {place}")
        found.append(Message(role, row.checked(item["content"], f"the content of {place}")))
    return tuple(found)


def check_order(row: Row, asked: Sequence[Message]) -> None:
    """BadRow unless user and assistant alternate from user to user, after at most one system message."""
    turns = asked[1:] if asked and asked[0].role == "system" else asked
    expected = cycle(["user", "assistant"])
    if len(turns) % 2 == 0 or any(turn.role != next(expected) for turn in turns):
        raise row.bad(
            "broken role order",
            f"before the answer its roles are {listed([turn.role for turn in asked])}, not user and"
            " assistant in turn from user to user (a system message may be first)",
        )


def listed(words: Sequence[str], most: int = 8) -> str:
    """A user's own words in one line of a sentence."""
    said = [word if word.isprintable() and len(word) < 40 else ascii(word[:40]) for word in words]
    return ", ".join([*said[:most], *(["..."] if len(said) > most else [])]) or "none"


def transcript(
    row: Row, asked: Sequence[Message], answers: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The writer of HH's layout."""
    if any(TURN.search(text) for text in (*(turn.content for turn in asked), *answers)):
        raise row.bad(
            "broken role order",
            "a message holds a paragraph that begins with Human: or Assistant:, which a transcript takes"
            " for a turn",
        )
    return render([(turn.role, turn.content) for turn in asked]), tuple(f" {a}" for a in answers)


@dataclass(frozen=True)
class Template:
    """The writer of a tokenizer's own layout."""

    name: str
    """Of the model whose tokenizer it is."""
    tokenizer: PreTrainedTokenizerBase
    text: str
    """Jinja."""

    @classmethod
    def of(cls, name: str | None, revision: str | None) -> Template:
        """The chat template of a model. Raises UserError if there is none, or no such tokenizer."""
        if name is None:
            raise UserError(
                "data.template=model writes a conversation with the chat template of a tokenizer, and a"
                f" model trained from scratch has none; {INSTEAD}."
            )
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=False
            )
        except Exception as error:  # whatever the parser of a damaged file raises
            refuse_code(f"data.tokenizer={name}", error)
            raise UserError(
                f"data.tokenizer={name} cannot be loaded ({_line(error)}); {INSTEAD}."
            ) from error
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"data.template=model, but the tokenizer of {name} has no chat template; {INSTEAD}."
            ) from error
        return cls(name, tokenizer, _SAME_DAY + text if "strftime_now" in text else text)

    def __call__(
        self, row: Row, asked: Sequence[Message], answers: Sequence[str]
    ) -> tuple[str, tuple[str, ...]]:
        """See `Writer`."""
        prompt = self._rendered(row, asked, open_end=True)
        return prompt, tuple(self._answer(row, prompt, asked, answer) for answer in answers)

    def _answer(self, row: Row, prompt: str, asked: Sequence[Message], answer: str) -> str:
        whole = self._rendered(row, [*asked, Message("assistant", answer)], open_end=False)
        if not whole.startswith(prompt):
            raise UserError(
                f"{row.where}: the chat template of {self.name} writes a question otherwise once it is"
                f" answered, so that no answer can be told from its prompt; {INSTEAD}."
            )
        added = whole.removeprefix(prompt)
        end = self.tokenizer.eos_token
        kept, mark, after = added.rpartition(end) if end else ("", "", added)
        return kept if mark and not after.strip() else added

    def _rendered(self, row: Row, messages: Sequence[Message], open_end: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [asdict(message) for message in messages],
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=open_end,
            )
        except Exception as error:  # a template is a program, and says no by raising anything
            raise row.bad(
                "refused by the template",
                f"the chat template of {self.name} refuses it ({_line(error)})",
            ) from error
        return str(text)


def template_identity(name: str | None, revision: str | None) -> str:
    """What determines a model's chat template: the bytes of a folder's files, or a repository's commit.

    Known without loading anything, since a plan has to know it.
    """
    if name is None or not Path(name).is_dir():
        return f"{name}@{revision}"
    patterns = ("chat_template*", "special_tokens_map.json", "tokenizer_config.json")
    return rows.fingerprint(
        file for pattern in patterns for file in sorted(Path(name).glob(pattern))
    )


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
