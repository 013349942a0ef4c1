"""Intervals: their parts by hand, their coverage by simulation, and what must not change them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlhf_cli.evals.bootstrap import Interval, _resampled, interval, intervals
from rlhf_cli.evals.curves import Curve, Floats, Means
from tests.test_evals_curves import a_curve, a_path


def last_reward(means: Sequence[Means]) -> Floats:
    """The first curve's reward at its end, averaged over the runs."""
    value: Floats = means[0].reward[..., -1].mean(axis=-1)
    return value


def gap(means: Sequence[Means]) -> Floats:
    """The first curve's less the second's."""
    return last_reward(means) - last_reward(means[1:])


def of_rewards(rewards: Floats, setting: str = "ppo") -> Curve:
    """One evaluation of S runs, rewards [S,N]."""
    return a_curve(
        *(
            a_path(np.zeros((1, len(row))), [row], seed=seed, setting=setting)
            for seed, row in enumerate(rewards)
        )
    )


def test_with_one_seed_it_is_the_bootstrap_over_prompts_and_says_so() -> None:
    rewards = np.random.default_rng(5).standard_normal(200)
    found = interval(last_reward, [of_rewards(rewards[None])], rounds=20000)
    assert found.se == pytest.approx(rewards.std(ddof=1) / math.sqrt(200), rel=0.02)
    half = stats.norm.ppf(0.975) * found.se
    assert found.value == pytest.approx(rewards.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), rel=0.02
    )
    assert (found.seeds, found.df) == (1, pytest.approx(199))


def test_where_only_seeds_differ_it_is_students_interval_over_their_means() -> None:
    means = [1.0, 2.0, 4.0, 5.0]
    found = interval(last_reward, [of_rewards(np.repeat([[m] for m in means], 50, axis=1))])
    student = stats.ttest_1samp(means, 0.0)
    expected = student.confidence_interval(0.95)
    assert (found.value, found.seeds, found.df) == (3.0, 4, pytest.approx(3))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.p == pytest.approx(student.pvalue, abs=1e-9)


def test_the_seeds_of_two_curves_add_up_as_in_welchs_test() -> None:
    few, many = [1.0, 2.0], [1.0, 4.0, 4.5, 9.0]
    curves = [of_rewards(np.repeat([[m] for m in side], 50, axis=1)) for side in (few, many)]
    found = interval(gap, curves)
    welch = stats.ttest_ind(few, many, equal_var=False)
    assert (found.df, found.p) == pytest.approx((welch.df, welch.pvalue), abs=1e-9)
    assert found.seeds == 2


def test_paired_by_seed_it_is_students_test_of_the_differences() -> None:
    one, other = [1.0, 2.0, 4.0, 5.0], [0.5, 1.7, 3.2, 4.9]
    pair = [of_rewards(np.repeat([[m] for m in means], 50, axis=1)) for means in (one, other)]
    (found,) = intervals(lambda m: gap(m)[..., None], pair, by_seed=True)
    student = stats.ttest_rel(one, other)
    expected = student.confidence_interval(0.95)
    assert (found.seeds, found.df) == (4, pytest.approx(3))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_curves_of_other_seeds_cannot_be_paired() -> None:
    pair = [of_rewards(np.zeros((2, 5))), of_rewards(np.zeros((3, 5)))]
    with pytest.raises(ValueError, match="the same seeds"):
        intervals(lambda m: gap(m)[..., None], pair, by_seed=True)


def test_settings_of_a_sweep_are_no_seeds_of_each_other() -> None:
    rewards = np.repeat([[1.0], [2.0], [10.0]], 50, axis=1)
    paths = [*of_rewards(rewards[:2], "ppo beta=0.1").paths, *of_rewards(rewards[2:], "ppo").paths]
    found = interval(last_reward, [a_curve(*paths)])
    # without the first (2 + 10) / 2, without the second (1 + 10) / 2: half of their squared distances
    # from 5.75 is V
    assert found.se == pytest.approx(math.sqrt(0.5 * 2 * 0.25**2), abs=1e-12)
    assert found.seeds == 1


