"""What a dataset hands to the stages: demonstrations, preference pairs and prompts, in two splits.

A prompt ends where the answer begins (`"\\n\\nAssistant:"` in HH, `"TL;DR:"` in TL;DR). A response
is the text that follows it, leading space included and without an end token, so `prompt + response`
is the transcript. Nothing here knows about tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

from rlhf_cli.errors import UserError

Gold: TypeAlias = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Prompts and responses, one to one, to true scores; known only where the project made the data."""

R = TypeVar("R")
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
    where: str = field(default="", compare=False)
    """ "file:line" of the row it was made of, if it was read; in no digest."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the preferred one first."""

    prompt: str
    chosen: str
    rejected: str
    subset: str = field(default="", compare=False, kw_only=True)
    """The part of the data it is from, for those who report by part; empty where there are no parts. It
    changes nothing that is learned, so it is in no digest."""
    where: str = field(default="", compare=False)
    """As for a demonstration."""


@dataclass(frozen=True)
class Split:
    """Rows in a fixed order; `prompts` are distinct."""

    demos: tuple[Demo, ...]
    pairs: tuple[Pair, ...]
    prompts: tuple[str, ...]

    def answers(self) -> dict[str, str]:
        """The data's own answer to a prompt: its first demonstration, else its first preferred response."""
        rows = [(demo.prompt, demo.response) for demo in self.demos]
        rows += [(pair.prompt, pair.chosen) for pair in self.pairs]
        return dict(reversed(rows))


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
        object.__setattr__(self, "digest", digest(_rows(self.train), _rows(self.heldout)))

    def pinned(self, count: int) -> tuple[str, ...]:
        """The prompts of every evaluation: the first of the held-out split, fewer only if it has fewer."""
        return self.heldout.prompts[:count]

    def splits(self) -> dict[str, Split]:
        """Both, by what they are called to people."""
        return {"training": self.train, "held-out": self.heldout}


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
    def has_gold(self) -> bool:
        """Whether `Corpus.gold` will be there, known without loading."""
        ...

    @property
    def has_references(self) -> bool:
        """Whether a response may be held against the data's own answer word by word, as a summary may."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens."""
        ...

    @property
    def max_response_tokens(self) -> int:
        """Longest response in tokens, the end token included."""
        ...

    @property
    def repositories(self) -> Mapping[str, str]:
        """What the rows are read from on the hub, with the commit of each; empty if nothing is."""
        ...

    def shorter(self, prompt: str) -> str | None:
        """The next shorter version of a prompt that is too long in tokens.

        None if there is none: what is still too long then loses its beginning token by token.
        """
        ...

    def load(self) -> Corpus:
        """Read or generate every row. Raises UserError for anything wrong with the input."""
        ...

    def fingerprint(self) -> str:
        """What of the rows enters a run's key; the same bytes say the same wherever they lie."""
        ...


class DatasetDefaults:
    """What is so of most datasets: nobody pays, nobody knows the truth, no answer is the only one, the rows
    are here, and a long prompt loses its beginning.
    """

    pays: ClassVar[bool] = False
    has_references: ClassVar[bool] = False

    @property
    def has_gold(self) -> bool:
        """No."""
        return False

    @property
    def repositories(self) -> Mapping[str, str]:
        """None."""
        return {}

    def shorter(self, prompt: str) -> str | None:
        """None."""
        return None


class BadRow(UserError):
    """What is wrong with one row; as a sentence for the user it says how to do without such rows."""

    def __init__(self, cause: str, where: str, what: str) -> None:
        super().__init__(
            f"{where}: {what}; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
        )
        self.cause, self.where = cause, where


OnBadRow: TypeAlias = Literal["error", "drop"]


@dataclass
class Drops:
    """Collects what is left out while rows are read, and refuses bad rows where that is wanted."""

    on_bad_row: OnBadRow
    """error: the first bad row ends it; drop: bad rows are left out and counted."""
    causes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, where: str) -> None:
        """Note that the good row at `where` ("file:line") was left out because of `cause`."""
        self.causes.setdefault(cause, []).append(where)

    def bad(self, row: BadRow) -> None:
        """Note a bad row, or raise it."""
        if self.on_bad_row == "error":
            raise row
        self.add(row.cause, row.where)

    def parsed(self, rows: Iterable[R], parse: Callable[[R], T]) -> Iterator[tuple[R, T]]:
        """Each row with what `parse` makes of it, less those of which it raises BadRow."""
        for row in rows:
            try:
                made = parse(row)
            except BadRow as bad:
                self.bad(bad)
            else:
                yield row, made

    def frozen(self) -> dict[str, tuple[str, ...]]:
        """The notes so far, as `Corpus.drops`."""
        return {cause: tuple(rows) for cause, rows in self.causes.items()}


def unique(items: Iterable[T], key: Callable[[T], Hashable] = lambda item: item) -> tuple[T, ...]:
    """The first item of each key, in order."""
    first: dict[Hashable, T] = {}
    for item in items:
        first.setdefault(key(item), item)
    return tuple(first.values())


def require_rows(corpus: Corpus, source: str) -> None:
    """Raise UserError if a split lacks demonstrations, pairs or prompts."""
    for name, split in corpus.splits().items():
        for kind in ("demos", "pairs", "prompts"):
            if not getattr(split, kind):
                raise UserError(
                    f"{source}: the {name} split of {corpus.title} has no {kind} ({_left_out(corpus)});"
                    " give files with usable rows or choose another data.source."
                )


def _left_out(corpus: Corpus) -> str:
    if not corpus.drops:
        return "no row was left out"
    cause, rows = max(corpus.drops.items(), key=lambda item: len(item[1]))
    count = sum(map(len, corpus.drops.values()))
    return f"rows left out: {count}, above all for '{cause}' as at {rows[0]}"


def _rows(split: Split) -> list[Any]:
    return [
        [[d.prompt, d.response] for d in split.demos],
        [[p.prompt, p.chosen, p.rejected] for p in split.pairs],
        list(split.prompts),
    ]


def digest(*parts: Sequence[Any]) -> str:
    """SHA-256 of them, order included."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(json.dumps(part).encode())
    return sha.hexdigest()
