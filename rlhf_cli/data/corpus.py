"""What a dataset hands to the stages: demonstrations, preference pairs and prompts, in two splits.

A prompt ends where the answer begins (`"\\n\\nAssistant:"` in HH, `"TL;DR:"` in TL;DR). A response
is the text that follows it, leading space included and without an end token, so `prompt + response`
is the transcript. Nothing here knows about tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

from rlhf_cli.errors import UserError

Gold: TypeAlias = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Prompts and responses, one to one, to true scores; known only where the project made the data."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """What a task answers to a turn of the assistant."""

    text: str
    """What stands in the transcript between this turn and the next; empty once the dialogue is over."""
    reward: float
    """What the turn is paid."""
    done: bool
    """Whether the dialogue is over."""


class Task(Protocol):
    """The other side of a dialogue, which also pays; pure, so that any process can play any part of it."""

    @property
    def max_turns(self) -> int:
        """Turns of the assistant after which a dialogue is over in any case."""
        ...

    def reply(self, prompt: str, turns: Sequence[str]) -> Reply:
        """To the last of the assistant's turns since the prompt.

        Raises ValueError if the prompt is none of the task's, or if the dialogue was over before.
        """
        ...


@dataclass(frozen=True)
class Demo:
    """One answer to learn from by imitation."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Split:
    """Rows in a fixed order; `prompts` are distinct."""

    demos: tuple[Demo, ...]
    pairs: tuple[Pair, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Two splits that share no prompt, and what there is to say about them."""

    title: str
    """What to call the data in titles and tables; embedded data always says so."""
    train: Split
    heldout: Split
    drops: Mapping[str, tuple[str, ...]]
    """Why rows were left out, and which: cause -> "file:line"."""
    gold: Gold | None
    task: Task | None = None
    """Who answers where a prompt opens a dialogue; None where the first answer is the last."""
    digest: str = field(init=False)
    """SHA-256 over every row of both splits, order included."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", _digest(self.train, self.heldout))


class Dataset(Protocol):
    """A frozen dataclass whose fields say where the rows come from."""

    @property
    def name(self) -> str:
        """The word that chose it, e.g. hh."""
        ...

    @property
    def title(self) -> str:
        """`Corpus.title`, known without loading."""
        ...

    @property
    def pays(self) -> bool:
        """Whether its task pays for what is said; then no reward model is in the chain."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens; what to do about longer ones is the stages' business."""
        ...

    @property
    def max_response_tokens(self) -> int:
        """Longest response in tokens, the end token included."""
        ...

    def load(self) -> Corpus:
        """Read or generate every row. Raises UserError for anything wrong with the input."""
        ...

    def fingerprint(self) -> str:
        """What of the rows enters a run's key; the same bytes say the same wherever they lie."""
        ...


@dataclass
class Drops:
    """Collects what is left out while rows are read."""

    causes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, where: str) -> None:
        """Note that the row at `where` ("file:line") was left out because of `cause`."""
        self.causes.setdefault(cause, []).append(where)

    def frozen(self) -> dict[str, tuple[str, ...]]:
        """The notes so far, as `Corpus.drops`."""
        return {cause: tuple(rows) for cause, rows in self.causes.items()}


def unique(items: Iterable[T], key: Callable[[T], Hashable] = lambda item: item) -> tuple[T, ...]:
    """The first item of each key, in order."""
    return tuple({key(item): item for item in reversed(list(items))}.values())[::-1]


def require_rows(corpus: Corpus, source: str) -> None:
    """Raise UserError if a split lacks demonstrations, pairs or prompts."""
    for name, split in (("training", corpus.train), ("held-out", corpus.heldout)):
        for kind in ("demos", "pairs", "prompts"):
            if not getattr(split, kind):
                dropped = sum(map(len, corpus.drops.values()))
                raise UserError(
                    f"{source}: the {name} split of {corpus.title} has no {kind} ({dropped} rows "
                    "were unusable); give files with usable rows or choose another data.source."
                )


def _digest(*splits: Split) -> str:
    sha = hashlib.sha256()
    for split in splits:
        rows = [
            [[d.prompt, d.response] for d in split.demos],
            [[p.prompt, p.chosen, p.rejected] for p in split.pairs],
            list(split.prompts),
        ]
        sha.update(json.dumps(rows).encode())
    return sha.hexdigest()
