"""Scorers of texts: one function from prompts and responses to numbers for every source there is.

A score that is missing is NaN; what to do about it is the caller's rule (`reward.missing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from rlhf_cli.dotted import named
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Classifier, Function, Gold, Http, Learned, Part, Single

Scorer: TypeAlias = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Prompts and responses, one to one, to scores."""


def opened(parts: Sequence[Part], gold: Scorer | None, device: str) -> Scorer | None:
    """The weighted sum of all parts that are said of texts; None if the learned model is all there is.

    gold: the dataset's own; device: where a classifier runs. Raises UserError if one cannot be had.
    """
    found = [(part.weight, _opened(part.source, gold, device)) for part in parts]
    weighted = [(weight, scorer) for weight, scorer in found if scorer is not None]
    if not weighted:
        return None

    def total(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        columns = [[w * s for s in scorer(prompts, responses)] for w, scorer in weighted]
        return [sum(row) for row in zip(*columns, strict=True)]

    return total


def _opened(source: Single, gold: Scorer | None, device: str) -> Scorer | None:
    match source:
        case Learned():
            return None
        case Gold():
            if gold is None:
                raise UserError(
                    "reward.source.kind=gold, but nobody knows the gold reward of these data; use"
                    " data.source=embedded, or another reward."
                )
            return gold
        case Function():
            return _function(source)
        case Http():
            from rlhf_cli.rewards.http import endpoint

            return in_batches(endpoint(source), source.batch)
        case Classifier():
            from rlhf_cli.rewards.classifier import classifier

            return in_batches(classifier(source, device), source.batch)


def in_batches(scorer: Scorer, most: int) -> Scorer:
    """The same scorer, asked about at most so many responses at once."""

    def asked(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [
            score
            for at in range(0, len(prompts), most)
            for score in scorer(prompts[at : at + most], responses[at : at + most])
        ]

    return asked


def numbers(scores: object, wanted: int, whose: str) -> list[float]:
    """Whatever a stranger returned as scores, as floats; None and infinities are missing ones.

    Raises UserError unless there are `wanted` numbers.
    """
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != wanted:
        raise UserError(
            f"{whose} must give a list of {wanted} scores, one per response, but gave"
            f" {_shape(scores)}."
        )
    return [_number(score, whose) for score in scores]


def _number(score: object, whose: str) -> float:
    if score is None:
        return math.nan
    try:
        value = float(score)  # type: ignore[arg-type]
    except OverflowError:  # an integer with more digits than there are numbers
        return math.nan
    except (TypeError, ValueError):
        raise UserError(
            f"{whose} gave {score!r} for a score; a number or null is wanted."
        ) from None
    return value if math.isfinite(value) else math.nan


def _shape(scores: object) -> str:
    sized = isinstance(scores, Sequence) and not isinstance(scores, str)
    return f"{len(scores)}" if sized else f"a {type(scores).__name__}"  # type: ignore[arg-type]


def _function(source: Function) -> Scorer:
    call = named("reward.source.call", source.call, "function")
    if not callable(call):
        raise UserError(f"reward.source.call={source.call} is no function.")
    whose = f"reward.source.call={source.call}"

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return numbers(call(list(prompts), list(responses)), len(prompts), whose)

    return in_batches(score, source.batch)
