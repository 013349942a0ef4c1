"""Rows unlike the others of their kind: they break no rule, yet someone should look at them once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from statistics import median

from rlhf_cli.data.corpus import Corpus, Demo, Pair

LONG = 10
"""Times the median length of its kind, in characters, beyond which a text is very long."""
COMMON = 0.9
"""Share of the prompts that must end alike for the others to be odd."""
LONGEST_ENDING = 32
"""Characters of an ending that are compared."""

SIGNS: dict[str, Callable[[str], object]] = {
    "characters that do not print": lambda text: (
        not text.replace("\n", "").replace("\t", "").isprintable()
    ),
    "three line breaks in a row": re.compile(r"\n[^\S\n]*\n[^\S\n]*\n").search,
    "a character 10 times in a row": re.compile(r"(\S)\1{9}").search,
}


def odd_rows(corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """What is odd -> where: "file:line" if the row was read, else its number among its kind."""
    found: dict[str, dict[str, None]] = {}
    for cause, where in _odd(corpus):
        found.setdefault(cause, {})[where] = None
    return {cause: tuple(where) for cause, where in found.items()}


def every_prompt(corpus: Corpus) -> dict[str, str]:
    """Each prompt of both splits -> where it stands first."""
    found: dict[str, str] = {}
    for where, row in _rows(corpus):
        found.setdefault(row.prompt, where)
    for name, split in corpus.splits().items():
        for number, prompt in enumerate(split.prompts, 1):
            found.setdefault(prompt, f"{name} prompt {number}")
    return found


def common_ending(texts: Collection[str]) -> str:
    """The longest ending that nearly all of the texts share; empty if they end in many ways."""
    ending = ""
    while texts and len(ending) < LONGEST_ENDING:
        cuts = Counter(text[-len(ending) - 1 :] for text in texts)
        longer, count = cuts.most_common(1)[0]
        if len(longer) == len(ending) or count < COMMON * len(texts):
            break
        ending = longer
    return ending


def _odd(corpus: Corpus) -> Iterator[tuple[str, str]]:
    prompts = [(where, prompt) for prompt, where in every_prompt(corpus).items()]
    answers = [(where, text) for where, row in _rows(corpus) for text in _answers(row)]
    for kind, texts in (("prompt", prompts), ("answer", answers)):
        longest = LONG * median(len(text) for _, text in texts) if texts else 0
        for where, text in texts:
            if len(text) > longest:
                yield f"{kind} of over {LONG} times the median", where
    for cause, sign in SIGNS.items():
        for where, text in chain(prompts, answers):
            if sign(text):
                yield cause, where
    ending = common_ending([text for _, text in prompts])
    for where, text in prompts:
        if not text.endswith(ending):
            yield "prompt that ends otherwise", where


def _rows(corpus: Corpus) -> Iterator[tuple[str, Demo | Pair]]:
    for name, split in corpus.splits().items():
        for number, demo in enumerate(split.demos, 1):
            yield demo.where or f"{name} demonstration {number}", demo
        for number, pair in enumerate(split.pairs, 1):
            yield pair.where or f"{name} pair {number}", pair


def _answers(row: Demo | Pair) -> tuple[str, ...]:
    return (row.response,) if isinstance(row, Demo) else (row.chosen, row.rejected)
