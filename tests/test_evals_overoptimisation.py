"""Where gold turns, on curves that follow the two laws exactly and on noisy ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from rlhf_cli.errors import UserError
from rlhf_cli.evals.curves import Curve, Floats
from rlhf_cli.evals.overoptimisation import Form, Turning, overoptimisation
from tests.test_evals_curves import a_curve, a_path

DISTANCES = np.linspace(0.0, 4.0, 9)
START = np.tile([-1.0, 1.0], 20)
"""What the SFT policy scores on 40 prompts: the mean is 0, the standard deviation 1."""


def law(form: Form, alpha: float, beta: float, d: Floats) -> Floats:
    """Gold gained at each sqrt(KL), as in the paper, 0 at 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bent = np.log(d) if form == "rl" else d
        return np.where(d > 0, d * (alpha - beta * bent), 0.0)


def following(gained: ArrayLike, d: Floats = DISTANCES, gold_sd: float = 1.0) -> Curve:
    """One run without noise that gains so much gold, in standard deviations, at each sqrt(KL)."""
    kl = np.repeat(d[:, None] ** 2, len(START), axis=1)
    gold = gold_sd * (START + np.asarray(gained)[:, None])
    return a_curve(a_path(kl, START + kl, gold))


@pytest.mark.parametrize(
    ("form", "alpha", "beta", "turns"),
    [
        ("rl", 1.0, 0.8, math.exp(1 / 0.8 - 1) ** 2),
        ("best_of_n", 1.0, 0.2, 2.5**2),
    ],
)
@pytest.mark.parametrize("gold_sd", [1.0, 7.0])
def test_both_numbers_and_the_turning_point_of_a_law_are_found_again(
    form: Form, alpha: float, beta: float, turns: float, gold_sd: float
) -> None:
    curve = following(law(form, alpha, beta, DISTANCES), gold_sd=gold_sd)
    found = overoptimisation(curve, form)
    assert (found.curve, found.form) == ("ppo", form)
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta), abs=1e-9)
    turning = found.turning
    assert (turning.kl, turning.measured) == pytest.approx((turns, 16.0), abs=1e-9)
    assert turning.low <= turns <= turning.high and turning.high - turning.low < 0.3


@pytest.mark.parametrize(
    ("form", "alpha", "beta"),
    [("rl", 2.0, 0.5), ("rl", 1.0, -0.1), ("best_of_n", 1.0, 0.1), ("best_of_n", 1.0, -0.1)],
)
def test_a_turn_that_was_not_reached_is_said_not_to_be_there(
    form: Form, alpha: float, beta: float
) -> None:
    turning = overoptimisation(following(law(form, alpha, beta, DISTANCES)), form).turning
    assert (turning.kl, turning.high) == (math.inf, math.inf)
    assert str(turning) == "no turning point within the measured range of 0 to 16.00 nats"


@pytest.mark.parametrize(
    ("form", "alpha", "beta"), [("best_of_n", -1.0, 0.1), ("best_of_n", -1.0, -0.1), ("rl", -1, 0)]
)
def test_gold_that_falls_from_the_start_turns_at_0(form: Form, alpha: float, beta: float) -> None:
    turning = overoptimisation(following(law(form, alpha, beta, DISTANCES)), form).turning
    assert (turning.kl, turning.low) == (0.0, 0.0)


def test_a_turning_point_is_told_with_its_range() -> None:
    assert str(Turning(3.0, 2.125, 4.5, 16.0)) == (
        "gold turns at 3.00 nats (2.12 to 4.50) of 0 to 16.00 nats"
    )
    assert str(Turning(3.0, 2.125, math.inf, 16.0)) == (
        "gold turns at 3.00 nats (2.12 to none measured) of 0 to 16.00 nats"
    )


def test_the_range_holds_the_turning_point_in_at_least_90_of_100_noisy_cases() -> None:
    random, held, cases = np.random.default_rng(6), 0, 120
    kl = np.repeat(DISTANCES[:, None] ** 2, 100, axis=1)
    proxy, truth = kl + random.standard_normal(100), math.exp(1 / 0.8 - 1) ** 2
    for _ in range(cases):
        paths = []
        for seed in range(4):
            alpha = 1.0 + 0.3 * random.standard_normal()
            gold = law("rl", alpha, 0.8, DISTANCES)[:, None] + random.standard_normal((9, 100))
            paths.append(a_path(kl, proxy, gold, seed=seed))
        turning = overoptimisation(a_curve(*paths)).turning
        held += turning.low <= truth <= turning.high
    assert held / cases >= 0.90


def test_the_gap_is_what_the_proxy_gained_over_gold_in_standard_deviations() -> None:
    # proxy +4 at a standard deviation of 2, gold +0.25 at one of 0.5; the other run ends earlier, at +2
    # and +0.5
    kl = np.repeat([[0.0], [1.0], [2.0], [3.0]], len(START), axis=1)
    gains: list[Any] = [([0, 1, 2, 4], [0, 9, 9, 0.25]), ([0, 1, 2], [0, 9, 0.5])]
    paths = [
        a_path(
            kl[: len(proxy)],
            2 * START + np.array(proxy)[:, None],
            0.5 * START + np.array(gold)[:, None],
            seed=seed,
        )
        for seed, (proxy, gold) in enumerate(gains)
    ]
    gap = overoptimisation(a_curve(*paths)).gap
    assert gap.value == pytest.approx(((2 - 0.5) + (1 - 1)) / 2, abs=1e-12)
    assert gap.se == pytest.approx(0.75, abs=1e-9)


def test_a_curve_without_gold_or_evaluations_or_spread_is_refused_with_the_fix() -> None:
    kl = np.repeat([[0.0], [1.0], [2.0]], len(START), axis=1)
    with pytest.raises(UserError) as refusal:
        overoptimisation(a_curve(a_path(kl, kl)))
    assert str(refusal.value) == (
        "ppo has no gold reward to hold the proxy against; train it on data that have one, such as"
        " data.source=embedded."
    )
    with pytest.raises(UserError) as refusal:
        overoptimisation(a_curve(a_path(kl, kl, START + kl)))
    assert str(refusal.value) == (
        "ppo was evaluated 2 time(s) after its start, but the fit takes 3; evaluate more often with"
        " eval.points=N."
    )
    curve = following(law("rl", 1.0, 0.5, DISTANCES), gold_sd=0)
    with pytest.raises(UserError) as refusal:
        overoptimisation(curve)
    assert str(refusal.value) == (
        "ppo starts with the same proxy or gold reward on every prompt, so gains have no standard"
        " deviation to be measured in; `rlhf frontier` draws them as they are."
    )


def test_a_curve_without_a_proxy_has_a_turning_point_but_no_gap() -> None:
    kl = np.repeat(DISTANCES[:, None] ** 2, len(START), axis=1)
    gold = START + law("rl", 1.0, 0.8, DISTANCES)[:, None]
    found = overoptimisation(a_curve(a_path(kl, np.full_like(kl, np.nan), gold)))
    assert found.beta == pytest.approx(0.8, abs=1e-9)
    assert math.isnan(found.gap.value) and math.isnan(found.gap.low)
