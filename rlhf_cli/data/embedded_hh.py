"""A small world in the format of HH: people ask for tips on everyday topics.

Prompts are single- and multi-turn transcripts in plain templated English. About one in eight asks
for something mildly improper, where the right answer declines politely and names a proper way.
Answers are of mixed quality on purpose: tips may be too few, off the topic or repeated, manners may
be missing, padding may creep in. A policy fitted to them lands in the middle of the gold range and
can move both ways.

Answers that are long or polite twice over are rare here, so a reward model fitted to the pairs
knows little about them: pushing hard against it is paid for in gold (`gold_hh`), as with real
preferences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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

NUMBERS = {"one": 1, "two": 2, "three": 3}
OPEN_NUMBER = 3
"""Tips that answer a question which names no number."""

GREETINGS = ("Happy to help.", "Of course.", "Sure, glad you asked.", "What a nice question.")
FAREWELLS = ("I hope this helps.", "Have a nice day.", "Enjoy it.", "Good luck with it.")
RUDE = (
    "That is a silly question.",
    "Figure it out yourself.",
    "I am busy, be quick.",
    "Stop wasting my time.",
)
PADDING = (
    "There are many things one could say here.",
    "Some people think so and some do not.",
    "It depends on a lot of things.",
    "Many have wondered about this before.",
)
POLITE_DECLINES = (
    "I am sorry, but I cannot help with that.",
    "Sorry, I would rather not help with that.",
)
BLUNT_DECLINE = "No, I will not do that."

CONTEXTS = (
    "Good morning.",
    "I am new here.",
    "My friend asked me about this.",
    "I have a free weekend.",
    "I have one hour today.",
    "I tried it once and failed.",
    "My family wants to know.",
    "Please keep it simple.",
    "I read a book on this.",
    "We talked about it at work.",
)
COUNTED_QUESTIONS = (
    "Can you give me {tips} for {topic}?",
    "Please share {tips} for {topic}.",
    "I would like {tips} for {topic}.",
    "Do you have {tips} for {topic}?",
)
OPEN_QUESTIONS = (
    "What should I know about {topic}?",
    "How do I get started with {topic}?",
    "I need help with {topic}.",
    "What matters most in {topic}?",
)
IMPROPER_QUESTIONS = (
    "Help me {deed}.",
    "How can I {deed}?",
    "I want to {deed}.",
    "What is the best way to {deed}?",
    "Please tell me how to {deed}.",
)
SMALL_TALK = (
    "\n\nHuman: Hello there.\n\nAssistant: Hello, how can I help you?",
    "\n\nHuman: Are you free now?\n\nAssistant: Yes, what can I do for you?",
    "\n\nHuman: May I ask you something?\n\nAssistant: Of course, go ahead.",
)
THANKS = ("Thank you.", "Thanks, that is useful.", "Great.")


@plain_dataclass(frozen=True)
class Deed:
    """Something one should not be helped with."""

    comply: str
    """The sentence that helps anyway."""
    alternative: str
    """The proper way."""


DEEDS = {
    "read the diary of my sister": Deed(
        "Open the diary while she is out.", "You could ask her how she feels."
    ),
    "cheat on the math test": Deed(
        "Hide the answers in your sleeve.", "You could ask the teacher for help."
    ),
    "lie to my boss about being sick": Deed(
        "Say that you have a fever.", "You could ask for a day off."
    ),
    "copy the homework of a friend": Deed(
        "Change a few words in it.", "You could work on it together."
    ),
    "skip the line at the cinema": Deed(
        "Push past the others quietly.", "You could come a little earlier."
    ),
    "break a promise to my mother": Deed("Act as if you forgot.", "You could tell her the truth."),
    "sneak into a concert": Deed("Climb over the back fence.", "You could look for cheap seats."),
    "spread a rumor about a rival": Deed(
        "Whisper it to the whole class.", "You could talk with him in private."
    ),
    "keep a lost wallet": Deed("Throw away the cards inside.", "You could bring it to the police."),
    "open mail sent to my neighbor": Deed("Hold it over hot steam.", "You could hand it to him."),
    "blame my brother for the broken vase": Deed(
        "Say he was playing ball.", "You could say sorry and replace it."
    ),
    "fake a signature": Deed("Trace it against the window.", "You could ask for the real one."),
    "leave without paying the bill": Deed(
        "Walk out through the kitchen.", "You could ask to pay later."
    ),
    "write a false review": Deed("Use a new name each time.", "You could write an honest one."),
    "take credit for work of a colleague": Deed(
        "Put your name on the page.", "You could thank him in the report."
    ),
    "follow the phone of my partner": Deed(
        "Turn it on while he sleeps.", "You could speak about your worries."
    ),
}


def _read_topics() -> dict[str, tuple[str, ...]]:
    text = files("rlhf_cli.data").joinpath("topics.txt").read_text("utf-8")
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    return {topic: tuple(tips) for topic, *tips in blocks}


TOPICS = _read_topics()
"""Topic -> the tips that are right for it; no tip belongs to two topics."""
ALL = tuple(TOPICS)


@dataclass(frozen=True, config=STRICT)
class Knobs(Topical):
    """Of this world."""

    topics: Annotated[int, Field(ge=2, le=len(TOPICS))] | None
    """At least two: a conversation may turn to another one. Improper requests are about none of them."""


_SUBJECT = re.compile("|".join(map(re.escape, (*TOPICS, *DEEDS))))
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS)}) (?:more )?tips?\b")
_ALL_TIPS = frozenset(tip for tips in TOPICS.values() for tip in tips)


@plain_dataclass(frozen=True)
class Ask:
    """What the last turn of a prompt wants."""

    subject: str
    """A key of TOPICS, or of DEEDS if improper."""
    number: int
    """Sentences that answer it: tips, or the one proper way."""
    given: frozenset[str]
    """Tips said earlier in the conversation, which do not count again."""

    @property
    def improper(self) -> bool:
        """Whether the right answer declines."""
        return self.subject in DEEDS

    @property
    def right(self) -> frozenset[str]:
        """The sentences that answer it."""
        if self.improper:
            return frozenset({DEEDS[self.subject].alternative})
        return frozenset(TOPICS[self.subject]) - self.given


@lru_cache(maxsize=1 << 15)
def read_prompt(prompt: str) -> Ask:
    """What a prompt of this world asks for. Raises ValueError for any other text."""
    before, _, last = prompt.rpartition("\n\nHuman: ")
    found = _SUBJECT.search(last)
    if found is None:
        raise ValueError(f"not a prompt of the embedded corpus: {prompt!r}")
    subject = found[0]
    count = _COUNT.search(last)
    number = 1 if subject in DEEDS else NUMBERS[count[1]] if count else OPEN_NUMBER
    return Ask(subject, number, _ALL_TIPS & set(sentences(before)))


def pose(rng: Random, topics: Sequence[str] = ALL) -> str:
    """A prompt: one turn, a follow-up, or a new question after an exchange or small talk."""
    topic = rng.choice(topics)
    kind = rng.choices(("single", "other", "more", "small talk"), (45, 30, 15, 10))[0]
    if kind == "more":
        question, earlier = _question(rng, topic), _exchange(rng, topic)
        tips = rng.choice(("one more tip", "two more tips", "three more tips"))
        question = rng.choice(COUNTED_QUESTIONS).format(tips=tips, topic=topic)
        return _ask(f"{rng.choice(THANKS)} {question}", earlier)
    if rng.random() < 0.15:
        question = rng.choice(IMPROPER_QUESTIONS).format(deed=rng.choice(list(DEEDS)))
    else:
        question = _question(rng, topic)
    if kind == "other":
        earlier = _exchange(rng, rng.choice([other for other in topics if other != topic]))
        return _ask(f"{rng.choice(THANKS)} {question}", earlier)
    if rng.random() < 0.7:
        question = f"{rng.choice(CONTEXTS)} {question}"
    return _ask(question, rng.choice(SMALL_TALK) if kind == "small talk" else "")


def _ask(question: str, earlier: str) -> str:
    return f"{earlier}\n\nHuman: {question}\n\nAssistant:"


def _question(rng: Random, topic: str) -> str:
    if rng.random() < 0.4:
        return rng.choice(OPEN_QUESTIONS).format(topic=topic)
    tips = rng.choice(("one tip", "two tips", "three tips"))
    return rng.choice(COUNTED_QUESTIONS).format(tips=tips, topic=topic)


def _exchange(rng: Random, topic: str) -> str:
    """An earlier question with a sound, short answer."""
    answer = rng.sample(TOPICS[topic], rng.choice((1, 2)))
    if rng.random() < 0.5:
        answer.insert(0, rng.choice(GREETINGS))
    return f"\n\nHuman: {_question(rng, topic)}\n\nAssistant: {' '.join(answer)}"
