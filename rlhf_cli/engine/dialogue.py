"""Draws whole dialogues: the policy's turns, what a task replies to each, and what it pays.

A dialogue is one stream of tokens after its prompt: turn, end token, reply, turn, end token, and so on.
The policy is asked for its turns and their end tokens only (mask 1). An end token between turns is not
attended to (attention 0): the policy learned from transcripts, in which no such token stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Answer(Protocol):
    """What a task says to a turn."""

    @property
    def text(self) -> str:
        """What stands before the next turn."""
        ...

    @property
    def reward(self) -> float:
        """What the turn is paid."""
        ...

    @property
    def done(self) -> bool:
        """Whether the dialogue is over."""
        ...


class Partner(Protocol):
    """The other side of a dialogue."""

    @property
    def max_turns(self) -> int:
        """Of the policy, at most."""
        ...

    def reply(self, prompt: str, turns: Sequence[str]) -> Answer:
        """To the last of the turns since the prompt."""
        ...


@dataclass
class Line:
    """One dialogue as it grows."""

    prompt: str
    context: list[int]
    """Ids of all that was said, prompt included, without end tokens."""
    ids: list[int] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    attention: list[bool] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    done: bool = False

    def say(self, ids: Sequence[int], own: bool) -> None:
        """Append a turn of the policy's own, or a reply to it."""
        self.ids += ids
        self.mask += [float(own)] * len(ids)
        self.attention += [True] * len(ids)
        self.reward += [0.0] * len(ids)


Drawn = Callable[[list[list[int]], Tensor], list[list[int]]]
"""Contexts and uniforms [n,T] to one turn each, the end token included where one was drawn."""


def converse(
    lines: Sequence[Line],
    partner: Partner,
    draw: Drawn,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    uniform: Tensor,
    end: int,
) -> None:
    """Carries every dialogue to its end; it is over, too, when the stream has no room for more.

    uniform: [n,T], one draw for each place in the stream: T is the longest dialogue in tokens.
    """
    longest = uniform.shape[1]
    for _ in range(partner.max_turns):
        open_ = [i for i, line in enumerate(lines) if not line.done]
        if not open_:
            return
        used = [len(lines[i].ids) for i in open_]
        ahead = torch.zeros(len(open_), longest - min(used))
        for row, (i, at) in enumerate(zip(open_, used, strict=True)):
            ahead[row, : longest - at] = uniform[i, at:]
        turns = draw([lines[i].context for i in open_], ahead)
        for i, at, turn in zip(open_, used, turns, strict=True):
            _exchange(lines[i], partner, turn[: longest - at], encode, decode, longest, end)


def _exchange(
    line: Line,
    partner: Partner,
    turn: list[int],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    longest: int,
    end: int,
) -> None:
    """One turn and the reply to it."""
    ended = turn[-1:] == [end]
    said = turn[:-1] if ended else turn
    line.say(turn, own=True)
    line.turns.append(decode(said))
    answer = partner.reply(line.prompt, line.turns)
    line.reward[-1] = answer.reward
    reply = [] if answer.done else encode(answer.text)
    line.done = answer.done or not ended or len(line.ids) + len(reply) >= longest
    if line.done:
        return
    line.attention[-1] = False
    line.say(reply, own=False)
    line.context += [*said, *reply]
