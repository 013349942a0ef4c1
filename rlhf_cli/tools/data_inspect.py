"""What the rows of a dataset are like, as the model would read them: lengths, cuts, repeats, odd ones."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from rlhf_cli.config import Recipe
from rlhf_cli.data.corpus import Corpus
from rlhf_cli.data.odd import common_ending, every_prompt, odd_rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evals.lengths import Lengths, ends
from rlhf_cli.evals.statistics import proportion_interval
from rlhf_cli.models.tokenizer import tokenizer_of
from rlhf_cli.tools.data_check import Checked, check, examples, named, spread, summary, table

SAMPLE = 20_000
"""Most rows of a kind that are encoded: a percentile is then off by less than half a point of rank."""
JOINED = 2_000
"""Most rows of a kind that are encoded whole as well, to see where tokens would end."""
EXAMPLES = 3
WIDTH = 14
"""Columns of a bar: three kinds side by side fit into 80."""
DIGITS = 16
"""Of a digest, enough to tell two apart."""


@dataclass(frozen=True)
class Measured:
    """What only a tokenizer can tell."""

    tokenizer: str
    """Whose tokens are counted."""
    prompts: Lengths
    answers: tuple[Lengths, ...]
    """Chosen and rejected ones, and demonstrations, as far as there are any."""
    pairs: int
    """Of those whose answers were encoded,"""
    longer: int
    """so many have the longer one chosen,"""
    equal: int
    """and in so many both are as long."""
    joined: int
    """Of so many answers"""
    moved: int
    """this many would be other tokens if they were encoded with their prompt."""


@dataclass(frozen=True)
class Inspected:
    """All there is to say."""

    checked: Checked
    measured: Measured | None
    """None if there is nothing to imitate, without which there is no run."""
    odd: Mapping[str, tuple[str, ...]]
    """What is odd -> where."""
    evaluated: tuple[str, ...]
    """The held-out prompts of every evaluation."""


def inspect(made: Recipe) -> Inspected:
    """Read, count and encode. Raises UserError if the data or the tokenizer cannot be read."""
    checked = check(made.data)
    corpus, model = checked.survey.corpus, made.model
    measured = None
    if corpus.train.demos:
        logging.set_verbosity_error()  # long texts are what is looked for here
        texts = (demo.prompt + demo.response for demo in corpus.train.demos)
        encoder = Encoder.of(tokenizer_of(model, texts), made.data)
        measured = measure(corpus, encoder, Path(model.name or model.label).name)
    evaluated = corpus.heldout.prompts[: made.eval.prompts]
    return Inspected(checked, measured, odd_rows(corpus), evaluated)


def measure(corpus: Corpus, encoder: Encoder, tokenizer: str) -> Measured:
    """Encode the rows of both splits, or some of them."""
    whole = replace(encoder, longest_prompt=sys.maxsize, longest_response=sys.maxsize)
    prompts = list(every_prompt(corpus))
    demos = [demo for split in corpus.splits().values() for demo in split.demos]
    pairs = [pair for split in corpus.splits().values() for pair in split.pairs]

    def answers(kind: str, texts: Sequence[str]) -> Lengths:
        found = tuple(map(len, whole.responses(spread(texts, SAMPLE))))
        return Lengths(kind, found, encoder.longest_response, len(texts))

    asked = tuple(map(len, whole.prompts(spread(prompts, SAMPLE))))
    chosen = answers("chosen", [pair.chosen for pair in pairs])
    rejected = answers("rejected", [pair.rejected for pair in pairs])
    told = answers("demonstrations", [demo.response for demo in demos])
    rows = [(demo.prompt, demo.response) for demo in spread(demos, JOINED)]
    rows += [(pair.prompt, pair.chosen) for pair in spread(pairs, JOINED)]
    rows += [(pair.prompt, pair.rejected) for pair in spread(pairs, JOINED)]
    both = list(zip(chosen.tokens, rejected.tokens, strict=True))
    return Measured(
        tokenizer,
        prompts=Lengths("prompts", asked, encoder.longest_prompt, len(prompts)),
        answers=tuple(each for each in (chosen, rejected, told) if each.tokens),
        pairs=len(both),
        longer=sum(one > other for one, other in both),
        equal=sum(one == other for one, other in both),
        joined=len(rows),
        moved=_moved(whole, rows),
    )


def report(inspected: Inspected) -> RenderableType:
    """The same for a terminal of 80 columns, or for a file."""
    survey, measured = inspected.checked.survey, inspected.measured
    parts: list[RenderableType] = [summary(survey)]
    if measured is not None:
        parts += [Text(), _percentiles(measured)]
        parts += [Text(), _histogram([measured.prompts]), Text(), _histogram(measured.answers)]
    parts += [Text(), _facts(inspected)]
    if inspected.odd:
        parts += [Text(), named("odd", inspected.odd)]
    return Group(*parts, *examples(survey.corpus, EXAMPLES))


def _moved(whole: Encoder, rows: Sequence[tuple[str, str]]) -> int:
    """Rows that are other tokens as one text."""
    prompts = whole.prompts([prompt for prompt, _ in rows])
    answers = whole.responses([answer for _, answer in rows])
    together = whole.prompts([prompt + answer for prompt, answer in rows])
    return sum(
        [*prompt, *answer[:-1]] != one
        for prompt, answer, one in zip(prompts, answers, together, strict=True)
    )


def _percentiles(measured: Measured) -> Table:
    marks = {"5 %": 0.05, "50 %": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}
    drawn = table("tokens", "texts", "mean", *marks, "limit", "over")
    for each in (measured.prompts, *measured.answers):
        drawn.add_row(
            each.kind,
            str(len(each.tokens)),
            f"{each.mean:.1f}",
            *(str(each.quantile(share)) for share in marks.values()),
            str(each.limit),
            _percent(each.over),
        )
    return drawn


def _histogram(kinds: Sequence[Lengths]) -> Table:
    """A bar per bin and kind; the last one is of texts over the limit."""
    last = ends(kinds[0].limit)
    drawn = table("tokens")
    for each in kinds:
        drawn.add_column(each.kind, no_wrap=True)
        drawn.add_column(justify="right", no_wrap=True)
    columns = [each.shares(last) for each in kinds]
    longest = max(map(max, columns))
    bins = [
        f"{low + 1}-{high}" if low + 1 < high else f"{high}" for low, high in pairwise([0, *last])
    ]
    for name, *row in zip([*bins, f"over {last[-1]}"], *columns, strict=True):
        cells = ((Bar(1, 0, share / longest, width=WIDTH), f"{100 * share:.0f} %") for share in row)
        drawn.add_row(name, *(cell for pair in cells for cell in pair))
    return drawn


def _facts(inspected: Inspected) -> Table:
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in _said(inspected):
        drawn.add_row(name, Text(value))
    return drawn


def _said(inspected: Inspected) -> Iterator[tuple[str, str]]:
    corpus, measured = inspected.checked.survey.corpus, inspected.measured
    if measured is not None:
        yield from _said_of_tokens(measured)
    if pairs := [pair for split in corpus.splits().values() for pair in split.pairs]:
        again = len(pairs) - len({pair.prompt for pair in pairs})
        yield "same prompt", f"{again} of {len(pairs)} pairs are on the prompt of an earlier one"
        judged = {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
        turned = sum((pair.prompt, pair.rejected, pair.chosen) in judged for pair in pairs)
        yield "both ways", f"{turned} of {len(pairs)} pairs are judged the other way in another row"
    ending = common_ending(every_prompt(corpus))
    yield "prompts end in", repr(ending) if ending else "many ways"
    yield "digest", f"{corpus.digest[:DIGITS]} of all rows"
    prompts = hashlib.sha256(json.dumps(inspected.evaluated).encode()).hexdigest()
    yield "evaluations", f"{prompts[:DIGITS]} of their {len(inspected.evaluated)} prompts"


def _said_of_tokens(measured: Measured) -> Iterator[tuple[str, str]]:
    yield (
        "tokens",
        f"of {measured.tokenizer}; over the limit a prompt loses its beginning, an answer its end",
    )
    kinds = (measured.prompts, *measured.answers)
    parts = [f"{len(k.tokens)} of {k.total} {k.kind}" for k in kinds if len(k.tokens) < k.total]
    if parts:
        yield "sample", ", ".join(parts)
    if unequal := measured.pairs - measured.equal:
        low, high = proportion_interval(measured.longer, unequal)
        yield (
            "chosen is longer",
            f"in {_percent(measured.longer / unequal)} of {unequal} pairs (95 % interval"
            f" {_percent(low)} to {_percent(high)}); in {measured.equal} both are as long",
        )
    yield (
        "boundary",
        f"{_percent(measured.moved / measured.joined)} of {measured.joined} answers would be other tokens"
        " if encoded in one piece with their prompt",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
