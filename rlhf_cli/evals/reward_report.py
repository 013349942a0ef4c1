"""What a reward model is worth on held-out pairs, and how much of that their length alone would tell.

A pair is ranked as labelled if its chosen answer scores higher; a tie is not. People and models often
prefer the longer answer, so the rule that looks at nothing but length is what a reward model has to
beat, and the pairs whose chosen answer is the shorter one show what it knows besides (Singhal et al.
2023, arXiv:2310.03716).

The model gives its own ranking of a pair the probability sigma(|gap|), gap in logits. Where it is
calibrated, so many of the pairs are ranked as labelled. The expected calibration error is the distance
of the two, averaged over the pairs bin by bin (Guo et al. 2017, arXiv:1706.04599).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rlhf_cli.evals.statistics import mean_and_se, proportion_interval

BINS = 10
"""Of the calibration curve: equally wide, from a probability of 1/2 to 1."""
BARS = 40
"""Of the histogram of gaps: equally wide, from the least gap to the largest."""

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Pairs, the chosen answer in column 0."""

    scores: Floats
    """[N,2] calibrated."""
    lengths: Ints
    """[N,2] tokens of each answer as it was read, the end token included."""
    subsets: Sequence[str]
    """[N] the part of the data each pair is from; empty where there are no parts."""
    scale: float
    """Logits in a unit of score."""
    alone: Floats
    """[K] the first K answers, row by row, scored once more: one at a time and without padding."""


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs ranked as labelled, with Wilson's interval of 95%."""

    share: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class LengthRule:
    """A ranking by length alone; a pair of equal lengths counts one half."""

    prefers: Literal["longer", "shorter"]
    """Whichever ranks more training pairs as labelled."""
    train: float
    """Share of training pairs that it ranks as labelled."""
    heldout: float
    """The same of the held-out ones."""


@dataclass(frozen=True)
class Bin:
    """Pairs whose ranking the model gives about the same probability."""

    low: float
    high: float
    probability: float
    """Their mean."""
    observed: Accuracy


@dataclass(frozen=True)
class Calibration:
    """Probabilities against shares."""

    error: float
    """Expected calibration error."""
    bins: tuple[Bin, ...]
    """Those with a pair in them."""


@dataclass(frozen=True)
class Histogram:
    """How many pairs have which gap, score of the chosen answer minus that of the other."""

    edges: tuple[float, ...]
    pairs: tuple[int, ...]
    """One fewer than there are edges."""


@dataclass(frozen=True)
class Tenth:
    """Answers of similar length: about a tenth of all, as far as equal lengths allow."""

    shortest: int
    longest: int
    answers: int
    score: float
    """Their mean."""
    score_se: float | None
    """Its standard error; None for a single answer."""


@dataclass(frozen=True)
class Agreement:
    """Answers that were scored twice: beside others, and alone."""

    answers: int
    largest: float
    """Difference between the two scores of one answer."""


@dataclass(frozen=True)
class Report:
    """All of it. Scores are in standard deviations of those of SFT responses, and probabilities in shares."""

    accuracy: Accuracy
    subsets: Mapping[str, Accuracy]
    """By part of the data, if it has parts."""
    by_length: Mapping[str, Accuracy]
    """By which answer is the longer one; what never occurs is left out."""
    length_rule: LengthRule
    calibration: Calibration
    gaps: Histogram
    score_by_length: tuple[Tenth, ...]
    agreement: Agreement


def report(held: Scored, train_lengths: Ints) -> Report:
    """What held-out pairs say; train_lengths: [M,2] tokens of the training pairs, chosen first."""
    gap = held.scores[:, 0] - held.scores[:, 1]
    right, longer = gap > 0, held.lengths[:, 0] - held.lengths[:, 1]
    by_length = {
        "chosen longer": longer > 0,
        "chosen shorter": longer < 0,
        "same length": longer == 0,
    }
    names = np.asarray(held.subsets)
    batched = held.scores.ravel()[: len(held.alone)]
    return Report(
        accuracy=_accuracy(right),
        subsets={
            str(name): _accuracy(right[names == name])
            for name in dict.fromkeys(held.subsets)
            if name
        },
        by_length={name: _accuracy(right[some]) for name, some in by_length.items() if some.any()},
        length_rule=_length_rule(train_lengths, held.lengths),
        calibration=_calibration(gap * held.scale, right),
        gaps=_histogram(gap),
        score_by_length=_by_length(held.lengths.ravel(), held.scores.ravel()),
        agreement=Agreement(len(batched), float(np.abs(batched - held.alone).max(initial=0.0))),
    )


def _accuracy(right: Flags) -> Accuracy:
    count = int(right.sum())
    return Accuracy(count / len(right), *proportion_interval(count, len(right)), len(right))


def _length_rule(train: Ints, heldout: Ints) -> LengthRule:
    longer, held = _longer_chosen(train), _longer_chosen(heldout)
    if longer >= 0.5:
        return LengthRule("longer", longer, held)
    return LengthRule("shorter", 1 - longer, 1 - held)


def _longer_chosen(lengths: Ints) -> float:
    more = np.sign(lengths[:, 0] - lengths[:, 1])
    return float((1 + more).mean() / 2)


def _calibration(logits: Floats, right: Flags) -> Calibration:
    probability = expit(np.abs(logits))
    edges = np.linspace(0.5, 1.0, BINS + 1)
    place = np.digitize(probability, edges[1:-1])
    bins, error = [], 0.0
    for i in np.unique(place):
        some = place == i
        one = Bin(edges[i], edges[i + 1], float(probability[some].mean()), _accuracy(right[some]))
        bins.append(one)
        error += some.mean() * abs(one.observed.share - one.probability)
    return Calibration(float(error), tuple(bins))


def _histogram(gap: Floats) -> Histogram:
    pairs, edges = np.histogram(gap, BARS)
    return Histogram(tuple(edges.tolist()), tuple(pairs.tolist()))


def _by_length(lengths: Ints, scores: Floats) -> tuple[Tenth, ...]:
    cuts = np.unique(np.quantile(lengths, np.linspace(0.1, 0.9, 9), method="lower"))
    place = np.searchsorted(cuts, lengths)
    found = []
    for i in np.unique(place):
        some: Any = scores[place == i]
        mean, se = mean_and_se(some.tolist())
        own = lengths[place == i]
        several = len(some) > 1
        found.append(
            Tenth(int(own.min()), int(own.max()), len(some), mean, se if several else None)
        )
    return tuple(found)
