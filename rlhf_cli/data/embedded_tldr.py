"""A small world in the format of TL;DR: posts made of facts, some of which matter.

A post tells what somebody did, what came of it and mostly ends in a question: those are its key
facts. How long people have known each other and how the writer feels are not. Every key fact has a
long form for posts and a short one for summaries; a good summary gives the short forms in the order
of the post. Written summaries are of mixed quality on purpose: they leave out, make up, copy, mix
up or pad.

Summaries much longer than the key facts are rare here, so a reward model fitted to the pairs knows
little about them: pushing hard against it is paid for in gold (`gold_tldr`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import lru_cache
from importlib.resources import files
from random import Random
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.data.embedded import Topical, sentences
from rlhf_cli.recipes import STRICT

REVISION = 1
"""Raised whenever the same knobs give other rows or another gold."""

PEOPLE = (
    "sister",
    "brother",
    "cousin",
    "uncle",
    "aunt",
    "friend",
    "neighbor",
    "roommate",
    "coach",
    "boss",
    "partner",
    "teacher",
)
BACKGROUNDS = (
    "We have known each other for ten years.",
    "We live in a small town.",
    "This began in the autumn.",
    "We are both in our thirties.",
    "I am new to this forum.",
    "Sorry for my bad English.",
    "We used to get along fine.",
    "I never had trouble before.",
)
FEELINGS = (
    "I feel angry and tired.",
    "I am sad about all of it.",
    "It makes me nervous.",
    "I cannot stop thinking about it.",
    "To be honest I am confused.",
    "I feel a little guilty too.",
)
PADDING = ("It is a long story.", "There is a lot to say.", "Things happened and here we are.")

PERFECT = 0.05
"""Share of written summaries that are the best possible one."""
KEPT = 0.55
"""Probability that a key fact is in the summary."""
COPIED, MADE_UP, MIXED_UP = 0.12, 0.25, 0.15
"""Probabilities that a fact is in its long form, is not from the post, and that order is lost."""
EXTRAS = (0.5, 0.2, 0.1, 0.2)
"""Probabilities of nothing more, a fact that does not matter, a repetition, an empty phrase."""


@plain_dataclass(frozen=True)
class Scene:
    """Something that happens, in (long form, short form) pairs; `{who}` stands for a person."""

    subreddit: str
    subject: str
    problem: tuple[str, str]
    events: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, str], ...]


@plain_dataclass(frozen=True)
class Post:
    """What a prompt tells."""

    facts: tuple[str, ...]
    """Short forms of the key facts and the other sentences, in order."""
    key: tuple[str, ...]
    """Short forms of the key facts, in order."""


def _read_scenes() -> tuple[Scene, ...]:
    text = files("rlhf_cli.data").joinpath("scenes.txt").read_text("utf-8")
    scenes = []
    for head, *lines in (block.splitlines() for block in text.strip().split("\n\n")):
        subreddit, subject = head.split(" / ")
        problem, *rest = ((long, short) for long, _, short in (x.partition(" | ") for x in lines))
        scenes.append(Scene(subreddit, subject, problem, tuple(rest[:3]), tuple(rest[3:])))
    return tuple(scenes)


SCENES = _read_scenes()


@dataclass(frozen=True, config=STRICT)
class Knobs(Topical):
    """Of this world, whose topics are scenes."""

    topics: Annotated[int, Field(ge=2, le=len(SCENES))] | None
    """At least two: what is made up in a summary is mostly from another scene."""


def _forms(scenes: Iterable[Scene]) -> list[tuple[str, str]]:
    """Long and short form of every key fact of some scenes."""
    forms = []
    for scene in scenes:
        long, short = scene.problem
        forms += [(long.format(who=who), short.format(who=who)) for who in PEOPLE]
        forms += [*scene.events, *scene.questions]
    return forms


MEANING = {sentence: short for long, short in _forms(SCENES) for sentence in (long, short)}
"""Long or short form of a key fact -> its short form."""
LONG = {short: sentence for sentence, short in MEANING.items() if sentence != short}


def key_facts(scenes: Iterable[Scene]) -> tuple[str, ...]:
    """Short forms of all that may matter in some scenes."""
    return tuple(sorted(short for _, short in _forms(scenes)))


ALL = key_facts(SCENES)


@lru_cache(maxsize=1 << 15)
def read_prompt(prompt: str) -> Post:
    """What a prompt of this world tells. Raises ValueError for any other text."""
    _, found, post = prompt.partition("\n\nPOST: ")
    said = sentences(post.removesuffix("\n\nTL;DR:"))
    facts = tuple(MEANING.get(s, s) for s in said)
    key = tuple(fact for fact in facts if fact in LONG)
    if not found or not key:
        raise ValueError(f"not a prompt of the embedded corpus: {prompt!r}")
    return Post(facts, key)


def pose(rng: Random, scenes: Sequence[Scene] = SCENES) -> str:
    """A post: a problem, what came of it, perhaps a question, between facts that matter less."""
    scene, who = rng.choice(scenes), rng.choice(PEOPLE)
    told = [scene.problem[0].format(who=who), rng.choice(scene.events)[0]]
    told.insert(rng.randrange(2), rng.choice(BACKGROUNDS))
    told.append(rng.choice(FEELINGS))
    if rng.random() < 0.75:
        told.append(rng.choice(scene.questions)[0])
    title = f"My {who} and {scene.subject}"
    return f"SUBREDDIT: r/{scene.subreddit}\n\nTITLE: {title}\n\nPOST: {' '.join(told)}\n\nTL;DR:"


def best(prompt: str, rng: Random) -> str:
    """The summary with the highest gold there is; `rng` is not needed, as there is only one."""
    return " " + " ".join(read_prompt(prompt).key)


def write(prompt: str, rng: Random, made_up: Sequence[str] = ALL) -> str:
    """A summary as the demonstrators give it: sometimes perfect, mostly not, sometimes wrong.

    made_up: facts that may stand in it though they are not in the post.
    """
    if rng.random() < PERFECT:
        return best(prompt, rng)
    post = read_prompt(prompt)
    told = [fact for fact in post.key if rng.random() < KEPT]
    if rng.random() < MIXED_UP:
        rng.shuffle(told)
    told = [_retell(fact, rng, made_up) for fact in told]
    # Only short summaries are drawn out, so that few outgrow the shipped response length.
    extra = rng.choices(("none", "side fact", "repetition", "padding"), EXTRAS)[0]
    if not told or (extra == "padding" and len(told) < 3):
        told.insert(rng.randrange(len(told) + 1), rng.choice(PADDING))
    elif extra == "side fact" and len(told) < 3:
        told.append(rng.choice([fact for fact in post.facts if fact not in post.key]))
    elif extra == "repetition" and len(told) < 3:
        told.append(told[-1])
    return " " + " ".join(told)


def _retell(fact: str, rng: Random, made_up: Sequence[str]) -> str:
    draw = rng.random()
    if draw < COPIED:
        return LONG[fact]
    return rng.choice(made_up) if draw < COPIED + MADE_UP else fact
