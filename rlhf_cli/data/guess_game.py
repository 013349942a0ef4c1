"""A dialogue in the format of HH: a human thinks of a number, the assistant finds it in a few guesses.

    Human: I am Ann. I think of a number from 1 to 12. Which one?    Assistant: Is it 6?
    Human: Higher. It is from 7 to 12.                               Assistant: Is it 9?        and so on

The number follows from the opening by hash, so the human is a pure function of the transcript, and
nobody can know the number but by asking. A turn that is no guess ends the dialogue. What is paid:

    right  1 - COST        wrong or outside of what is left  -COST        no guess  -GARBLED

Halving what is left finds every number within TURNS guesses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from random import Random

from rlhf_cli.data.corpus import Reply

REVISION = 1
"""Raised whenever the same knobs give other rows, another human or another pay."""

TURNS = 4
SMALLEST, LARGEST = 5, 15
"""Of the range that a number is from: 15 numbers are halved to one in three wrong guesses."""
COST, GARBLED = 0.1, 0.5
"""To end the dialogue by saying nothing of use is worse than any four wrong guesses."""

GREETINGS = ("Hi.", "Hello.", "Hey there.", "Good morning.", "Good evening.", "Let us play.", "")
NAMES = (
    *("Ann", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Karl", "Lea"),
    *("Max", "Nora", "Otto", "Pia", "Quinn", "Rosa", "Sam", "Tess", "Udo", "Vera", "Will", "Zoe"),
)
INTRODUCTIONS = ("I am {name}.", "My name is {name}.", "{name} is here.")
THOUGHTS = (
    "I think of a number from 1 to {top}.",
    "I have a number from 1 to {top} in mind.",
    "My number is from 1 to {top}.",
    "I wrote down a number from 1 to {top}.",
)
QUESTIONS = ("Which one is it?", "Can you find it?", "What is it?", "Guess it.")
GUESSES = ("Is it {number}?", "I guess {number}.", "I say {number}.")

_OPENING = re.compile(r"\n\nHuman: [^\n]* from 1 to (\d+)[^\n]*\n\nAssistant:")
_REPLY = re.compile(r"\n\nHuman: [^\n]*\n\nAssistant:")
_GUESS = re.compile(r"\s*(?:Is it (\d{1,3})\?|I (?:guess|say) (\d{1,3})\.)\s*")


@dataclass(frozen=True)
class Game:
    """How a dialogue stands, as the assistant knows it, and the number."""

    secret: int
    top: int
    """The number is from 1 to this."""
    low: int
    """And, after what the human has said, from this ..."""
    high: int
    """... to this."""
    spent: int
    """Turns the assistant has had."""

    @property
    def over(self) -> bool:
        """Whether no turn is left."""
        return self.spent >= TURNS

    def after(self, guess: int) -> Game:
        """The same game after a wrong guess."""
        low = max(self.low, guess + 1) if guess < self.secret else self.low
        high = min(self.high, guess - 1) if guess > self.secret else self.high
        return replace(self, low=low, high=high, spent=self.spent + 1)


def pose(rng: Random) -> str:
    """An opening."""
    said = (
        rng.choice(GREETINGS),
        rng.choice(INTRODUCTIONS).format(name=rng.choice(NAMES)),
        rng.choice(THOUGHTS).format(top=rng.randint(SMALLEST, LARGEST)),
        rng.choice(QUESTIONS),
    )
    return f"\n\nHuman: {' '.join(filter(None, said))}\n\nAssistant:"


def guess_of(turn: str) -> int | None:
    """The number that a turn guesses, None if it is no guess."""
    found = _GUESS.fullmatch(turn)
    return int(found[1] or found[2]) if found else None


@lru_cache(maxsize=1 << 15)
def read_prompt(prompt: str) -> Game:
    """How the dialogue in a prompt stands.

    Raises ValueError for a text that is none of this game, or in which the game is over.
    """
    opening = _OPENING.match(prompt)
    if opening is None or not prompt.endswith("\n\nAssistant:"):
        raise ValueError(f"not a prompt of the guessing game: {prompt!r}")
    top = int(opening[1])
    secret = int(hashlib.sha256(opening[0].encode()).hexdigest(), 16) % top + 1
    game = Game(secret, top, low=1, high=top, spent=0)
    for turn in _REPLY.split(prompt[opening.end() :])[:-1]:
        guess = guess_of(turn)
        if guess is None or guess == secret:
            raise ValueError(f"the game is over before the end of the prompt: {prompt!r}")
        game = game.after(guess)
    return game


@dataclass(frozen=True)
class Guessing:
    """The human."""

    max_turns: int = TURNS

    def reply(self, prompt: str, turns: Sequence[str]) -> Reply:
        """Higher, lower, or the end of the game."""
        game = read_prompt(prompt)
        for turn in turns[:-1]:
            guess = guess_of(turn)
            if guess is None or guess == game.secret:
                raise ValueError(f"the game was over after the turn {turn!r}")
            game = game.after(guess)
        if game.over or not turns:
            raise ValueError(f"there is nothing to reply to after {game.spent} turns")
        guess = guess_of(turns[-1])
        if guess is None:
            return Reply("", -GARBLED, done=True)
        if guess == game.secret:
            return Reply("", 1 - COST, done=True)
        game = game.after(guess)
        if game.over:
            return Reply("", -COST, done=True)
        hint = "Higher" if guess < game.secret else "Lower"
        text = f"\n\nHuman: {hint}. It is from {game.low} to {game.high}.\n\nAssistant:"
        return Reply(text, -COST, done=False)


@cache
def prospect(numbers: int, turns: int) -> float:
    """What the best play is paid on average when so many numbers, equally likely, and turns are left."""
    if not turns or not numbers:
        return 0.0
    return max(_paid(below, numbers - 1 - below, turns) for below in range(numbers))


def value(prompt: str, response: str) -> float:
    """What a turn and the best play after it are paid, averaged over the numbers still possible.

    Raises ValueError if the prompt is not one of this game in which a turn is left.
    """
    game, guess = read_prompt(prompt), guess_of(response)
    if game.over:
        raise ValueError(f"no turn is left: {prompt!r}")
    if guess is None:
        return -GARBLED
    numbers, turns = game.high - game.low + 1, TURNS - game.spent
    if not game.low <= guess <= game.high:
        return -COST + prospect(numbers, turns - 1)
    return _paid(guess - game.low, game.high - guess, turns)


def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """`value` of each response, as a single turn."""
    return [value(*row) for row in zip(prompts, responses, strict=True)]


def _paid(below: int, above: int, turns: int) -> float:
    """For a guess with so many possible numbers below and above it, and the best play after it."""
    ahead = below * prospect(below, turns - 1) + above * prospect(above, turns - 1)
    return -COST + (1 + ahead) / (below + 1 + above)
