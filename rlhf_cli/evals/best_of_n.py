"""Best of n: draw n responses from the SFT policy and keep the one that scores best. No training at all.

What M >= n responses to a prompt say of it needs no resampling. The best of n drawn from them without
replacement has rank k, counted from the worst, with probability C(k-1, n-1) / C(M, n); the gold rewards,
weighted so, are an unbiased estimate of what the best of n is worth (Nakano et al. 2021,
arXiv:2112.09332; used in Gao et al. 2023, arXiv:2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from rlhf_cli.errors import UserError
from rlhf_cli.evals.curves import Curve, Floats, Path
from rlhf_cli.evals.statistics import Estimate, mean_and_se

ALGO = "best_of_n"


@dataclass(frozen=True)
class BestOf:
    """What the best of n is worth, averaged over prompts, with standard errors over prompts."""

    n: int
    kl: float
    """Nats, at most."""
    score: Estimate
    gold: Estimate


def analytic_kl(n: int) -> float:
    """log n - (n - 1) / n: the most KL, in nats, that best of n can have to the policy it draws from.

    Exact where no response is drawn twice and no two score the same, else an upper bound (Beirami et al.
    2024, arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(score: Floats, gold: Floats, ns: Sequence[int]) -> list[BestOf]:
    """Choose by `score` and report both it and `gold`, for each n.

    score, gold: [P,M] of M responses to each of P prompts, drawn independently. Raises UserError for an n
    that is more than M.
    """
    return [
        BestOf(
            n,
            analytic_kl(n),
            mean_and_se(by_prompt(score, score, n).tolist()),
            mean_and_se(by_prompt(score, gold, n).tolist()),
        )
        for n in ns
    ]


def by_prompt(score: Floats, y: Floats, n: int) -> Floats:
    """Unbiased estimate of E[y of the best of n by score], prompt by prompt: [P,M] twice -> [P].

    Of several that score best, each is as likely to be kept. Raises UserError for an n above M.
    """
    samples = score.shape[1]
    if n > samples:
        raise UserError(
            f"the best of {n} takes at least {n} responses to a prompt, but there are {samples}; draw"
            f" more, or leave {n} out."
        )
    # all_below[k]: chance that n drawn from the M without replacement are all among the k worst
    all_below = scipy.stats.hypergeom.pmf(n, samples, np.arange(samples + 1), n)
    upto = scipy.stats.rankdata(score, method="max", axis=1).astype(int)
    below = scipy.stats.rankdata(score, method="min", axis=1).astype(int) - 1
    weights = (all_below[upto] - all_below[below]) / (upto - below)
    estimate: Floats = (weights * y).sum(axis=1)
    return estimate


def as_curve(score: Floats, gold: Floats, ns: Sequence[int], prompts: Sequence[str]) -> Curve:
    """Best of n as a curve beside those of runs: every n an evaluation, its KL the upper bound.

    score, gold: [P,M], ns ascending from 1, which is the SFT policy itself. Steps and episodes are n;
    lengths are nan. Raises UserError for an n above M.
    """
    bound = np.array([analytic_kl(n) for n in ns])
    path = Path(
        key=ALGO,
        algo=ALGO,
        seed=0,
        beta=None,
        setting=ALGO,
        step=np.array(ns),
        episodes=np.array(ns),
        kl=np.repeat(bound[:, None], len(prompts), axis=1),
        reward=np.stack([by_prompt(score, score, n) for n in ns]),
        gold=np.stack([by_prompt(score, gold, n) for n in ns]),
        length=np.full((len(ns), len(prompts)), np.nan),
        prompts=tuple(prompts),
    )
    return Curve(ALGO, ALGO, (path,))
