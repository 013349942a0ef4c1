"""Corpora the project makes for itself out of anything that can pose, answer and judge prompts.

Everything is drawn from `random.Random` seeded by a string per part, so the rows are the same bytes
on every machine, the held-out split does not depend on the size of the training split, and more
demonstrations do not change the pairs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from random import Random
from typing import Annotated, TypeAlias

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.data.corpus import Corpus, Demo, Gold, Pair, Split
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import STRICT, Count, Positive

Poser: TypeAlias = Callable[[Random], str]
"""Draws a prompt."""
Writer: TypeAlias = Callable[[str, Random], str]
"""Draws an answer of mixed quality to a prompt."""

PATIENCE = 10_000
"""Draws without a new prompt after which there are taken to be no more."""


@dataclass(frozen=True, config=STRICT)
class Embedded:
    """Sizes and noise of a generated corpus."""

    prompts: Count
    """Distinct training prompts."""
    demos: Count
    """Training demonstrations, on the training prompts from the first on."""
    pairs: Count
    """Training pairs, on the training prompts from the last back."""
    heldout: Count
    """Held-out prompts; each has a demonstration and a pair."""
    temperature: Positive
    """Gold points per logit of the preference label: higher is noisier."""
    seed: int


@dataclass(frozen=True, config=STRICT)
class Topical(Embedded):
    """And how hard it is to learn from, where prompts have topics."""

    noise: Annotated[float, Field(ge=0, le=0.5)]
    """Probability that a preference label is turned round, however clear the case; at 1/2 labels say
    nothing."""
    topics: Count | None
    """How many topics there are, the first of the list; null is all. Each world says how many it has."""


def generate(title: str, knobs: Topical, pose: Poser, write: Writer, gold: Gold) -> Corpus:
    """A corpus whose held-out prompts do not occur in its training split."""
    heldout = distinct(pose, knobs.heldout, Random(f"{knobs.seed} heldout prompts"), set())
    train = distinct(pose, knobs.prompts, Random(f"{knobs.seed} train prompts"), set(heldout))

    def split(part: str, prompts: list[str], demos: int, pairs: int) -> Split:
        rng = Random(f"{knobs.seed} {part} demos")
        written = [Demo(p, write(p, rng)) for p in _take(prompts, demos)]
        rng = Random(f"{knobs.seed} {part} pairs")
        judged = [
            preference(p, write, gold, knobs.temperature, rng) for p in _take(prompts[::-1], pairs)
        ]
        # Drawn apart, so that noise turns labels round and changes nothing else.
        rng = Random(f"{knobs.seed} {part} noise")
        judged = [_reversed(pair) if rng.random() < knobs.noise else pair for pair in judged]
        return Split(tuple(written), tuple(judged), tuple(prompts))

    return Corpus(
        title=title,
        train=split("train", train, knobs.demos, knobs.pairs),
        heldout=split("heldout", heldout, knobs.heldout, knobs.heldout),
        drops={},
        gold=gold,
    )


def fingerprint(revision: int, knobs: Embedded) -> str:
    """What determines the rows: the generator's revision and its knobs."""
    return f"embedded r{revision} {json.dumps(asdict(knobs), sort_keys=True)}"


def sentences(text: str) -> list[str]:
    """The text cut after full stops, question and exclamation marks, and at colons.

    Whatever follows the last mark comes last: a broken-off answer ends in a sentence nobody knows.
    """
    return [" ".join(cut.split()) for cut in re.findall(r"[^.?!:]+[.?!]?", text) if cut.strip()]


def distinct(pose: Poser, count: int, rng: Random, taken: set[str]) -> list[str]:
    """`count` different prompts, none of them in `taken`. Raises UserError if there are not so many."""
    found: dict[str, None] = {}
    idle = 0
    while len(found) < count and idle < PATIENCE:
        prompt = pose(rng)
        idle = idle + 1 if prompt in taken or prompt in found else 0
        if not idle:
            found[prompt] = None
    if len(found) < count:
        raise UserError(
            "data.embedded.prompts and data.embedded.heldout ask for more prompts than there are:"
            f" {len(found)} were found of {count}, beside {len(taken)} that are held out; lower them."
        )
    return list(found)


def _take(prompts: list[str], count: int) -> list[str]:
    return [prompts[i % len(prompts)] for i in range(count)]


def preference(prompt: str, write: Writer, gold: Gold, temperature: float, rng: Random) -> Pair:
    """Two different answers; the first wins with probability sigmoid(gold gap / temperature)."""
    first = second = write(prompt, rng)
    while second == first:
        second = write(prompt, rng)
    better, worse = gold([prompt, prompt], [first, second])
    if rng.random() < 1 / (1 + math.exp((worse - better) / temperature)):
        return Pair(prompt, first, second)
    return Pair(prompt, second, first)


def _reversed(pair: Pair) -> Pair:
    return Pair(pair.prompt, pair.rejected, pair.chosen)
