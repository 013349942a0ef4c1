"""Whether texts are still texts: what tells that a policy games its reward before anyone reads them.

Loss curves do not show it; length, repetition and the perplexity under the SFT policy do (Zheng et al. 2023,
"Secrets of RLHF I", arXiv:2307.04964, section 5.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

_WORD = re.compile(r"[^\W_]+")
LENGTH, PERPLEXITY = 1.5, 2.0
"""Factors by which length and perplexity may change, either way, before it is said."""
REPETITION = 0.1
"""Share of repeated 4-grams above that of the SFT policy from which on it is said."""
ERRORS = 2.0
"""Standard errors by which a reward must have risen to count as risen."""


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def repetition(text: str, n: int = 4) -> float:
    """Share of n-grams of words that occurred before in the text (seq-rep-4 of Welleck et al. 2019,
    arXiv:1908.04319); 0 for a text without any.
    """
    grams = list(_grams(words(text), n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of distinct ones among the n-grams of all texts (Li et al. 2016, arXiv:1510.03055).

    nan if there are none.
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, "ROUGE", section 3.1).

    0 if either text is empty.
    """
    ours, theirs = words(text), words(reference)
    if not ours or not theirs:
        return 0.0
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = row[:]
        for at, other in enumerate(theirs, 1):
            row[at] = before[at - 1] + 1 if word == other else max(before[at], row[at - 1])
    return 2 * row[-1] / (len(ours) + len(theirs))


def alarms(start: Mapping[str, float], now: Mapping[str, float]) -> Iterator[str]:
    """What has gone wrong between the first evaluation and this one, though the reward has risen."""

    def at(row: Mapping[str, float], name: str) -> float:
        return row.get(f"eval/{name}", math.nan)

    gain = at(now, "reward") - at(start, "reward")
    if not gain > ERRORS * math.hypot(at(now, "reward_se"), at(start, "reward_se")):
        return
    rose = f"the reward rose by {gain:.2f} while"
    before, after = at(start, "length"), at(now, "length")
    if before > 0 and not 1 / LENGTH <= after / before <= LENGTH:
        yield f"{rose} responses went from {before:.0f} to {after:.0f} tokens"
    before, after = at(start, "perplexity_ref"), at(now, "perplexity_ref")
    if before > 0 and not 1 / PERPLEXITY <= after / before <= PERPLEXITY:
        yield f"{rose} their perplexity under the SFT policy went from {before:.1f} to {after:.1f}"
    before, after = at(start, "repetition"), at(now, "repetition")
    if after > before + REPETITION:
        yield f"{rose} repeated 4-grams went from {before:.0%} to {after:.0%}"


def _grams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
