"""Exploring where the reference hides the better arm: the example of XPO (Xie et al. 2024, arXiv:2405.21046,
proposition 2.1).

Two arms, r(a) = 1 and r(b) = 1/2, and a reference that hardly ever draws a:

    pi_ref(a) = exp(-c / beta)        c = 1/8

Each round draws one response of the policy and one of the reference, labels them by Bradley and Terry's
P(a beats b) = sigma(r(a) - r(b)), and takes as its next policy the one with the least loss on all rounds,

    sum -log sigma(beta m s)  +  alpha sum log pi(y')        m = log pi(a)/pi_ref(a) - log pi(b)/pi_ref(b)

over pairs of unlike arms, s = 1 where a was preferred and -1 where b was, and over the reference's draws
y'. The policies are those with |beta m| <= 1, the range that rewards between 0 and 1 allow; among equally
good ones the nearest to the reference is taken. With alpha = 0 this is online DPO: as long as b is all
that is drawn it has nothing to learn from, for about exp(c / beta) draws. Any alpha > 0 moves off b
after one round, and comes back to a sooner after labels that spoke against it.

Regret is J(pi*) - J(pi), J = E_pi[r] - beta KL(pi | pi_ref), in units of reward, pi* the best of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from scipy.special import expit, log_expit

from rlhf_cli.evals.statistics import proportion_interval
from rlhf_cli.figures.result import Result, Verdict
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import GREY, PANEL, RC, look
from rlhf_cli.recipes import STRICT, Count, NonNegative, Positive
from rlhf_cli.store.run import Run

Floats: TypeAlias = NDArray[np.float64]
REWARDS = (1.0, 0.5)
"""Of a and of b."""
SHORT = 0.125
"""Regret that counts as stuck, units of reward: the proposition's 1/8."""
GRID = np.linspace(0.0, 1.0, 201)
"""|beta m| of the policies that are tried."""


@dataclass(frozen=True, config=STRICT)
class Exploration:
    """The example."""

    beta: Positive
    """Reward units per nat."""
    alpha: Annotated[tuple[NonNegative, ...], Field(min_length=2, max_length=2)]
    """Of the two methods: without the bonus and with it."""
    simulations: Count
    rounds: Count
    """A pair each."""
    seed: int

    @property
    def rare(self) -> float:
        """pi_ref(a)."""
        return float(np.exp(-SHORT / self.beta))

    @property
    def promised(self) -> int:
        """Rounds for which the proposition says online DPO may be stuck: exp(1 / (8 beta)) / 2."""
        return int(np.exp(SHORT / self.beta) / 2)

    @property
    def margins(self) -> Floats:
        """[M] m of the policies that are tried, the nearest to the reference first."""
        sides: Floats = np.stack([GRID, -GRID], axis=1).ravel()[1:] / self.beta
        return sides

    def regret(self, margin: Floats) -> Floats:
        """Of policies by their m, any shape."""
        rare = self.rare
        logit = np.log(rare / (1 - rare)) + margin
        a, b = expit(logit), expit(-logit)
        kl = a * (log_expit(logit) - np.log(rare)) + b * (log_expit(-logit) - np.log1p(-rare))
        best = self.beta * np.log(
            rare * np.exp(REWARDS[0] / self.beta) + (1 - rare) * np.exp(REWARDS[1] / self.beta)
        )
        regret: Floats = best - (a * REWARDS[0] + b * REWARDS[1] - self.beta * kl)
        return regret

    def losses(self, alpha: float) -> Floats:
        """[4,M] what one round adds to the loss of every margin: a beat b, b beat a, the reference drew a,
        the reference drew b."""
        m = self.margins
        logit = np.log(self.rare / (1 - self.rare)) + m
        lost: Floats = np.stack(
            [
                -log_expit(self.beta * m),
                -log_expit(-self.beta * m),
                alpha * log_expit(logit),
                alpha * log_expit(-logit),
            ]
        )
        return lost

    def simulated(self, alpha: float) -> Floats:
        """[R,T+1] regret of R simulations before the first round and after each."""
        rng = np.random.default_rng(self.seed)  # both methods meet the same numbers
        rare, losses, margins = self.rare, self.losses(alpha), self.margins
        logit = np.log(rare / (1 - rare))
        margin, counts = np.zeros(self.simulations), np.zeros((self.simulations, 4))
        found = [self.regret(margin)]
        for _ in range(self.rounds):
            drawn = rng.random((3, self.simulations))
            policy_a, reference_a = drawn[0] < expit(logit + margin), drawn[1] < rare
            a_wins = drawn[2] < expit(REWARDS[0] - REWARDS[1])
            unlike = policy_a != reference_a
            happened = (unlike & a_wins, unlike & ~a_wins, reference_a, ~reference_a)
            counts += np.stack(happened, axis=1)
            margin = margins[(counts @ losses).argmin(axis=1)]
            found.append(self.regret(margin))
        return np.stack(found, axis=1)


