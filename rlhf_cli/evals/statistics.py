"""A number and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy


class Estimate(NamedTuple):
    """A mean and its standard error, in the units of the data."""

    mean: float
    se: float


class Difference(NamedTuple):
    """A mean difference, its standard error, and the one divided by the other."""

    mean: float
    se: float
    z: float


class Line(NamedTuple):
    """y = intercept + slope x by least squares, over x from low to high."""

    slope: float
    intercept: float
    slope_se: float
    r_squared: float
    n: int
    low: float
    high: float


def mean_and_se(x: Sequence[float]) -> Estimate:
    """Mean and sd / sqrt(n) with the sample's sd (n - 1); nan where values are too few."""
    n = len(x)
    mean = math.fsum(x) / n if n else math.nan
    se = float(np.std(x, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, se)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Mean of a - b over the same prompts; what the prompts have in common cancels.

    z is inf if every pair differs by the same amount, nan if that amount is 0. Raises ValueError
    for unequal lengths.
    """
    mean, se = mean_and_se([x - y for x, y in zip(a, b, strict=True)])
    if se == 0:
        return Difference(mean, se, math.copysign(math.inf, mean) if mean else math.nan)
    return Difference(mean, se, mean / se)


def proportion_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion: sensible near 0 and 1, unlike mean plus or minus se."""
    interval = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def line_fit(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """Straight line through points by least squares; None if all x are the same.

    The error of the slope is nan for two points, which a line always meets.
    """
    if len(set(x)) < 2:
        return None
    # Not scipy.stats.linregress, for which a figure would wait until scipy.stats is loaded.
    (xx, xy), (_, yy) = np.cov(x, y, bias=True).tolist()
    slope, n = xy / xx, len(x)
    r_squared = min((xy / math.sqrt(xx * yy)) ** 2, 1.0) if yy else math.nan
    return Line(
        slope=slope,
        intercept=float(np.mean(y)) - slope * float(np.mean(x)),
        slope_se=math.sqrt((1 - r_squared) * yy / xx / (n - 2)) if n > 2 else math.nan,
        r_squared=r_squared,
        n=n,
        low=min(x),
        high=max(x),
    )