@pytest.mark.parametrize("seed_sd", [1.0, 0.3, 0.1, 0.0])
def test_an_interval_of_95_holds_the_truth_in_at_least_90_of_100_cases(seed_sd: float) -> None:
    random, cases = np.random.default_rng(1), 400
    held = 0
    for _ in range(cases):
        by_seed = seed_sd * random.standard_normal((4, 1))
        rewards = by_seed + 0.5 * random.standard_normal(100) + random.standard_normal((4, 100))
        found = interval(last_reward, [of_rewards(rewards)], rounds=200)
        held += found.low <= 0 <= found.high
    assert held / cases >= 0.90


def test_what_prompts_have_in_common_cancels_in_a_difference() -> None:
    random = np.random.default_rng(2)
    hard = 100 * random.standard_normal(80)
    one, two = (of_rewards(hard + random.standard_normal((1, 80))) for _ in range(2))
    assert interval(last_reward, [one]).se > 5
    assert interval(gap, [one, two]).se < 0.5


def noisy(seed: int) -> Curve:
    random = np.random.default_rng(seed)
    return of_rewards(random.standard_normal((3, 40)))


def close(one: Interval, two: Interval) -> None:
    for name in ("value", "low", "high", "se", "df"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), abs=1e-9), name


def test_rounds_are_kept_for_the_curve_they_are_of() -> None:
    (first, second), found = (noisy(1), noisy(2)), []
    _resampled.cache_clear()
    for curve in (first, second, first, replace(second)):
        found.append(interval(last_reward, [curve]))
    assert found[0] == found[2] != found[1] == found[3]
    assert _resampled.cache_info().hits == 2
    other = replace(first, paths=first.paths[:1])
    assert interval(last_reward, [other]).seeds == 1


def test_prompts_in_another_order_change_nothing() -> None:
    order = np.random.default_rng(3).permutation(40)

    def shuffled(curve: Curve) -> Curve:
        paths = (
            replace(
                p,
                **{name: getattr(p, name)[:, order] for name in ("kl", "reward", "gold", "length")},
                prompts=tuple(p.prompts[i] for i in order),
            )
            for p in curve.paths
        )
        return replace(curve, paths=tuple(paths))

    curves = [noisy(1), noisy(2)]
    close(interval(gap, curves), interval(gap, [shuffled(c) for c in curves]))


def test_a_constant_added_to_all_rewards_leaves_a_difference_as_it_is() -> None:
    curves = [noisy(1), noisy(2)]
    raised = [
        replace(c, paths=tuple(replace(p, reward=p.reward + 7) for p in c.paths)) for c in curves
    ]
    close(interval(gap, curves), interval(gap, raised))
    assert interval(last_reward, raised).value == pytest.approx(
        interval(last_reward, curves).value + 7, abs=1e-9
    )


def test_several_numbers_get_the_intervals_they_get_alone() -> None:
    curves = [noisy(1), noisy(2)]
    both = intervals(lambda m: np.stack([last_reward(m), gap(m)], axis=-1), curves)
    for one, alone in zip(both, (last_reward, gap), strict=True):
        close(one, interval(alone, curves))


def test_a_higher_level_is_wider_by_the_ratio_of_the_quantiles_of_t() -> None:
    wide, narrow = (interval(last_reward, [noisy(1)], level=level) for level in (0.99, 0.5))
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(stats.t.ppf(0.995, wide.df) / stats.t.ppf(0.75, wide.df))


def test_what_does_not_vary_is_a_point_and_differs_from_0_or_does_not() -> None:
    same = of_rewards(np.ones((2, 30)))
    assert interval(last_reward, [same]) == Interval(1.0, 1.0, 1.0, 0.0, math.inf, 2)
    assert interval(last_reward, [same]).p == 0.0
    assert interval(gap, [same, same]).p == 1.0


def test_one_prompt_alone_has_no_interval() -> None:
    found = interval(last_reward, [of_rewards(np.array([[2.0], [3.0]]))])
    assert found.value == 2.5 and math.isnan(found.low) and math.isnan(found.high)


def test_rounds_without_a_value_are_left_out() -> None:
    rewards = np.arange(20.0)[None]

    def rarely(means: Sequence[Means]) -> Floats:
        value = last_reward(means)
        return np.where(value > 9.5, value, np.nan) if np.ndim(value) else value

    found = interval(rarely, [of_rewards(rewards)], rounds=4000)
    # half of a normal distribution: sd times sqrt(1 - 2 / pi)
    assert found.se == pytest.approx(
        rewards.std(ddof=1) / math.sqrt(20) * math.sqrt(1 - 2 / math.pi), rel=0.05
    )