@dataclass(frozen=True)
class Mark:
    """One method after one round."""

    method: str
    round: int
    stuck: float
    """Share of the simulations."""
    low: float
    """Of 95%."""
    high: float


METHODS = {"online DPO": look("dpo_online").colour, "XPO": look("xpo").colour}
"""Name and colour, in the order of `alpha`."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """Share of simulations that are stuck against rounds; needs no runs."""
    example = spec.typed(Exploration)
    stuck = {
        name: (example.simulated(alpha) >= SHORT).mean(axis=0)
        for name, alpha in zip(METHODS, example.alpha, strict=True)
    }
    marks = [
        Mark(name, at, share, *_interval(share, example.simulations))
        for name, curve in stuck.items()
        for at, share in enumerate(curve.tolist())
    ]
    verdict, reason = _judged(example, stuck)
    return Result(
        _figure(spec.title, example, marks), [asdict(mark) for mark in marks], verdict, reason
    )


def _interval(share: float, simulations: int) -> tuple[float, float]:
    return proportion_interval(round(share * simulations), simulations)


def _judged(example: Exploration, stuck: Mapping[str, Floats]) -> tuple[Verdict, str]:
    """More than chance has it, online DPO is stuck as long as is promised where XPO is not."""
    at = min(example.promised, example.rounds)
    ends = {name: float(curve[at]) for name, curve in stuck.items()}
    ranges = {name: _interval(share, example.simulations) for name, share in ends.items()}
    said = "; ".join(
        f"{name}: {share:.3f} [{ranges[name][0]:.3f}, {ranges[name][1]:.3f}]"
        for name, share in ends.items()
    )
    (dpo, xpo) = ranges.values()
    verdict: Verdict = (
        "holds" if dpo[0] > xpo[1] else "does not hold" if dpo[1] < xpo[0] else "open"
    )
    return verdict, (
        f"share of {example.simulations:,} simulations with a regret of at least {SHORT:g} after {at:,}"
        f" rounds {said} (intervals of 95%)."
    )


def _figure(title: str, example: Exploration, marks: Sequence[Mark]) -> Figure:
    with rc_context(RC):
        figure = Figure(figsize=(1.3 * PANEL[0], PANEL[1]), layout="constrained")
        axes = figure.subplots()
        for line, (name, colour) in zip(("-", "--"), METHODS.items(), strict=True):
            mine = [mark for mark in marks if mark.method == name]
            rounds = [mark.round for mark in mine]
            axes.plot(rounds, [mark.stuck for mark in mine], line, color=colour, label=name)
            low, high = [mark.low for mark in mine], [mark.high for mark in mine]
            axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(
            example.promised,
            color=GREY,
            linestyle=":",
            linewidth=1,
            label="bound of the\nproposition",
        )
        axes.set(xlabel="rounds (a pair each)", ylabel=f"share with regret of {SHORT:g} or more")
        axes.set(xlim=(0, example.rounds), ylim=(-0.02, 1.02))
        figure.legend(loc="outside right center", title="shades: 95%")
        figure.suptitle(title)
    return figure
