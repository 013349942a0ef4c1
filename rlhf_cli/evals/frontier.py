"""What the points of a KL-reward frontier say beyond themselves: a line, a rise, the best of them, an area.

KL is in nats per response, from the SFT policy; y is a reward or what was gained of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its parts load when they are used
from numpy.typing import ArrayLike, NDArray

from rlhf_cli.evals.curves import Curve, Floats, means
from rlhf_cli.evals.statistics import Line, line_fit


@dataclass(frozen=True)
class Rise:
    """A function of the KL that never falls, straight between its points."""

    kl: Floats
    """[M] ascending, no two the same."""
    y: Floats
    """[M] never descending."""

    def __call__(self, kl: Floats) -> Floats:
        """Its value, in the shape of `kl`; nan outside of what was measured."""
        return np.interp(kl, self.kl, self.y, left=np.nan, right=np.nan)


def straight(curve: Curve, y: Literal["reward", "gold"] = "reward") -> Line | None:
    """Straight line through all evaluations of all runs of a curve, by least squares.

    As the P3O blog draws its frontiers. None if no two evaluations differ in KL. The errors of the fit
    take evaluations for independent, which those of one run are not: for an interval of the slope see
    `bootstrap.interval`.
    """
    mean = means(curve)
    kl, level = mean.kl.ravel(), getattr(mean, y).ravel()
    known = np.isfinite(kl) & np.isfinite(level)
    return line_fit(kl[known].tolist(), level[known].tolist())


def monotone(kl: ArrayLike, y: ArrayLike) -> Rise:
    """The function of the KL that never falls and is nearest to the points, by least squares.

    kl, y: [M] in any order; points of the same KL count as their mean, as often as they are. Isotonic
    regression (Barlow, Bartholomew, Bremner and Brunk 1972) fits the points themselves.
    """
    places, mean, points = _merged(kl, y)
    fit = scipy.optimize.isotonic_regression(mean, weights=points)
    return Rise(places, np.asarray(fit.x))


def pareto(points: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other one dominates, by as little KL and as much y, and less or more of one.

    points: [M,2] of KL and y. Returns [M]; the same point twice is in or out twice.
    """
    kl, y = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
    as_good = (kl <= kl[:, None]) & (y >= y[:, None])
    better = (kl < kl[:, None]) | (y > y[:, None])
    free: NDArray[np.bool_] = ~(as_good & better).any(axis=1)
    return free


def area(kl: ArrayLike, y: ArrayLike, upto: float) -> float:
    """Mean height of the curve through the points between 0 and `upto` nats, in the units of y.

    kl, y: [M] in any order, joined by straight lines from the least KL to the largest; points of the same
    KL count as their mean, and the first is held down to 0 nats. With y the gain over the SFT policy this
    is the gain to expect of a KL budget that is anywhere up to `upto`, each as likely. nan if the curve
    does not reach that far.
    """
    places, mean, _ = _merged(kl, y)
    if places[-1] < upto:
        return float("nan")
    inside = places[(places > 0) & (places < upto)]
    knots = np.concatenate([[0.0], inside, [upto]])
    return float(scipy.integrate.trapezoid(np.interp(knots, places, mean), knots)) / upto


def _merged(kl: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """KLs in order, the mean y at each, and of how many points."""
    order = np.asarray(kl, dtype=np.float64)
    places, where = np.unique(order, return_inverse=True)
    points = np.bincount(where).astype(np.float64)
    mean: Floats = np.bincount(where, np.asarray(y, dtype=np.float64)) / points
    return places, mean, points
