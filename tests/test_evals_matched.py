"""Curves at the same KL: where they are read, how far they differ, and who never got there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlhf_cli.errors import UserError
from rlhf_cli.evals.curves import Curve
from rlhf_cli.evals.matched import areas, at_kl, differences, holm, matched, reach
from tests.test_evals_curves import a_curve, a_path


def test_a_run_is_read_on_the_line_between_two_evaluations() -> None:
    # mean KLs 0, 2, 4; 2.5 is a quarter of the way from the second to the third
    path = a_path([[0, 0], [1, 3], [2, 6]], [[0, 0], [4, 8], [8, 0]], [[0, 0], [-1, 1], [-1, 5]])
    found = at_kl(path, 2.5)
    assert found is not None
    assert found.reward.tolist() == [5.0, 6.0] and found.gold.tolist() == [-1.0, 2.0]


def test_a_run_that_returns_is_read_where_it_first_arrives() -> None:
    path = a_path([[0], [4], [1], [3]], [[0], [8], [0], [100]])
    found = at_kl(path, 3)
    assert found is not None and found.reward.tolist() == [6.0]


def test_a_kl_that_is_met_exactly_is_read_there() -> None:
    path = a_path([[0], [1], [2]], [[0.0], [5.0], [math.nan]])
    found = at_kl(path, 1)
    assert found is not None and found.reward.tolist() == [5.0]


def test_a_run_that_never_arrives_is_not_read() -> None:
    assert at_kl(a_path([[0, 0], [1, 2]], [[0, 0], [1, 1]]), 1.6) is None


def straight(slope: float, seed: int, upto: float, setting: str = "ppo", noise: float = 0) -> Curve:
    """One run of 40 prompts from 0 to `upto` nats, its reward the slope times the KL."""
    kl = np.repeat([[0.0], [upto]], 40, axis=1)
    random = np.random.default_rng(seed)
    reward = slope * kl + noise * random.standard_normal(kl.shape) * [[0.0], [1.0]]
    return a_curve(a_path(kl, reward, 2 * reward, seed=seed, setting=setting))


def together(*curves: Curve) -> Curve:
    return a_curve(*(path for curve in curves for path in curve.paths))


def test_a_curve_is_the_mean_of_the_runs_that_reached_the_kl() -> None:
    curve = together(straight(1, 1, 4), straight(2, 2, 4), straight(9, 3, 1.5))
    low, mid, far = matched([curve], [1, 2, 5])
    assert (low.curve, low.algo, low.kl, low.seeds, low.reached) == ("ppo", "ppo", 1, 3, 3)
    assert low.reward is not None and low.reward.value == pytest.approx(4.0, abs=1e-12)
    assert (mid.seeds, mid.reached) == (3, 2)
    assert mid.reward is not None and mid.gold is not None
    assert mid.reward.value == pytest.approx(3.0, abs=1e-12)
    assert mid.gold.value == pytest.approx(6.0, abs=1e-12)
    # two seeds, at 2 and 4, and no noise: s / sqrt(2) with one degree of freedom
    assert (mid.reward.se, mid.reward.df, mid.reward.seeds) == pytest.approx((1, 1, 2), abs=1e-9)
    assert (far.reached, far.reward, far.gold) == (0, None, None)


def test_without_gold_there_is_no_gold_at_any_kl() -> None:
    (row,) = matched([a_curve(a_path([[0, 0], [2, 2]], [[0, 0], [1, 3]]))], [1])
    assert row.gold is None and row.reward is not None and row.reward.value == 1.0


def test_the_error_of_the_kl_is_part_of_the_interval() -> None:
    # The reward is certain, 3 per nat of the mean; the KL of a prompt is 2 or 6 at the end. At 2 nats,
    # half way, reward = 12 * 2 / KL, so its error is 6 * sd / KL.
    kl = np.stack([np.zeros(400), np.tile([2.0, 6.0], 200)])
    reward = np.repeat([[0.0], [12.0]], 400, axis=1)
    (row,) = matched([a_curve(a_path(kl, reward))], [2])
    assert row.reward is not None
    assert row.reward.value == pytest.approx(6.0, abs=1e-12)
    assert row.reward.se == pytest.approx(6 * (2 / math.sqrt(400)) / 4, rel=0.06)


def test_a_difference_with_one_seed_each_is_the_paired_t_test_over_prompts() -> None:
    one, two = straight(1, 1, 2, "dpo", noise=1), straight(1, 2, 2, "ppo", noise=1)
    proxy, gold = differences([one, two], [1], "ppo")
    a, b = (at_kl(curve.paths[0], 1) for curve in (one, two))
    assert a is not None and b is not None
    test = stats.ttest_rel(a.reward, b.reward)
    assert (proxy.curve, proxy.baseline, proxy.kl, proxy.measure) == ("dpo", "ppo", 1, "reward")
    assert proxy.difference.value == pytest.approx(float((a.reward - b.reward).mean()), abs=1e-12)
    assert proxy.difference.se == pytest.approx(proxy.difference.value / test.statistic, rel=0.04)
    assert proxy.difference.df == pytest.approx(39)
    assert proxy.p == proxy.difference.p == pytest.approx(test.pvalue, rel=0.1)
    assert proxy.difference.seeds == 1
    assert gold.measure == "gold"
    assert gold.difference.value == pytest.approx(2 * proxy.difference.value, abs=1e-12)


def test_the_same_reward_for_all_leaves_every_difference_as_it_is() -> None:
    curves = [straight(1, 1, 2, "dpo", noise=1), straight(2, 2, 2, "ppo", noise=1)]
    raised = [
        a_curve(a_path(p.kl, p.reward + 5, p.gold + 5, setting=p.setting))
        for c in curves
        for p in c.paths
    ]
    for before, after in zip(
        differences(curves, [1], "ppo"), differences(raised, [1], "ppo"), strict=True
    ):
        assert after.difference.value == pytest.approx(before.difference.value, abs=1e-9)
        assert after.p == pytest.approx(before.p, rel=1e-6)


def test_all_differences_of_a_table_are_corrected_together() -> None:
    curves = [straight(x, i, 2, f"c{i}", noise=1) for i, x in enumerate((1.0, 1.1, 1.4))]
    rows = differences(curves, [0.5, 1], "c0")
    assert [(row.kl, row.curve, row.measure) for row in rows] == [
        (kl, name, measure)
        for kl in (0.5, 1)
        for name in ("c1", "c2")
        for measure in ("reward", "gold")
    ]
    smallest = min(rows, key=lambda row: row.p)
    assert smallest.p_holm == pytest.approx(min(8 * smallest.p, 1), rel=1e-9)
    assert [row.p_holm for row in rows] == holm([row.p for row in rows])


def test_a_kl_that_one_side_does_not_reach_has_no_difference() -> None:
    curves = [straight(1, 1, 4, "dpo"), straight(2, 2, 2, "ppo")]
    assert {row.kl for row in differences(curves, [1, 3], "ppo")} == {1}


def test_holms_correction_of_four_p_values_by_hand() -> None:
    # in order 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, and none below one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_unknown_baseline_and_a_kl_of_0_are_refused_with_the_fix() -> None:
    curves = [straight(1, 1, 4, "dpo"), straight(2, 2, 2, "ppo")]
    with pytest.raises(UserError) as refusal:
        differences(curves, [1], "p3o")
    assert str(refusal.value) == (
        "baseline=p3o is none of the curves of this table; choose dpo or ppo."
    )
    for ask in (lambda: matched(curves, [0]), lambda: differences(curves, [0], "ppo")):
        with pytest.raises(UserError) as refusal:
            ask()
        assert str(refusal.value) == (
            "a KL of 0 nats tells no curves apart, as all start from the SFT policy; give KLs above"
            " 0, such as 1,2,5."
        )


def test_an_area_is_the_mean_gain_up_to_a_kl() -> None:
    """A reward of slope times KL gains slope times half of the KL on average, wherever it starts."""
    curve = together(straight(1, 1, 4), straight(2, 2, 4), straight(3, 3, 4))
    (found,) = areas([curve], 3)
    assert (found.curve, found.upto) == ("ppo", 3)
    assert found.reward is not None and found.gold is not None
    assert found.reward.value == pytest.approx(2 * 1.5, abs=1e-12)
    assert found.gold.value == pytest.approx(2 * 2 * 1.5, abs=1e-12)
    # Means of 1.5, 3 and 4.5: their standard deviation over the root of three, t of two degrees.
    half = stats.t.ppf(0.975, 2) * 1.5 / math.sqrt(3)
    assert found.reward.high - found.reward.value == pytest.approx(half, rel=1e-6)
    raised = replace(curve, paths=tuple(replace(p, reward=p.reward + 7) for p in curve.paths))
    again = areas([raised], 3)[0].reward
    assert again is not None and again.value == pytest.approx(found.reward.value, abs=1e-9)


def test_a_curve_of_which_a_run_stayed_behind_has_no_area_and_says_how_far_all_came() -> None:
    near, far = straight(1, 1, 2), together(straight(1, 2, 4), straight(1, 3, 5))
    assert reach([near, far]) == 2
    short, long = areas([near, far], 3)
    assert short.reward is None and short.gold is None and long.reward is not None
    with pytest.raises(UserError, match="a KL of 0 nats"):
        areas([near], 0)
