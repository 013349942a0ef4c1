"""Curves compared at the same KL, which is what they paid, rather than after the same number of steps.

A run is read where the mean KL of its evaluations first reaches the KL asked for, on the straight line
between that evaluation and the one before. Both have the same weight for every prompt, so that prompts
stay paired. In a bootstrap the place is looked up anew each round: intervals cover the error of the KL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Ints, Means, Path, mean_of_known

KLS = (1.0, 2.0, 5.0, 10.0)
"""Nats."""
STRIPS = 20
"""Of an area; more change it by less than its interval's last digit."""

Measure: TypeAlias = Literal["reward", "gold"]
MEASURES: tuple[Measure, ...] = ("reward", "gold")


class AtKL(NamedTuple):
    """A run at one KL, prompt by prompt [N]."""

    reward: Floats
    gold: Floats


@dataclass(frozen=True)
class Matched:
    """A curve at one KL."""

    curve: str
    algo: str
    kl: float
    seeds: int
    """Runs of the curve."""
    reached: int
    """Those that reached the KL: the rest is of them alone."""
    reward: Interval | None
    """None if no run reached the KL; so is `gold`, which is also None where the data have none."""
    gold: Interval | None


@dataclass(frozen=True)
class Difference:
    """A curve minus the baseline, at one KL."""

    curve: str
    baseline: str
    kl: float
    measure: Measure
    difference: Interval
    p: float
    """Of no difference at all, two-sided."""
    p_holm: float
    """Corrected over all differences of the table."""


def at_kl(path: Path, kl: float) -> AtKL | None:
    """A run's reward and gold at a mean KL of `kl` nats; None if it did not reach it.

    nan for a prompt that lacks a score at either of the two evaluations.
    """
    at = _crossing(path.kl.mean(axis=1), kl)
    if not np.isfinite(at.share):
        return None
    low, high, share = int(at.low), int(at.high), float(at.share)
    return AtKL(*((1 - share) * y[low] + share * y[high] for y in (path.reward, path.gold)))


def matched(curves: Sequence[Curve], kls: Sequence[float] = KLS) -> list[Matched]:
    """Mean reward and gold of every curve at every KL, with intervals of 95%.

    Raises UserError for a KL that is not above 0.
    """
    return [_row(curve, kl) for kl in _positive(kls) for curve in curves]


def differences(curves: Sequence[Curve], kls: Sequence[float], baseline: str) -> list[Difference]:
    """Every other curve minus the one called `baseline`, at each KL that a run of both reached.

    Differences are of the same prompts, each averaged over the seeds. Interval and p value go by the same
    standard error. It covers the draw of prompts, of responses and of the KL, and that of seeds in a curve
    that has several (`Interval.seeds` is 1 where one has not); the reward model and the data are taken as
    given. All rows count as one family in Holm's correction. Raises UserError for an unknown baseline or a
    KL that is not above 0.
    """
    by_name = {curve.name: curve for curve in curves}
    if baseline not in by_name:
        raise UserError(
            f"baseline={baseline} is none of the curves of this table; choose {' or '.join(by_name)}."
        )
    base = by_name.pop(baseline)
    found = [
        (curve.name, kl, measure, one)
        for kl in _positive(kls)
        for curve in by_name.values()
        for measure, one in _against(curve, base, kl)
    ]
    corrected = holm([one.p for *_, one in found])
    return [
        Difference(name, baseline, kl, measure, one, one.p, p_holm)
        for (name, kl, measure, one), p_holm in zip(found, corrected, strict=True)
    ]


@dataclass(frozen=True)
class Area:
    """What a curve gained over the SFT policy for a KL budget that is anywhere up to `upto`."""

    curve: str
    upto: float
    """Nats."""
    reward: Interval | None
    """None if a run did not reach that far; so is `gold`, which is also None where the data have none."""
    gold: Interval | None


