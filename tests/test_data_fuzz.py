"""Mutilated rows and files: each row is taken or reported, nothing crashes, nothing takes for ever."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from rlhf_cli.data import hh, rows, tldr
from rlhf_cli.data.corpus import BadRow, Demo, Drops, Pair
from rlhf_cli.data.rows import Row
from rlhf_cli.errors import UserError
from tests.data_samples import (
    chat,
    compared,
    completed,
    judged,
    post,
    static,
    talk,
    write_bytes,
    write_rows,
)

LINES = 2000
"""Mutilated rows per format."""


def is_sound(made: object) -> None:
    """What every demonstration and pair that is taken must be."""
    assert isinstance(made, Demo | Pair)
    answers = [made.response] if isinstance(made, Demo) else [made.chosen, made.rejected]
    assert all(answer.strip() for answer in answers) and len(set(answers)) == len(answers)
    assert made.prompt.endswith(("\n\nAssistant:", "\n\nTL;DR:"))
    "".join((made.prompt, *answers)).encode()


def long_talk(n: int) -> dict[str, object]:
    turns = [f"turn {i} of {n}" for i in range(n % 4 * 2 + 1)]
    return {"chosen": chat(*turns, "good"), "rejected": chat(*turns, "bad")}


@dataclass(frozen=True)
class Format:
    """One shape of rows; whoever reads another one adds a line to FORMATS."""

    row: Callable[[int], dict[str, Any]]
    """A sound row by its number."""
    parser: Callable[[], Callable[[Row], object]]
    """A parser that has seen no row yet."""
    check: Callable[[Any], None] = is_sound
    """Asserts what must be true of anything that the parser takes."""


FORMATS = {
    "hh": Format(long_talk, lambda: hh.pair_of),
    "rm-static": Format(lambda n: static(f"q{n}"), lambda: hh.pair_of),
    "tldr by parts": Format(post, lambda: partial(tldr.new_demo, {})),
    "tldr rendered": Format(completed, lambda: partial(tldr.new_demo, {})),
    "tldr compared": Format(compared, lambda: tldr.pair_of),
    "tldr in the other style": Format(lambda n: compared(n, "\n", ""), lambda: tldr.pair_of),
    "tldr by openai": Format(lambda n: judged(n, n % 2), lambda: tldr.pair_of),
}

NUMBERS = [0, 1, -1, 0.5, float("nan"), 10**40]
ODD = [*NUMBERS, None, True, False, "", " ", "\n", "x", [], {}, [[]], {"text": "x"}]
MARKS = ["\n\nHuman:", "\n\nAssistant:", "TL;DR:", "\nPOST: ", "\nTITLE: ", "SUBREDDIT: r/"]
CHARACTERS = [
    "\0",
    "\x07",
    "\x1b[2J",
    "\x85",
    "\u2028",
    "\ufeff",
    "\u202e",
    "\ud800",
    "\udfff",
    "😀",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a row, at any depth."""
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def texts_in(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(where, key) for where, key in places(row) if isinstance(where[key], str)]


def inserted(rng: random.Random, row: dict[str, Any], what: str) -> None:
    where, key = rng.choice(texts_in(row))
    at = rng.randint(0, len(where[key]))
    where[key] = where[key][:at] + what + where[key][at:]


def swap(rng: random.Random, row: dict[str, Any]) -> None:
    one, other = rng.choices(list(row), k=2)
    row[one], row[other] = row[other], row[one]


def drop_or_rename(rng: random.Random, row: dict[str, Any]) -> None:
    value = row.pop(rng.choice(list(row)))
    if rng.random() < 0.5:
        row[rng.choice(["prompt", "chosen", "id", "Chosen", "", "\n"])] = value


def unmark(rng: random.Random, row: dict[str, Any]) -> None:
    where, key = rng.choice(texts_in(row))
    where[key] = where[key].replace(rng.choice(MARKS).strip(), "", 1)


def mark(rng: random.Random, row: dict[str, Any]) -> None:
    inserted(rng, row, rng.choice(MARKS))


def retype(rng: random.Random, row: dict[str, Any]) -> None:
    where, key = rng.choice(places(row))
    where[key] = deepcopy(rng.choice(ODD))


def control(rng: random.Random, row: dict[str, Any]) -> None:
    inserted(rng, row, rng.choice(CHARACTERS))


