"""Anthropic HH-RLHF (Bai et al. 2022, arXiv:2204.05862) and its embedded counterpart.

A row holds two whole transcripts. The prompt is everything up to and including the last
`"\\n\\nAssistant:"`, which both must share; the answers are what follows. Rows of which that is not
true are left out and counted by cause. Preferred answers double as demonstrations.

First human turns recur across rows, so the splits are made disjoint by them: a training row whose
first human turn occurs in the held-out files is left out too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.data import embedded_hh, rows
from rlhf_cli.data.answers_hh import write
from rlhf_cli.data.corpus import Corpus, Demo, Drops, Pair, Split, require_rows, unique
from rlhf_cli.data.embedded import Embedded, fingerprint, generate
from rlhf_cli.data.gold_hh import gold
from rlhf_cli.recipes import STRICT, Count

ASSISTANT = "\n\nAssistant:"
COLUMNS = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, config=STRICT)
class HH:
    """Conversations with two continuations, one preferred."""

    name: str
    """The word for the data in run names."""
    source: Literal["embedded", "path", "hub"]
    """embedded: generated; path: files under `path`; hub: downloaded."""
    path: str | None
    """Folder with <subset>/{train,test}.jsonl.gz; read only if source is path."""
    hub: str
    """Repository on the hub; read only if source is hub."""
    revision: str
    """Its commit."""
    subsets: tuple[str, ...]
    """Folders to read, in order."""
    max_prompt_tokens: Count
    """Longest prompt in tokens."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included."""
    embedded: Embedded
    """The generated corpus; read only if source is embedded."""

    pays: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """`hh`, or `hh-embedded`, so that nobody takes one for the other."""
        return f"{self.name}-embedded" if self.source == "embedded" else self.name

    def load(self) -> Corpus:
        """Read or generate every row."""
        if self.source == "embedded":
            return generate(self.title, self.embedded, embedded_hh.pose, write, gold)
        drops = Drops()
        heldout = [pair for _, pair in self._pairs("test", drops)]
        taken = {first_turn(pair.prompt) for pair in heldout}
        train = []
        for where, pair in self._pairs("train", drops):
            if first_turn(pair.prompt) in taken:
                drops.add("first turn is held out", where)
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
            return rows.fingerprint(rows.locate(self.path, self._stems("train", "test")))
        return f"{self.hub}@{self.revision}"

    def _stems(self, *splits: str) -> list[str]:
        return [f"{subset}/{split}" for split in splits for subset in self.subsets]

    def _rows(self, split: str) -> Iterator[rows.Row]:
        if self.source == "path":
            for file in rows.locate(self.path, self._stems(split)):
                yield from rows.read_file(file, COLUMNS)
        else:
            for subset in self.subsets:
                yield from rows.read_hub(self.hub, self.revision, split, COLUMNS, folder=subset)

    def _pairs(self, split: str, drops: Drops) -> Iterator[tuple[str, Pair]]:
        for row in self._rows(split):
            chosen, rejected = row.text["chosen"], row.text["rejected"]
            if cause := fault(chosen, rejected):
                drops.add(cause, row.where)
            else:
                prompt, answer = last_answer(chosen)
                yield row.where, Pair(prompt, answer, last_answer(rejected)[1])


def last_answer(transcript: str) -> tuple[str, str]:
    """Prompt and answer; together they are the transcript."""
    before, mark, answer = transcript.rpartition(ASSISTANT)
    return before + mark, answer


def fault(chosen: str, rejected: str) -> str | None:
    """Why two transcripts are not two answers to one prompt, or None if they are."""
    if last_answer(chosen)[0] != last_answer(rejected)[0]:
        return "prompts differ"
    if chosen == rejected:
        return "identical pair"
    if not (last_answer(chosen)[1].strip() and last_answer(rejected)[1].strip()):
        return "empty answer"
    if not (_turns_alternate(chosen) and _turns_alternate(rejected)):
        return "broken role order"
    return None


def first_turn(prompt: str) -> str:
    """What the human said first."""
    return _TURN.split(prompt)[2].strip()


def _turns_alternate(transcript: str) -> bool:
    before, *turns = _TURN.split(transcript)
    roles = turns[::2]
    return not before and bool(roles) and roles == ["Human", "Assistant"] * (len(roles) // 2)


def _split(pairs: list[Pair]) -> Split:
    demos = unique(Demo(pair.prompt, pair.chosen) for pair in pairs)
    return Split(demos, tuple(pairs), unique(pair.prompt for pair in pairs))
