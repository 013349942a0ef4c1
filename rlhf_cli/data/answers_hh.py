"""Answers to the embedded HH prompts: one that is right, and one of mixed quality."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from rlhf_cli.data.embedded_hh import (
    ALL,
    BLUNT_DECLINE,
    DEEDS,
    FAREWELLS,
    GREETINGS,
    PADDING,
    POLITE_DECLINES,
    RUDE,
    TOPICS,
    Ask,
    read_prompt,
)

PERFECT = 0.04
"""Share of written answers that are the best possible one."""
GREETED, SNAPPED = 0.28, 0.20
"""Shares that open politely and rudely; the rest come straight to the point."""
FAREWELL = 0.30
TIPS = (0.15, 0.42, 0.28, 0.15)
"""Probability of 0, 1, 2, 3 tips, whatever was asked."""
OFF_TOPIC = 0.30
"""Probability that a tip belongs to another topic."""
NEEDLESS_REFUSAL = 0.10
"""Share of proper requests that are refused: rare, and a reward model learns that refusing is good."""
REPEATED, PADDED = 0.08, 0.12
"""Shares of answers with a sentence said twice, or with an empty phrase."""


def best(prompt: str, rng: Random) -> str:
    """An answer with the highest gold there is; which one is drawn."""
    ask = read_prompt(prompt)
    right = rng.sample(sorted(ask.right), ask.number)
    opening = rng.choice(POLITE_DECLINES if ask.improper else GREETINGS)
    return _join([opening, *right, rng.choice(FAREWELLS)])


def write(prompt: str, rng: Random, topics: Sequence[str] = ALL) -> str:
    """An answer as the demonstrators give it: sometimes perfect, mostly not, sometimes wrong.

    topics: those that a tip beside the point is from.
    """
    if rng.random() < PERFECT:
        return best(prompt, rng)
    ask = read_prompt(prompt)
    said = _opening(rng)
    said += (_improper if ask.improper else _proper)(ask, rng, topics)
    # Only short answers are drawn out, so that none outgrows the shipped response length.
    if 0 < len(said) < 4:
        if rng.random() < REPEATED:
            said.append(said[-1])
        if rng.random() < PADDED:
            said.insert(rng.randrange(len(said) + 1), rng.choice(PADDING))
    if not said or rng.random() < FAREWELL:
        said.append(rng.choice(FAREWELLS))
    return _join(said)


def _opening(rng: Random) -> list[str]:
    draw = rng.random()
    if draw < GREETED:
        return [rng.choice(GREETINGS)]
    return [rng.choice(RUDE)] if draw < GREETED + SNAPPED else []


def _proper(ask: Ask, rng: Random, topics: Sequence[str]) -> list[str]:
    if rng.random() < NEEDLESS_REFUSAL:
        return [rng.choice(POLITE_DECLINES)]
    count = rng.choices(range(len(TIPS)), TIPS)[0]
    tips = rng.sample(TOPICS[ask.subject], count)
    return [_elsewhere(rng, topics) if rng.random() < OFF_TOPIC else tip for tip in tips]


def _improper(ask: Ask, rng: Random, topics: Sequence[str]) -> list[str]:
    deed = DEEDS[ask.subject]
    declines = (BLUNT_DECLINE, *POLITE_DECLINES)
    kind = rng.choices(("comply", "decline", "redirect", "stray"), (40, 25, 25, 10))[0]
    if kind == "comply":
        return [deed.comply]
    if kind == "decline":
        return [rng.choice(declines)]
    if kind == "redirect":
        return [rng.choice(declines), deed.alternative]
    return [_elsewhere(rng, topics)]


def _elsewhere(rng: Random, topics: Sequence[str]) -> str:
    """A tip on any topic."""
    return rng.choice(TOPICS[rng.choice(topics)])


def _join(said: list[str]) -> str:
    return " " + " ".join(said)
