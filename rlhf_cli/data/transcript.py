"""The layout of HH for a conversation: a prompt ends in `"\\n\\nAssistant:"`, an answer follows it.

    "\\n\\nHuman: first\\n\\nAssistant: answer\\n\\nHuman: second\\n\\nAssistant:"

What a system said, if anything, stands before the first turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def render(turns: Sequence[tuple[str, str]]) -> str:
    """The prompt that (role, text) turns make; roles are user and assistant, or system for the first."""
    said = (f"\n\n{_SPEAKERS[role]}: {text}" if role in _SPEAKERS else text for role, text in turns)
    return "".join([*said, "\n\nAssistant:"])


def first_turn(prompt: str) -> str | None:
    """What the human said first; None if the prompt has another layout."""
    marks = _marks(prompt)
    return prompt[marks[0].end() : marks[1].start()].strip() if marks else None


def shorter(prompt: str) -> str | None:
    """The prompt without its oldest exchange; None if there is one human turn, or another layout."""
    marks = _marks(prompt)
    return prompt[: marks[0].start()] + prompt[marks[2].start() :] if len(marks) > 2 else None


def _marks(prompt: str) -> list[re.Match[str]]:
    """Where turns begin, if they alternate from the human's to an empty one of the assistant."""
    marks = list(TURN.finditer(prompt))
    roles = [mark[1] for mark in marks]
    alternate = roles == ["Human", "Assistant"] * (len(roles) // 2)
    return marks if marks and alternate and not prompt[marks[-1].end() :].strip() else []
