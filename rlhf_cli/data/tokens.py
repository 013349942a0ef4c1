"""Text to token ids: the one rendering used for training, sampling and scoring.

A prompt and a response are encoded apart and laid side by side, so that what is learned, drawn and
scored has the boundary in the same place, whatever merges the tokenizer would make across it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from filelock import FileLock

from rlhf_cli.data.corpus import Dataset
from rlhf_cli.store.files import disk, sha256, to_disk

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

REVISION = 2
"""Raised by hand when the same text gets other ids, so that no cache of older ones is read."""
AT_ONCE = 1024
"""Texts per call of the tokenizer, which works on them in parallel."""

FILES, DIGESTS = ("ids.npy", "ends.npy"), "sha256.json"

Ids: TypeAlias = list[int]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, the longest prompt and response, and how a longer prompt is made to fit."""

    tokenizer: PreTrainedTokenizerBase
    longest_prompt: int
    longest_response: int
    shorter: Callable[[str], str | None]
    """`Dataset.shorter`."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: Dataset) -> Encoder:
        """With the dataset's limits."""
        return cls(tokenizer, data.max_prompt_tokens, data.max_response_tokens, data.shorter)

    def prompt(self, text: str) -> Ids:
        """Ids of a prompt: shortened until it fits, with exactly one start token if there is one."""
        return self.prompts([text])[0]

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of prompts."""
        both = zip(texts, self._ids(texts), strict=True)
        return [self._fitted(text, ids) for text, ids in both]

    def response(self, text: str) -> Ids:
        """Ids of a response and the end token."""
        return self.responses([text])[0]

    def responses(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of responses, each with the end token.

        A response of more than `longest_response` tokens is cut and then has no end token: a cut must
        not teach the policy that the answer was over.
        """
        end = int(self.tokenizer.eos_token_id)
        return [[*ids, end][: self.longest_response] for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        ids: list[Ids] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _start(self) -> Ids:
        """The start token, if there is one: a tokenizer has to be tried to know."""
        return [int(self.tokenizer.bos_token_id)] if uses_bos(self.tokenizer) else []

    def _fitted(self, text: str, ids: Ids) -> Ids:
        """The first shorter version that fits; what none makes fit loses its beginning.

        Found by halving, since each version has fewer tokens than the one before: a post that loses a word
        at a time has hundreds.
        """
        body, room = self._body(ids), self.longest_prompt - len(self._start)
        if len(body) > room and (versions := self._versions(text)):
            fits = bisect_left(versions, True, key=lambda cut: len(self._body_of(cut)) <= room)
            body = self._body_of(versions[min(fits, len(versions) - 1)])
        return self._start + body[max(0, len(body) - room) :]

    def _versions(self, text: str) -> list[str]:
        """Ever shorter ones."""
        found = []
        while (cut := self.shorter(text)) is not None:
            found.append(text := cut)
        return found

    def _body_of(self, text: str) -> Ids:
        return self._body(self._ids([text])[0])

    def _body(self, ids: Ids) -> Ids:
        """Without the start token: a rendering that opens with it, as chat templates do, gets no second."""
        return ids[1:] if self._start and ids[:1] == self._start else ids

    def identity(self) -> bytes:
        """What decides the ids of a text, for the name of a cache."""
        tokenizer: Any = self.tokenizer
        core = getattr(tokenizer, "backend_tokenizer", None)
        told = core.to_str() if core is not None else repr(sorted(tokenizer.get_vocab().items()))
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, bool(self._start))
        how = getattr(self.shorter, "__func__", self.shorter).__qualname__
        rest = (REVISION, ends, self.longest_prompt, self.longest_response, how)
        return f"{told}{rest}".encode()


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself opens a text with its start token."""
    probe = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]


class Encoded(Sequence[tuple[Ids, ...]]):
    """Rows of a few id lists each, read from a file in place: nothing is kept until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._ends = (np.load(folder / name, mmap_mode="r") for name in FILES)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> NDArray[Any]:
        """[rows, lists] ids in each list of each row."""
        return np.diff(self._ends.ravel(), prepend=0).reshape(self._ends.shape)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        at = int(self._ends[row - 1, -1]) if row else 0
        cuts = [at, *map(int, self._ends[row])]
        return tuple(self._ids[a:b].tolist() for a, b in pairwise(cuts))


def encoded(
    encoder: Encoder,
    rows: Sequence[tuple[str, ...]],
    cache: Path,
    told: Callable[[int, int], None],
) -> Encoded:
    """(prompt, response, …) rows as ids, out of the cache if they were encoded before.

    The first process that comes encodes and tells how far it is (rows done, rows in all); the others
    wait for it. A cache is written under another name first, and read through against its digests on each
    opening: 1.4 seconds per GB, about what it takes to hash the texts for its name. One that is damaged is
    made anew. Raises UserError if the disk refuses.
    """
    folder = cache / "tokens" / _name(encoder, rows)
    if not _is_whole(folder):
        with disk(folder, "paths.cache"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not _is_whole(folder):
                    if folder.exists():
                        logging.getLogger(__name__).warning("%s is damaged: made anew", folder)
                    _write(encoder, rows, folder, told)
    return Encoded(folder)


def _is_whole(folder: Path) -> bool:
    """Whether it is there, as it was written, and holds numbers: whoever planted it may know of digests."""
    try:
        digests = json.loads((folder / DIGESTS).read_bytes())
        return all(
            sha256(folder / name) == digests[name]
            and np.load(folder / name, mmap_mode="r").dtype.kind == "i"
            for name in FILES
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _name(encoder: Encoder, rows: Iterable[tuple[str, ...]]) -> str:
    sha = hashlib.sha256(encoder.identity())
    for row in rows:
        for text in row:
            data = text.encode()
            sha.update(len(data).to_bytes(8, "big"))
            sha.update(data)
        sha.update(b"\n")
    return sha.hexdigest()[:24]


def _write(
    encoder: Encoder,
    rows: Sequence[tuple[str, ...]],
    folder: Path,
    told: Callable[[int, int], None],
) -> None:
    parts: list[NDArray[Any]] = []
    lengths: list[list[int]] = []
    for at in range(0, len(rows), AT_ONCE):
        some = rows[at : at + AT_ONCE]
        prompts, *answers = zip(*some, strict=True)
        columns = [encoder.prompts(prompts), *map(encoder.responses, answers)]
        for row in zip(*columns, strict=True):
            lengths.append([len(ids) for ids in row])
            parts.append(np.fromiter((i for ids in row for i in ids), dtype=np.int32))
        told(at + len(some), len(rows))
    columns_each = len(lengths[0]) if lengths else 1
    ends = np.array(lengths, dtype=np.int64).cumsum().reshape(len(rows), columns_each)
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    fresh = folder.with_suffix(".part")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        for name, array in zip(FILES, (ids, ends), strict=True):
            np.save(fresh / name, array)
        digests = {name: sha256(fresh / name) for name in FILES}
        (fresh / DIGESTS).write_text(json.dumps(digests))
        to_disk(fresh)
        shutil.rmtree(folder, ignore_errors=True)  # who still reads it keeps what it reads
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
