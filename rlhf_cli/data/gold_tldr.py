"""The gold reward of the embedded TL;DR corpus: what a good summary is, written down.

    gold = 4 coverage + 2 faithfulness + 2 brevity + 1 coherence

A summary is cut into sentences and each is looked up among the facts of the world
(`embedded_tldr`); a sentence that is none of them is garbled, which costs a little and never raises
an error. `HIGHEST` is reached by the key facts of the post, in short, in order and with nothing
else. The range is [LOWEST, HIGHEST] = [-5, 4].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data.embedded import sentences
from rlhf_cli.data.embedded_tldr import (
    BACKGROUNDS,
    FEELINGS,
    LONG,
    MEANING,
    PADDING,
    Post,
    read_prompt,
)

WEIGHTS = {"coverage": 4.0, "faithfulness": 2.0, "brevity": 2.0, "coherence": 1.0}
LOWEST, HIGHEST = -5.0, 4.0
WORDS_TOO_MANY = 12
"""Words beyond those of the best summary at which brevity is at its worst."""

_FACTS = frozenset(LONG) | {*BACKGROUNDS, *FEELINGS}
_KNOWN = _FACTS | {*PADDING}


@dataclass(frozen=True)
class Summary:
    """A response, read against its post; `said` holds short forms where a sentence has one."""

    post: Post
    said: tuple[str, ...]
    words: int


def coverage(summary: Summary) -> float:
    """[0, 1]: share of the post's key facts that are told, in whichever form."""
    return len(set(summary.post.key) & set(summary.said)) / len(summary.post.key)


def faithfulness(summary: Summary) -> float:
    """[-1, 0]: minus the share of the told facts that are not in the post."""
    facts = [s for s in summary.said if s in _FACTS]
    return -sum(s not in summary.post.facts for s in facts) / len(facts) if facts else 0.0


def brevity(summary: Summary) -> float:
    """[-1, 0]: words beyond those of the best summary, -1 from `WORDS_TOO_MANY` on."""
    needed = sum(len(fact.split()) for fact in summary.post.key)
    return -min(1.0, max(0, summary.words - needed) / WORDS_TOO_MANY)


def coherence(summary: Summary) -> float:
    """[-1, 0]: minus the share of sentences that are garbled, said before or out of the order of
    the post; -1 if nothing is said.
    """
    if not summary.said:
        return -1.0
    place = {fact: i for i, fact in enumerate(summary.post.facts)}
    sound, seen, reached = 0, set[str](), -1
    for sentence in summary.said:
        at = place.get(sentence, reached)
        sound += sentence in _KNOWN and sentence not in seen and at >= reached
        seen.add(sentence)
        reached = max(reached, at)
    return sound / len(summary.said) - 1


COMPONENTS = {f.__name__: f for f in (coverage, faithfulness, brevity, coherence)}


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Each component of the gold reward by name, before weighting.

    Raises ValueError if the prompt is not one of the embedded corpus.
    """
    said = tuple(MEANING.get(s, s) for s in sentences(response))
    summary = Summary(read_prompt(prompt), said, len(response.split()))
    return {name: component(summary) for name, component in COMPONENTS.items()}


def gold(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The weighted sum for each response; see the module's equation."""
    return [
        sum(WEIGHTS[name] * part for name, part in gold_parts(prompt, response).items())
        for prompt, response in zip(prompts, responses, strict=True)
    ]
