"""The guessing game as data: a task of several turns, and rows on every turn of it.

A demonstration is one turn of a dialogue, after all that was said before; the dialogues are played by
assistants who halve what is left, count up, guess wildly, forget what they were told or say nothing of
use. A pair is two such turns at the same point, preferred by what they are worth with the best play
after them (`guess_game.value`). Prompts are the openings, and the task replies to what is said to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import ClassVar

from pydantic.dataclasses import dataclass

from rlhf_cli.data.corpus import Corpus, DatasetDefaults, Demo, Pair, Split
from rlhf_cli.data.embedded import Embedded, distinct, fingerprint, preference
from rlhf_cli.data.guess_game import (
    GUESSES,
    LARGEST,
    REVISION,
    Guessing,
    gold,
    pose,
    read_prompt,
)
from rlhf_cli.recipes import STRICT, Count

STYLES = {"halve": 30, "somewhere": 20, "count": 10, "forget": 30, "mumble": 10}
"""How often a turn is in the middle of what is left, anywhere in it, at its lower end, anywhere in the
range of the opening, and no guess at all."""
MUMBLES = ("I do not know.", "Is it a large one?", "Is it {one} or {other}?", "Tell me more.")


@dataclass(frozen=True, config=STRICT)
class Guess(DatasetDefaults):
    """Openings, single turns of played dialogues, and pairs of such turns."""

    name: str
    """The word for the data in run names."""
    max_prompt_tokens: Count
    """Longest prompt in tokens: an opening and all turns but the last."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included: a whole dialogue after its opening."""
    embedded: Embedded
    """Of the generated rows; demonstrations and pairs count turns, prompts count openings."""

    pays: ClassVar[bool] = True

    @property
    def has_gold(self) -> bool:
        """The task itself."""
        return True

    @property
    def title(self) -> str:
        """`guess-embedded`: generated, like everything that is called so."""
        return f"{self.name}-embedded"

    def load(self) -> Corpus:
        """Play every dialogue."""
        knobs = self.embedded
        heldout = distinct(pose, knobs.heldout, Random(f"{knobs.seed} heldout openings"), set())
        train = distinct(pose, knobs.prompts, Random(f"{knobs.seed} openings"), set(heldout))
        return Corpus(
            title=self.title,
            train=self._split("train", train, knobs.demos, knobs.pairs),
            heldout=self._split("heldout", heldout, knobs.heldout, knobs.heldout),
            drops={},
            gold=gold,
            task=Guessing(),
        )

    def fingerprint(self) -> str:
        """The generator and its knobs."""
        return fingerprint(REVISION, self.embedded)

    def _split(self, part: str, openings: list[str], demos: int, pairs: int) -> Split:
        """Demonstrations on the openings from the first on, pairs from the last back."""
        turns = _played(openings, Random(f"{self.embedded.seed} {part} demos"))
        rng = Random(f"{self.embedded.seed} {part} pairs")
        return Split(
            demos=tuple(next(turns) for _ in range(demos)),
            pairs=tuple(self._pair(openings[-1 - i % len(openings)], rng) for i in range(pairs)),
            prompts=tuple(openings),
        )

    def _pair(self, opening: str, rng: Random) -> Pair:
        """Two turns somewhere in a dialogue, worded alike, so that they differ in what they guess."""
        prompts = [demo.prompt for demo in _dialogue(opening, rng)]
        words = partial(write, words=rng.choice(GUESSES))
        return preference(rng.choice(prompts), words, gold, self.embedded.temperature, rng)


def write(prompt: str, rng: Random, words: str) -> str:
    """A turn as the demonstrators take it; a guess is put in these words."""
    game = read_prompt(prompt)
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    if style == "mumble":
        one, other = rng.sample(range(1, LARGEST + 1), 2)
        return f" {rng.choice(MUMBLES).format(one=one, other=other)}"
    low, high = (1, game.top) if style == "forget" else (game.low, game.high)
    number = rng.randint(low, high)
    if style == "halve":
        number = (low + high + rng.randrange(2)) // 2
    elif style == "count":
        number = low
    return f" {words.format(number=number)}"


def _dialogue(opening: str, rng: Random) -> Iterator[Demo]:
    """A dialogue turn by turn, from its opening to its end."""
    task, prompt, done = Guessing(), opening, False
    words = rng.choice(GUESSES)
    while not done:
        turn = write(prompt, rng, words)
        yield Demo(prompt, turn)
        reply = task.reply(prompt, [turn])
        prompt, done = prompt + turn + reply.text, reply.done


def _played(openings: list[str], rng: Random) -> Iterator[Demo]:
    """The turns of one dialogue after the other, over and over the openings."""
    while True:
        for opening in openings:
            yield from _dialogue(opening, rng)