def areas(curves: Sequence[Curve], upto: float) -> list[Area]:
    """The mean gain of every curve over KLs up to `upto`, each as likely, with intervals of 95%.

    The area under the curve of gains, over `upto`, by the midpoints of `STRIPS` strips. Raises UserError for
    a KL that is not above 0.
    """
    (upto,) = _positive([upto])
    middles = (np.arange(STRIPS) + 0.5) * upto / STRIPS

    def gained(m: Sequence[Means]) -> Floats:
        level = sum(_levels(m[0], kl) for kl in middles) / STRIPS
        start = np.stack([mean_of_known(y[..., 0]) for y in (m[0].reward, m[0].gold)], -1)
        return level - start

    found = []
    for curve in curves:
        whole = len(_arrived(curve, upto).paths) == len(curve.paths)
        both = dict(_known(intervals(gained, [curve]))) if whole else {}
        found.append(Area(curve.name, upto, both.get("reward"), both.get("gold")))
    return found


def reach(curves: Sequence[Curve]) -> float:
    """The largest KL that every run of every curve has reached, in nats."""
    return min(float(path.kl.mean(axis=1).max()) for curve in curves for path in curve.paths)


def holm(p: Sequence[float]) -> list[float]:
    """Correct p values for being looked at together, in their order (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none may fall below a smaller one or exceed 1.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(raised, 1.0)
    return [float(x) for x in corrected]


def _row(curve: Curve, kl: float) -> Matched:
    arrived = _arrived(curve, kl)
    found: dict[Measure, Interval] = {}
    if arrived.paths:
        found = dict(_known(intervals(lambda m: _levels(m[0], kl), [arrived])))
    reached = len(arrived.paths)
    both = (found.get(measure) for measure in MEASURES)
    return Matched(curve.name, curve.algo, kl, len(curve.paths), reached, *both)


def _against(curve: Curve, base: Curve, kl: float) -> Iterator[tuple[Measure, Interval]]:
    pair = [_arrived(curve, kl), _arrived(base, kl)]
    if all(one.paths for one in pair):
        yield from _known(intervals(lambda m: _levels(m[0], kl) - _levels(m[1], kl), pair))


def _known(found: Sequence[Interval]) -> Iterator[tuple[Measure, Interval]]:
    """Those of the measures that there are."""
    for measure, one in zip(MEASURES, found, strict=True):
        if np.isfinite(one.value):
            yield measure, one


def _arrived(curve: Curve, kl: float) -> Curve:
    """The curve with those of its runs that reached the KL."""
    return replace(curve, paths=tuple(path for path in curve.paths if at_kl(path, kl)))


def _levels(mean: Means, kl: float) -> Floats:
    """[...,2] reward and gold at the KL, averaged over the runs."""
    at = _crossing(mean.kl, kl)

    def level(y: Floats) -> Floats:
        low, high = (np.take_along_axis(y, i[..., None], -1)[..., 0] for i in (at.low, at.high))
        return mean_of_known((1 - at.share) * low + at.share * high)

    return np.stack([level(mean.reward), level(mean.gold)], axis=-1)


class _Crossing(NamedTuple):
    """Two neighbouring evaluations and how far the KL is on the way between them, each [...]."""

    low: Ints
    high: Ints
    share: Floats
    """nan where the KL is never reached."""


def _crossing(kl: ArrayLike, target: float) -> _Crossing:
    """Where KLs [...,K] first reach the target: at once, where the first one is not below it."""
    level = np.asarray(kl, dtype=np.float64)
    above = level >= target
    high = above.argmax(axis=-1)
    low = np.maximum(high - 1, 0)
    before, after = (np.take_along_axis(level, i[..., None], -1)[..., 0] for i in (low, high))
    with np.errstate(invalid="ignore", divide="ignore"):
        way = np.where(high == 0, 1.0, (target - before) / (after - before))
    return _Crossing(low, high, np.where(above.any(axis=-1), way, np.nan))


def _positive(kls: Sequence[float]) -> Sequence[float]:
    for kl in kls:
        if not kl > 0:
            raise UserError(
                f"a KL of {kl:g} nats tells no curves apart, as all start from the SFT policy; give"
                " KLs above 0, such as 1,2,5."
            )
    return kls
