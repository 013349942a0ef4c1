"""The evaluations of runs prompt by prompt, so that runs can be compared on the same prompts.

A run measures itself on the same prompts at every evaluation, and every run on the same data is asked
the same ones in the same order: column i is one prompt in all of the arrays here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.errors import UserError
from rlhf_cli.evals.table import Point, points
from rlhf_cli.store.run import Run

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)  # equal is the same one: arrays have no hash
class Path:
    """One run from evaluation to evaluation: K of them, each on the same N prompts."""

    key: str
    algo: str
    seed: int
    beta: float | None
    setting: str
    """What the run shares with those that differ from it in their seed only."""
    step: Ints
    """[K] ascending."""
    episodes: Ints
    """[K] responses drawn for learning so far, or rows learned from."""
    kl: Floats
    """[K,N] nats per response, by the estimator k1."""
    reward: Floats
    """[K,N] nan where there is no score; so is `gold`."""
    gold: Floats
    """[K,N]"""
    length: Floats
    """[K,N] tokens."""
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """The runs that are drawn as one."""

    name: str
    algo: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Means:
    """A curve whose prompts have been averaged over: what a statistic is computed from.

    Arrays are [...,S,K], S runs by K evaluations; a run with fewer of them ends in nan. The leading
    axes are the rounds of a bootstrap.
    """

    kl: Floats
    reward: Floats
    gold: Floats
    length: Floats

    def without(self, path: int) -> Means:
        """The curve less one of its runs."""
        parts = (self.kl, self.reward, self.gold, self.length)
        return Means(*(np.delete(part, path, axis=-2) for part in parts))


def curves(runs: Sequence[Run], by: Literal["setting", "algo"] = "setting") -> list[Curve]:
    """Gather the RL runs among `runs` that have been evaluated, in order of their names.

    By setting, runs that differ in nothing but their seed make a curve, named as in `table.points`; by
    algo, all runs of an algorithm do, a sweep of beta for one. A run named twice counts once. Raises
    UserError if samples are missing or two runs were asked different prompts.
    """
    each = {run.key: run for run in runs}
    found = [
        _path(each[key], list(its_points))
        for key, its_points in groupby(points(list(each.values())), lambda point: point.key)
    ]
    _check_prompts(found, each)
    gathered: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        gathered[path.setting if by == "setting" else path.algo].append(path)
    return [Curve(name, paths[0].algo, tuple(paths)) for name, paths in sorted(gathered.items())]


def means(curve: Curve, weights: Floats | None = None) -> Means:
    """Average over prompts: all of them alike, [S,K], or by `weights` [R,N], [R,S,K].

    Values that are missing are left out of their mean; nan if all are.
    """
    longest = max(len(path.step) for path in curve.paths)

    def averaged(name: str) -> Floats:
        values = np.stack([_padded(getattr(path, name), longest) for path in curve.paths])
        if weights is None:
            return mean_of_known(values)
        known = np.isfinite(values)
        # All of them, nearly always; whole counts have the same sum in whatever order.
        heard = weights.sum(-1) if known.all() else known @ weights.T
        with np.errstate(invalid="ignore"):
            mean = (np.where(known, values, 0.0) @ weights.T) / heard
        return np.moveaxis(mean, -1, 0)

    return Means(averaged("kl"), averaged("reward"), averaged("gold"), averaged("length"))


def mean_of_known(values: Floats, axis: int = -1) -> Floats:
    """Mean of the finite values along an axis; nan where there are none."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0.0).sum(axis) / known.sum(axis)
    return mean


def _path(run: Run, its_points: Sequence[Point]) -> Path:
    samples = [run.responses(point.step) for point in its_points]
    first = its_points[0]

    def column(name: str) -> Floats:
        rows = [[row.get(name) for row in sample] for sample in samples]
        return np.array(rows, dtype=np.float64)  # None becomes nan

    return Path(
        key=first.key,
        algo=first.algo,
        seed=first.seed,
        beta=first.beta,
        setting=first.curve,
        step=np.array([point.step for point in its_points]),
        episodes=np.array([point.episodes for point in its_points]),
        kl=column("kl"),
        reward=column("score"),
        gold=column("gold"),
        length=column("length"),
        prompts=tuple(row["prompt"] for row in samples[0]),
    )


def _check_prompts(paths: Sequence[Path], runs: dict[str, Run]) -> None:
    for path in paths[1:]:
        if path.prompts != paths[0].prompts:
            first, other = (runs[p.key].path.name for p in (paths[0], path))
            raise UserError(
                f"{first} and {other} were asked different prompts at their evaluations; name runs"
                " with the same data and eval.prompts."
            )


def _padded(values: Floats, rows: int) -> Floats:
    return np.pad(values, ((0, rows - len(values)), (0, 0)), constant_values=np.nan)
