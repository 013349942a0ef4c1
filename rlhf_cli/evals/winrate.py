"""How often one policy's responses are preferred to another's, prompt by prompt.

An outcome is 1 where the first policy's response is the better one, 0 where the second's is, 1/2 for a
tie and nan where nobody could tell. A prompt is one unit, whatever it took to decide it, and intervals
are over prompts: they do not cover what another seed of training would have given.

Judges, reward models among them, like long responses. The win rate at equal length is what is left when
that is taken out, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

Floats: TypeAlias = NDArray[np.float64]


class Share(NamedTuple):
    """Between 0 and 1, with its interval of 95%; nan where there is nothing to tell it from."""

    value: float
    low: float
    high: float


class Position(NamedTuple):
    """Whether a judge minds which response it is shown first."""

    first: float
    """Share of its decided verdicts that are for that one: 1/2 if it does not; nan if it decided none."""
    contradicted: int
    """Prompts on which it preferred the same place in both orders, so that its verdicts contradict."""


UNKNOWN = Share(math.nan, math.nan, math.nan)
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class WinRate:
    """The first policy against the second."""

    wins: int
    ties: int
    losses: int
    untold: int
    """Prompts left out of everything else, because nobody could tell."""
    rate: Share
    """Of wins, a tie being half a one."""
    at_equal_length: Share


def by_score(first: Floats, second: Floats, tolerance: float) -> Floats:
    """[N] outcomes of two scores per prompt, a tie where they differ by no more than `tolerance`.

    nan where a score is missing (nan).
    """
    gap = first - second
    return np.where(np.abs(gap) <= tolerance, 0.5, np.heaviside(gap, 0.5))


def by_both_orders(straight: Floats, swapped: Floats) -> Floats:
    """[N] outcomes of two verdicts per prompt: a win is one in both orders, anything else is a tie.

    straight: 1, 1/2, 0 or nan for the response that is shown first, which is the first policy's;
    swapped: the same of the second policy's, which is shown first then (Zheng et al. 2023,
    arXiv:2306.05685). nan where either verdict is.
    """
    known = ~np.isnan(straight + swapped)
    return np.where(known, np.where(straight == 1 - swapped, straight, 0.5), math.nan)


def position(straight: Floats, swapped: Floats) -> Position:
    """How much the order counted, of verdicts as in `by_both_orders`; unreadable prompts are left out."""
    both = np.stack([straight, swapped])[:, ~np.isnan(straight + swapped)]
    decided = both != 0.5
    first = float(both[decided].mean()) if decided.any() else math.nan
    return Position(first, int((decided.all(0) & (both[0] == both[1])).sum()))


def win_rate(outcome: Floats, excess: Floats) -> WinRate:
    """Count outcomes [N]; excess: [N] length of the first response less that of the second."""
    told = ~np.isnan(outcome)
    outcome, excess = outcome[told], excess[told]
    return WinRate(
        wins=int((outcome == 1).sum()),
        ties=int((outcome == 0.5).sum()),
        losses=int((outcome == 0).sum()),
        untold=int((~told).sum()),
        rate=mean_outcome(outcome),
        at_equal_length=at_equal_length(outcome, excess),
    )


def mean_outcome(outcome: Floats) -> Share:
    """Mean of outcomes [N], none of them nan, with Wilson's interval for what may tie.

    Wilson's interval takes p(1-p) for the variance of an outcome; here it is the outcomes' own, which
    ties make smaller. Without ties the two are the same.
    """
    n = len(outcome)
    if not n:
        return UNKNOWN
    mean, z2 = float(outcome.mean()), _Z**2
    centre = (n * mean + z2 / 2) / (n + z2)
    half = _Z * math.sqrt(n * float(outcome.var()) + z2 / 4) / (n + z2)
    return Share(mean, centre - half, centre + half)


def at_equal_length(outcome: Floats, excess: Floats) -> Share:
    """The win rate if both responses were equally long, by logistic regression.

        logit P(first is better) = theta + phi tanh(excess / s),    s its root mean square

    and the answer is sigma(theta). As in the paper, but without its term for the difficulty of each
    prompt, which needs many policies; a tie counts half a win and half a loss. Jeffreys' prior (Firth
    1993, Biometrika 80:27) keeps both coefficients finite where length or nothing decides every prompt;
    the interval is a sandwich one, which knows that ties vary less.

    outcome: [N], none of them nan; excess: [N] tokens. With equal lengths throughout this is the win
    rate itself; nan if all differences are the same, since then nothing tells length from quality.
    """
    if not excess.any():
        return mean_outcome(outcome)
    if len(np.unique(excess)) < 2:
        return UNKNOWN
    steep = np.tanh(excess / math.sqrt(float(np.mean(excess**2))))
    x = np.column_stack([np.ones_like(steep), steep])

    def information(p: Floats) -> Floats:
        return x.T @ (x * (p * (1 - p))[:, None])

    def loss(beta: Floats) -> float:
        logit = x @ beta
        prior = np.linalg.slogdet(information(expit(logit)))[1] / 2
        return float(np.logaddexp(0, logit).sum() - outcome @ logit - prior)

    theta, phi = minimize(loss, np.zeros(2)).x
    p = expit(theta + phi * steep)
    # Jeffreys' prior is worth h more responses to each prompt, half of them won: h is its leverage.
    h = np.einsum("ni,ij,nj->n", x, np.linalg.inv(information(p)), x) * p * (1 - p)
    squares = (outcome - p) ** 2 + h / 2 * ((1 - p) ** 2 + p**2)
    bread = np.linalg.inv(x.T @ (x * ((1 + h) * p * (1 - p))[:, None]))
    se = math.sqrt(float((bread @ (x.T @ (x * squares[:, None])) @ bread)[0, 0]))
    return Share(*(float(expit(theta + step * se)) for step in (0, -_Z, _Z)))