def blanks(rng: random.Random, row: dict[str, Any]) -> None:
    """A run of blanks, over which a careless pattern backtracks until the night."""
    inserted(rng, row, rng.choice("\n \t") * rng.choice((10, 20_000)))


def nest(rng: random.Random, row: dict[str, Any]) -> None:
    where, key = rng.choice(places(row))
    for _ in range(rng.choice((2, 200))):
        where[key] = [where[key]] if rng.random() < 0.5 else {"text": where[key]}


def same(rng: random.Random, row: dict[str, Any]) -> None:
    """Nothing: what is sound must be taken among all that is not."""


def flip(rng: random.Random, line: bytes) -> bytes:
    broken = bytearray(line)
    for _ in range(rng.randint(1, 4)):
        broken[rng.randrange(len(broken))] = rng.randrange(256)
    return bytes(broken)


def cut(rng: random.Random, line: bytes) -> bytes:
    return line[: rng.randrange(len(line))]


def twice(rng: random.Random, line: bytes) -> bytes:
    """A key that is there two times."""
    key = json.dumps(rng.choice(list(json.loads(line))))
    return f"{{{key}: {json.dumps(rng.choice(ODD))}, ".encode() + line[1:]


def huge(rng: random.Random, line: bytes) -> bytes:
    digits = b"9" * rng.choice((40, 5000))
    return rng.choice((b'{"a": ' + digits + b", " + line[1:], digits, line.replace(b"1", digits)))


def deep(rng: random.Random, line: bytes) -> bytes:
    return b'{"a": ' + rng.choice((b"[", b'{"a":')) * 20_000 + line


OF_ROWS = [swap, drop_or_rename, unmark, mark, retype, control, blanks, nest, same]
OF_LINES = [flip, cut, twice, huge, deep]


def mutilated(rng: random.Random, row: dict[str, Any]) -> bytes:
    how = rng.choice((*OF_ROWS, *OF_LINES))
    if how in OF_ROWS:
        how(rng, row)
    # Half a pair of surrogates becomes an escape, or bytes that are no UTF-8.
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return how(rng, line) if how in OF_LINES else line


@dataclass
class Complaints(Drops):
    """Drops that also keep the sentences, by where the row stands."""

    said: dict[str, str] = field(default_factory=dict)

    def bad(self, row: BadRow) -> None:
        self.said[row.where] = str(row)
        super().bad(row)


@pytest.mark.parametrize("name", FORMATS)
def test_every_mutilated_row_is_taken_or_reported(tmp_path, name):
    shape = FORMATS[name]
    rng = random.Random(name)
    text = b"\n".join(mutilated(rng, deepcopy(shape.row(n))) for n in range(LINES))
    file = write_bytes(tmp_path / "x/train.jsonl", text)
    written = [f"x/train.jsonl:{n}" for n, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    drops, start = Complaints("drop"), time.process_time()
    taken = list(drops.parsed(rows.read(file, drops), shape.parser()))
    assert time.process_time() - start < 10
    dropped = [where for found in drops.causes.values() for where in found]
    assert sorted([row.where for row, _ in taken] + dropped) == sorted(written)
    for _, made in taken:
        shape.check(made)
    assert drops.said.keys() == set(dropped)
    for where, sentence in drops.said.items():
        assert sentence.startswith(f"{where}: ") and sentence.endswith("data.on_bad_row=drop.")
        assert "\n" not in sentence
    # The dice threw neither good rows only nor one fault only.
    assert len(taken) > LINES / 10 and len(dropped) > LINES / 10 and len(drops.causes) > 4


@pytest.mark.parametrize("suffix", rows.SUFFIXES)
def test_every_mutilated_file_is_read_or_refused_in_one_sentence(tmp_path, suffix):
    rng = random.Random(suffix)
    whole = write_rows(
        tmp_path / f"x/train{suffix}", [talk(f"q{n}") for n in range(6)]
    ).read_bytes()
    read = refused = 0
    for number in range(150):
        file = tmp_path / f"x/{number}{suffix}"
        file.write_bytes((flip, cut)[number % 2](rng, whole))
        drops = Complaints("drop")
        try:
            for _, made in drops.parsed(rows.read(file, drops), hh.pair_of):
                is_sound(made)
            read += 1
        except UserError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
            refused += 1
    assert read + refused == 150 and refused > 4


def test_a_row_of_every_format_is_taken_as_it_is():
    for shape in FORMATS.values():
        parse = shape.parser()
        for n in range(20):
            shape.check(parse(Row(f"f:{n}", shape.row(n))))
