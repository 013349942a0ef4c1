"""Regret on a bandit where everything is exact: the toy of CoPG (Flet-Berliac et al. 2024, arXiv:2406.19185).

Arms y with rewards r(y), a uniform reference, a softmax policy pi that starts there, and two laws mu1, mu2
that the two responses of a pair are drawn from, whatever the policy is. With h = log(pi / pi_ref) and
R = r - beta h, the expected directions of ascent are, for arm a,

    copg        sum_b mu1(a) mu2(b) (R(a) - R(b)) + mu2(a) mu1(b) (R(a) - R(b))
    ipo         the same, with 2 P(a beats b) - 1 in place of r(a) - r(b), halved, and h in place of
                beta h: pairs are labelled by Bradley and Terry's P(a beats b) = sigma(r(a) - r(b))
    pg          m(a) (R(a) - b) - pi(a) sum m (R - b),     m = mu1 + mu2

pg is the policy gradient taken as if the draws were the policy's own, with a baseline b of 0 or of the
policy's value E_pi[r]. Regret is J(pi*) - J(pi), J = E_pi[r] - beta KL(pi | pi_ref), in units of reward;
pi* = pi_ref exp(r / beta) / Z, J(pi*) = beta log Z. The draws of the paper are replaced by their mean, so
there are no seeds and no error bands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.special import expit, log_softmax, logsumexp, softmax

from rlhf_cli.figures.result import Result, Verdict
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import AMBER, GREEN, LINES, PANEL, RC, look
from rlhf_cli.recipes import STRICT, Count, Positive
from rlhf_cli.store.run import Run

Floats: TypeAlias = NDArray[np.float64]
BETAS, EPS = (0.9, 0.999), 1e-8
"""Of Adam: its defaults (Kingma and Ba 2015, arXiv:1412.6980)."""


@dataclass(frozen=True, config=STRICT)
class Bandit:
    """The toy."""

    rewards: tuple[float, ...]
    """[A]"""
    first: tuple[Annotated[float, Field(ge=0)], ...]
    """[A] law of the first response of a pair."""
    second: tuple[Annotated[float, Field(ge=0)], ...]
    """[A] law of the second."""
    beta: Positive
    """Reward units per nat; IPO's tau."""
    lr: Positive
    """Of Adam."""
    steps: Count
    none: Positive
    """A regret that counts as none, units of reward."""

    @property
    def best(self) -> float:
        """J(pi*) = beta log Z."""
        r = np.array(self.rewards)
        return self.beta * float(logsumexp(r / self.beta) - np.log(len(r)))

    def regret(self, theta: Floats) -> float:
        """Of the policy with these logits [A]."""
        pi, h = softmax(theta), self._log_ratio(theta)
        return self.best - float(pi @ (np.array(self.rewards) - self.beta * h))

    def copg(self, theta: Floats) -> Floats:
        """[A]"""
        value = np.array(self.rewards) - self.beta * self._log_ratio(theta)
        return self._of_pairs(value[:, None] - value)

    def ipo(self, theta: Floats) -> Floats:
        """[A], of minus the loss times beta."""
        r, h = np.array(self.rewards), self._log_ratio(theta)
        preference = 2 * expit(r[:, None] - r) - 1
        return self._of_pairs(preference - 2 * self.beta * (h[:, None] - h))

    def pg_zero(self, theta: Floats) -> Floats:
        """[A]"""
        return self._policy_gradient(theta, 0.0)

    def pg_value(self, theta: Floats) -> Floats:
        """[A]"""
        return self._policy_gradient(theta, float(softmax(theta) @ np.array(self.rewards)))

    def _log_ratio(self, theta: Floats) -> Floats:
        h: Floats = log_softmax(theta) + np.log(len(theta))
        return h

    def _of_pairs(self, push: Floats) -> Floats:
        """Towards the first arm of a pair and away from the second, by push [A,A]."""
        weighted = np.outer(self.first, self.second) * push
        up: Floats = weighted.sum(1) - weighted.sum(0)
        return up

    def _policy_gradient(self, theta: Floats, baseline: float) -> Floats:
        value = np.array(self.rewards) - self.beta * self._log_ratio(theta)
        weighted = np.add(self.first, self.second) * (value - baseline)
        up: Floats = weighted - softmax(theta) * weighted.sum()
        return up


METHODS: dict[str, tuple[str, Callable[[Bandit, Floats], Floats]]] = {
    "CoPG": (look("copg").colour, Bandit.copg),
    "IPO": (look("ipo").colour, Bandit.ipo),
    "PG, no baseline": (AMBER, Bandit.pg_zero),
    "PG, value baseline": (GREEN, Bandit.pg_value),
}
"""Name -> colour and direction of ascent."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """Regret against steps; needs no runs."""
    bandit = spec.typed(Bandit)
    curves = {name: regrets(bandit, ascent) for name, (_, ascent) in METHODS.items()}
    verdict, reason = _judged(bandit, curves)
    rows = [
        {"method": name, "step": step, "regret": regret}
        for name, curve in curves.items()
        for step, regret in enumerate(curve)
    ]
    return Result(_figure(spec.title, curves), rows, verdict, reason)


def regrets(bandit: Bandit, ascent: Callable[[Bandit, Floats], Floats]) -> list[float]:
    """[steps + 1] regret before each step of Adam, and after the last."""
    theta, mean, square = (np.zeros(len(bandit.rewards)) for _ in range(3))
    found = [bandit.regret(theta)]
    for step in range(1, bandit.steps + 1):
        up = ascent(bandit, theta)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * up
        square = BETAS[1] * square + (1 - BETAS[1]) * up**2
        first, second = mean / (1 - BETAS[0] ** step), square / (1 - BETAS[1] ** step)
        theta = theta + bandit.lr * first / (np.sqrt(second) + EPS)
        found.append(bandit.regret(theta))
    return found


def _judged(bandit: Bandit, curves: Mapping[str, Sequence[float]]) -> tuple[Verdict, str]:
    """CoPG ends without regret, the others with some, and b = 0 with more than it began with."""
    start = bandit.regret(np.zeros(len(bandit.rewards)))
    copg, ipo, zero, value = (curve[-1] for curve in curves.values())
    agrees = copg <= bandit.none < min(ipo, value) and zero > start
    ends = "; ".join(f"{name}: {curve[-1]:.4f}" for name, curve in curves.items())
    reason = (
        f"regret at the start: {start:.4f}; after {bandit.steps:,} steps {ends} (exact, up to"
        f" {bandit.none:g} counts as none)."
    )
    return "holds" if agrees else "does not hold", reason


def _figure(title: str, curves: Mapping[str, Sequence[float]]) -> Figure:
    with rc_context(RC):
        figure = Figure(figsize=(1.3 * PANEL[0], PANEL[1]), layout="constrained")
        axes = figure.subplots()
        for line, (name, curve) in zip(LINES, curves.items(), strict=True):
            axes.plot(curve, line, color=METHODS[name][0], label=name)
        axes.set(xlabel="steps", ylabel="regret (units of reward)", xlim=(0, None))
        axes.set_ylim(-0.02, None)
        figure.legend(loc="outside right center")
        figure.suptitle(title)
    return figure
