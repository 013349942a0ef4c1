"""Anthropic HH-RLHF (Bai et al. 2022, arXiv:2204.05862) and its embedded counterpart.

A row holds two whole transcripts. The prompt is everything up to and including the last
`"\\n\\nAssistant:"`, which both must share; the answers are what follows. Where a row has a column `prompt`
(the shape of Dahoas/rm-static), chosen and rejected are the bare answers to it, and the same must hold.
Preferred answers double as demonstrations.

First human turns recur across rows, so the splits are made disjoint by them: a training row whose
first human turn occurs in the held-out files is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from rlhf_cli.data import embedded_hh, rows, transcript
from rlhf_cli.data.answers_hh import write
from rlhf_cli.data.corpus import (
    Corpus,
    DatasetDefaults,
    Demo,
    Drops,
    OnBadRow,
    Pair,
    Split,
    require_rows,
    unique,
)
from rlhf_cli.data.embedded import fingerprint, generate
from rlhf_cli.data.gold_hh import gold
from rlhf_cli.data.rows import Row
from rlhf_cli.data.transcript import first_turn
from rlhf_cli.recipes import STRICT, Count

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
COLUMNS = ("chosen", "rejected")

Subset: TypeAlias = Literal[
    "helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"
]


def _each_once(subsets: tuple[Subset, ...]) -> tuple[Subset, ...]:
    if not subsets or len(set(subsets)) < len(subsets):
        raise ValueError("name at least one subset, and each only once")
    return subsets


@dataclass(frozen=True, config=STRICT)
class HH(DatasetDefaults):
    """Conversations with two continuations, one preferred."""

    name: str
    """The word for the data in run names."""
    source: Literal["embedded", "path", "hub"]
    """embedded: generated; path: files under `path`; hub: downloaded."""
    path: str | None
    """Folder with <subset>/{train,test}.jsonl.gz, or another suffix; read only if source is path."""
    hub: str
    """Repository on the hub; read only if source is hub."""
    revision: str
    """Its commit."""
    subsets: Annotated[tuple[Subset, ...], AfterValidator(_each_once)]
    """Folders to read, in order."""
    on_bad_row: OnBadRow
    """error: the first bad row ends it; drop: bad rows are left out and counted."""
    max_prompt_tokens: Count
    """Longest prompt in tokens."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included."""
    embedded: embedded_hh.Knobs
    """The generated corpus; read only if source is embedded."""

    @property
    def title(self) -> str:
        """`hh`, or `hh-embedded`, so that nobody takes one for the other."""
        return f"{self.name}-embedded" if self.source == "embedded" else self.name

    @property
    def has_gold(self) -> bool:
        """Only what the project generates has a known reward."""
        return self.source == "embedded"

    @property
    def repositories(self) -> Mapping[str, str]:
        """The one that is read, if any."""
        return {self.hub: self._commit()} if self.source == "hub" else {}

    def load(self) -> Corpus:
        """Read or generate every row."""
        if self.source == "embedded":
            topics = embedded_hh.ALL[: self.embedded.topics]
            pose, answer = partial(embedded_hh.pose, topics=topics), partial(write, topics=topics)
            return generate(self.title, self.embedded, pose, answer, gold)
        drops = Drops(self.on_bad_row)
        heldout = [pair for _, pair in self._pairs("test", drops)]
        taken = {first_turn(pair.prompt) for pair in heldout}
        train = []
        for row, pair in self._pairs("train", drops):
            if first_turn(pair.prompt) in taken:
                drops.add("first turn is held out", row.where)
            else:
                train.append(pair)
        corpus = Corpus(self.title, _split(train), _split(heldout), drops.frozen(), gold=None)
        require_rows(
            corpus, f"data.path={self.path}" if self.source == "path" else "data.source=hub"
        )
        return corpus

    def fingerprint(self) -> str:
        """The generator and its knobs, the bytes of the files, or the commit on the hub."""
        if self.source == "embedded":
            return fingerprint(embedded_hh.REVISION, self.embedded)
        if self.source == "path":
            files = rows.locate(self.path, self._stems("train", "test"))
            return rows.fingerprint(chain.from_iterable(files))
        return f"{self.hub}@{self._commit()}"

    def shorter(self, prompt: str) -> str | None:
        """The prompt without its oldest exchange; None where only one human turn is left."""
        return transcript.shorter(prompt)

    def _stems(self, *splits: str) -> list[str]:
        return [f"{subset}/{split}" for split in splits for subset in self.subsets]

    def _commit(self) -> str:
        return rows.pinned("data.revision", self.hub, self.revision)

    def _rows(self, split: str, drops: Drops) -> Iterator[tuple[Subset, Iterator[Row]]]:
        """By subset."""
        if self.source == "path":
            found = rows.locate(self.path, self._stems(split))
            for subset, files in zip(self.subsets, found, strict=True):
                yield subset, chain.from_iterable(rows.read(file, drops) for file in files)
        else:
            for subset in self.subsets:
                commit = self._commit()
                yield subset, rows.read_hub(self.hub, commit, split, COLUMNS, folder=subset)

    def _pairs(self, split: str, drops: Drops) -> Iterator[tuple[Row, Pair]]:
        for subset, found in self._rows(split, drops):
            for row, pair in drops.parsed(found, pair_of):
                yield row, replace(pair, subset=subset)


def pair_of(row: Row) -> Pair:
    """The pair in a row of either shape. Raises BadRow unless it is two answers to one prompt."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if row.values.get("prompt") is None:
        (prompt, chosen), (other, rejected) = last_answer(chosen), last_answer(rejected)
        if prompt != other:
            raise row.bad("prompts differ", "chosen and rejected do not answer the same prompt")
    else:
        prompt = row.text("prompt")
    if chosen == rejected:
        raise row.bad("identical pair", "chosen and rejected are the same")
    for column, answer in zip(COLUMNS, (chosen, rejected), strict=True):
        if not answer.strip():
            raise row.bad("empty answer", f"the answer in column {column} is empty")
    alternate = first_turn(prompt) is not None
    if not (alternate and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)) or any(
        transcript.TURN.search(answer) for answer in (chosen, rejected)
    ):
        raise row.bad(
            "broken role order",
            "Human and Assistant do not take turns in it, Human first and Assistant last",
        )
    return Pair(prompt, chosen, rejected, where=row.where)


def last_answer(whole: str) -> tuple[str, str]:
    """Prompt and answer of a transcript; together they are the transcript."""
    before, mark, answer = whole.rpartition(ASSISTANT)
    return before + mark, answer


def _split(pairs: list[Pair]) -> Split:
    demos = unique(Demo(pair.prompt, pair.chosen, pair.where) for pair in pairs)
    return Split(demos, tuple(pairs), unique(pair.prompt for pair in pairs))
