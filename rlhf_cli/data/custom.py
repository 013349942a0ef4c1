"""A user's own data: rows of any shape (`custom_rows`), from a file, a folder or the hub.

Two splits share no first human turn. A held-out split that comes with the data is taken as it is, and
training rows on its first turns are left out and counted; without one, a share of the first turns of
each shape is held out, those with the smallest SHA-256, so that more rows move few of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.data import rows, transcript
from rlhf_cli.data.chat import Template, Writer, template_identity
from rlhf_cli.data.chat import transcript as write_transcript
from rlhf_cli.data.corpus import Corpus, DatasetDefaults, Drops, OnBadRow
from rlhf_cli.data.custom_rows import Columns, Example, Parser, Shape
from rlhf_cli.data.custom_split import split_of
from rlhf_cli.data.rows import Row
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import STRICT, Count

Part = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class Splits:
    """Names of files in a folder, without suffix, or of splits on the hub."""

    train: str
    heldout: tuple[str, ...]
    """The first that is there is read; if none is, a share of the rows is held out."""


@plain_dataclass(frozen=True)
class Survey:
    """What was read, enough for a run or not."""

    origin: str
    """The setting that named the rows."""
    corpus: Corpus
    shapes: Mapping[str, Mapping[Shape, int]]
    """Rows by shape in "training" and "held-out"."""
    unread: frozenset[str]
    """Columns in which rows hold something that is not read."""

    def usable(self) -> Corpus:
        """The corpus, if every split has what any run needs: demonstrations for SFT, and prompts.

        Pairs are not among it: SFT alone needs none, nor does a reward that is not learned. Raises UserError.
        """
        left_out = sum(map(len, self.corpus.drops.values()))
        for name, split in (("training", self.corpus.train), ("held-out", self.corpus.heldout)):
            if not split.prompts:
                raise UserError(
                    f"{self.origin}: no row is left for the {name} split ({left_out} left out); give rows"
                    " on more than one first human turn, or mend those that `rlhf data check` lists."
                )
            if not split.demos:
                raise UserError(
                    f"{self.origin}: no row of the {name} split has an answer to imitate, with which every"
                    " run begins (SFT); add rows with prompt and response, with messages, or with chosen"
                    " and rejected."
                )
        return self.corpus


@dataclass(frozen=True, config=STRICT)
class Custom(DatasetDefaults):
    """Rows of a user's own."""

    name: str
    """The word for the data in run names."""
    source: Literal["path", "hub"]
    """path: a file or a folder; hub: downloaded."""
    path: str | None
    """The file, or a folder with a file per split; read only if source is path."""
    hub: str | None
    """Repository on the hub; read only if source is hub."""
    revision: str | None
    """Its commit."""
    splits: Splits
    """What splits are called in a folder or on the hub."""
    heldout: Part
    """Share of the first human turns that is held out where no split is."""
    columns: Columns
    """What the data call each column."""
    template: Literal["model", "transcript"]
    """How conversations are written: by the chat template of a tokenizer, or in the layout of HH."""
    tokenizer: str | None
    """Repository or folder of the tokenizer whose chat template is used."""
    tokenizer_revision: str | None
    """Its commit."""
    on_bad_row: OnBadRow
    """error: the first bad row ends it; drop: bad rows are left out and counted."""
    max_prompt_tokens: Count
    """Longest prompt in tokens."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included."""

    @property
    def title(self) -> str:
        """The name."""
        return self.name

    @property
    def repositories(self) -> Mapping[str, str]:
        """The one that is read, if any."""
        return dict([self._repository()]) if self.source == "hub" else {}

    def load(self) -> Corpus:
        """Read every row."""
        return self.survey().usable()

    def fingerprint(self) -> str:
        """The bytes of the files, or the commit on the hub; and the chat template, if one is used."""
        if self.source == "hub":
            said = "@".join(self._repository())
        else:
            said = " ".join(map(rows.fingerprint, self._files()))
        if self.template == "model":
            said += f" {template_identity(self.tokenizer, self.tokenizer_revision)}"
        return said

    def shorter(self, prompt: str) -> str | None:
        """A transcript without its oldest exchange; None for the last one, and for other texts."""
        return transcript.shorter(prompt)

    def survey(self) -> Survey:
        """Read every row, and leave it open whether that is enough for a run."""
        drops, unread = Drops(self.on_bad_row), set[str]()
        parse = Parser(self.columns, cache(self._writer))

        def examples(found: Iterable[Row]) -> Iterator[Example]:
            ids: dict[str | int, str] = {}
            for row, example in drops.parsed(found, lambda row: self._known(ids, row, parse(row))):
                held = {name for name, value in row.values.items() if value is not None}
                unread.update(held - example.read)
                yield example

        train_rows, heldout_rows = self._rows(drops)
        train = list(examples(train_rows))
        heldout = list(examples(heldout_rows)) if heldout_rows is not None else []
        taken = {example.opening for example in heldout}
        if heldout_rows is None:
            taken = self._picked(train)
            heldout = [example for example in train if example.opening in taken]
        else:
            for example in train:
                if example.opening in taken:
                    drops.add("first turn is held out", example.where)
        train = [example for example in train if example.opening not in taken]
        splits = split_of(train, drops), split_of(heldout, drops)
        return Survey(
            f"data.path={self.path}" if self.source == "path" else f"data.hub={self.hub}",
            Corpus(self.title, *splits, drops.frozen(), gold=None),
            {"training": _shapes(train), "held-out": _shapes(heldout)},
            frozenset(unread - {self.columns.id}),
        )

    def _known(self, ids: dict[str | int, str], row: Row, example: Example) -> Example:
        """The example, if its row has no id of an earlier one."""
        name = None if self.columns.id is None else row.values.get(self.columns.id)
        if name is None:
            return example
        if not isinstance(name, (str, int)):
            raise row.bad("wrong type", f"column {self.columns.id} holds neither text nor a number")
        if name in ids:
            raise row.bad(
                "repeated id", f"its id is that of {ids[name]} (data.columns.id=null reads none)"
            )
        ids[name] = row.where
        return example

    def _picked(self, examples: Sequence[Example]) -> set[str]:
        """A share of the first turns of each shape: at least one, and not all."""
        picked = set()
        for shape in {example.shape for example in examples}:
            turns = {example.opening for example in examples if example.shape == shape}
            count = min(max(1, round(self.heldout * len(turns))), len(turns) - 1)
            picked.update(sorted(turns, key=_sha)[:count])
        return picked

    def _writer(self) -> Writer:
        if self.template == "transcript":
            return write_transcript
        return Template.of(self.tokenizer, self.tokenizer_revision)

    def _rows(self, drops: Drops) -> tuple[Iterator[Row], Iterator[Row] | None]:
        """Of the training split and of the held-out one, if there is one."""
        if self.source == "path":
            train, heldout = self._files()
            return _read(train, drops), _read(heldout, drops) if heldout else None
        repository, commit = self._repository()
        there = rows.hub_splits(repository, commit)
        if self.splits.train not in there:
            raise UserError(
                f"data.splits.train={self.splits.train} is no split of {repository}; choose one of"
                f" {', '.join(there)}."
            )
        held = next((name for name in self.splits.heldout if name in there), None)
        found = partial(rows.read_hub, repository, commit, columns=())
        return found(self.splits.train), found(held) if held else None

    def _repository(self) -> tuple[str, str]:
        if self.hub is None:
            raise UserError(
                "data.hub is not set, but data.source=hub reads it; add data.hub=OWNER/NAME."
            )
        return self.hub, rows.pinned("data.revision", self.hub, self.revision)

    def _files(self) -> tuple[list[Path], list[Path]]:
        """Of the training split and of the held-out one, if there is one."""
        if self.path is None:
            raise UserError("data.path is not set; add data.path=FILE, or data.path=DIR.")
        path = Path(self.path).expanduser()
        if path.is_file():
            return [path], []
        if not path.is_dir():
            raise UserError(
                f"data.path={self.path} is neither a file nor a folder that can be read; give one."
            )
        (train,) = rows.locate(self.path, [self.splits.train])
        found = (rows.files_of(path, name) for name in self.splits.heldout)
        return train, next(filter(None, found), [])


def _read(files: Iterable[Path], drops: Drops) -> Iterator[Row]:
    return chain.from_iterable(rows.read(file, drops) for file in files)


def _shapes(examples: Iterable[Example]) -> Mapping[Shape, int]:
    return Counter(example.shape for example in examples)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
