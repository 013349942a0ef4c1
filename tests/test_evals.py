"""Estimators against exact enumeration, statistics against numbers worked out by hand."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from rlhf_cli.errors import UserError
from rlhf_cli.evals.kl import exact_kl, kl_estimates
from rlhf_cli.evals.statistics import (
    line_fit,
    mean_and_se,
    paired_difference,
    proportion_interval,
)
from rlhf_cli.evals.table import check_comparable, points, seed_means
from tests.test_store import a_run

LN = math.log
f64 = partial(torch.tensor, dtype=torch.float64)

# Two tokens, 0 ends the response. Three responses: [0], [1 0], [1 1]; the first is padded, with
# log-probabilities of nan to show that padding is not read.
NAN = math.nan
LOGP = f64([[LN(0.5), NAN], [LN(0.5), LN(0.25)], [LN(0.5), LN(0.75)]])
LOGP_REF = f64([[LN(0.75), NAN], [LN(0.25), LN(0.5)], [LN(0.25), LN(0.5)]])
MASK = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
PI = f64([0.5, 0.125, 0.375])

# sum_y pi(y) ln(pi(y) / ref(y)), with ref(y) = 3/4, 1/8, 1/8
KL = 0.5 * LN(0.5 / 0.75) + 0.125 * LN(0.125 / 0.125) + 0.375 * LN(0.375 / 0.125)


def test_the_mean_of_k1_and_of_k3_over_all_responses_is_the_kl_0_209247() -> None:
    k1, k3 = kl_estimates(LOGP, LOGP_REF, MASK)
    assert pytest.approx(0.209247, abs=1e-6) == KL
    assert (PI @ k1).item() == pytest.approx(KL, abs=1e-12)
    assert (PI @ k3).item() == pytest.approx(KL, abs=1e-12)


def test_k3_is_not_the_mirrored_formula_whose_mean_is_0_249086() -> None:
    u = (LOGP - LOGP_REF).nan_to_num()
    mirrored = (PI @ (u.exp() - 1 - u).sum(-1)).item()
    # chi-square - KL, with a chi-square of 1/3 at the first state and 1/4 at the second, seen half
    # of the time
    assert mirrored == pytest.approx(1 / 3 + 0.5 / 4 - KL, abs=1e-12)
    assert mirrored == pytest.approx(0.249086, abs=1e-6)
    assert abs(mirrored - (PI @ kl_estimates(LOGP, LOGP_REF, MASK).k3).item()) > 0.01


def test_k1_is_negative_on_the_first_response_and_k3_is_0_094535() -> None:
    k1, k3 = kl_estimates(LOGP, LOGP_REF, MASK)
    assert k1[0].item() == pytest.approx(-0.405465, abs=1e-6)
    assert k3[0].item() == pytest.approx(0.094535, abs=1e-6)
    assert (k3 >= 0).all()


def test_equal_policies_have_a_kl_of_exactly_0() -> None:
    k1, k3 = kl_estimates(LOGP, LOGP, MASK)
    assert k1.tolist() == k3.tolist() == [0.0, 0.0, 0.0]


def test_bf16_log_probabilities_are_summed_in_float64() -> None:
    logp = torch.full((1, 1000), -0.0078125, dtype=torch.bfloat16)
    k1, _ = kl_estimates(logp, torch.zeros_like(logp), torch.ones(1, 1000))
    assert k1.dtype == torch.float64
    assert k1.item() == -7.8125


def test_the_exact_kl_of_the_visited_states_averages_to_the_kl_of_responses() -> None:
    logits = f64([[0.5, 0.5], [0.25, 0.75]]).log() + 3.0
    ref_logits = f64([[0.75, 0.25], [0.5, 0.5]]).log() - 1.0
    first, second = exact_kl(logits, ref_logits).tolist()
    assert first + 0.5 * second == pytest.approx(KL, abs=1e-12)
    assert exact_kl(logits.bfloat16(), ref_logits.bfloat16()).dtype == torch.float32


def test_the_mean_of_1_2_3_4_is_2_5_with_standard_error_0_645497() -> None:
    assert mean_and_se([1, 2, 3, 4]) == pytest.approx((2.5, math.sqrt(5 / 3) / 2), abs=1e-12)


def test_one_value_has_no_standard_error_and_none_has_no_mean() -> None:
    assert mean_and_se([3.0]).mean == 3.0
    assert math.isnan(mean_and_se([3.0]).se)
    assert math.isnan(mean_and_se([]).mean)


def test_8_of_10_lies_in_wilsons_interval_0_490162_to_0_943318() -> None:
    # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964
    assert proportion_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert proportion_interval(10, 10)[1] == 1.0


def test_pairing_takes_out_what_the_prompts_share() -> None:
    a, b = [101.0, 52.0, 3.0], [100.0, 52.0, 1.0]
    assert paired_difference(a, b) == pytest.approx((1.0, 1 / math.sqrt(3), math.sqrt(3)), abs=1e-9)
    assert mean_and_se(a).se > 20


def test_differences_without_spread_have_infinite_or_no_z() -> None:
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).z == math.inf
    assert paired_difference([1.0, 2.0], [2.0, 3.0]).z == -math.inf
    assert math.isnan(paired_difference([1.0, 2.0], [1.0, 2.0]).z)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


def test_the_line_through_1_3_2_5_is_1_1_plus_1_1_x() -> None:
    fit = line_fit([0, 1, 2, 3], [1, 3, 2, 5])
    assert fit is not None
    # Sxx = 5, Sxy = 5.5, Syy = 8.75
    expected = (1.1, 1.1, math.sqrt(0.27), 30.25 / 43.75, 4, 0, 3)
    assert fit == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_the_line_is_the_one_of_scipy_to_the_last_digit(n: int) -> None:
    x, y = np.random.default_rng(n).normal(size=(2, n)).tolist()
    fit, known = line_fit(x, y), linregress(x, y)
    assert fit is not None
    theirs = known.slope, known.intercept, known.stderr, known.rvalue**2
    assert (fit.slope, fit.intercept, fit.slope_se, fit.r_squared) == theirs


def test_a_line_needs_two_different_x_and_three_points_for_an_error() -> None:
    assert line_fit([1.0, 1.0], [0.0, 2.0]) is None
    assert line_fit([], []) is None
    two = line_fit([0.0, 1.0], [0.0, 2.0])
    assert two is not None and two.slope == 2.0 and math.isnan(two.slope_se)


def test_two_seeds_make_one_curve_and_their_mean_is_over_seeds(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path, "ppo", seed=1, rows=[(0, 0.0, 1.0), (5, 2.0, 3.0)]),
        a_run(tmp_path, "ppo", seed=2, rows=[(0, 0.0, 1.0), (5, 4.0, 4.0), (9, 5.0, 5.0)]),
    ]
    table = points(runs)
    assert [(p.curve, p.seed, p.step) for p in table] == [
        ("ppo", 1, 0),
        ("ppo", 1, 5),
        ("ppo", 2, 0),
        ("ppo", 2, 5),
        ("ppo", 2, 9),
    ]
    start, later = seed_means(table)  # step 9 has one seed only
    assert (start.step, start.seeds, start.kl_se) == (0, 2, 0.0)
    assert (later.kl, later.kl_se, later.reward, later.reward_se) == (3.0, 1.0, 3.5, 0.5)
    assert math.isnan(later.gold)


def test_curves_of_one_algorithm_are_named_by_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path, "ppo", seed=1, hyper={"beta": 0.1, "optim": {"lr": 1e-6}}),
        a_run(tmp_path, "ppo", seed=2, hyper={"beta": 0.1, "optim": {"lr": 1e-5}}),
        a_run(tmp_path, "p3o_v2", seed=1, hyper={"beta": 0.2}),
    ]
    curves = {p.curve for p in points(runs)}
    assert curves == {"ppo optim.lr=1e-06", "ppo optim.lr=1e-05", "p3o_v2"}


def test_how_a_run_was_launched_does_not_split_its_curve(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path, "ppo", seed=1, launch={"processes": 1}),
        a_run(tmp_path, "ppo", seed=2, launch={"processes": 2}),
    ]
    assert {p.curve for p in points(runs)} == {"ppo"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"parents": {"sft": "cccc", "reward": "bbbb"}}, "sft parents differ (aaaa and cccc)"),
        ({"parents": {"sft": "aaaa", "reward": "dddd"}}, "reward parents differ (bbbb and dddd)"),
        ({"title": "hh"}, "data differ (hh-embedded and hh)"),
        ({"data": {"digest": "e"}}, "data digests differ (d and e)"),
        ({"model": "gpt2"}, "models differ (nano and gpt2)"),
        ({"prompts": 64}, "numbers of evaluation prompts differ (280 and 64)"),
    ],
)
def test_runs_on_other_inputs_are_refused_with_the_difference(
    tmp_path: Path, other: dict[str, object], said: str
) -> None:
    first = a_run(tmp_path, "ppo", seed=1)
    second = a_run(tmp_path, "p3o_v2", seed=1, **other)
    with pytest.raises(UserError) as refusal:
        check_comparable([first, second])
    assert said in str(refusal.value)
    assert first.path.name in str(refusal.value) and second.path.name in str(refusal.value)


def test_a_run_without_a_reward_model_may_stand_beside_one_with(tmp_path: Path) -> None:
    check_comparable(
        [
            a_run(tmp_path, "ppo", seed=1),
            a_run(tmp_path, "dpo", seed=1, parents={"sft": "aaaa"}),
        ]
    )
