"""Lines, rises, best points and areas of a frontier, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_cli.evals.frontier import area, monotone, pareto, straight
from tests.test_evals_curves import a_curve, a_path


def test_the_line_goes_through_all_evaluations_of_all_runs() -> None:
    # means (0, 1), (1, 3), (2, 2), (3, 5); gold is known of the first run only
    one = a_path([[-1, 1], [0, 2]], [[1, 1], [2, 4]], [[0, 0], [1, 3]])
    two = a_path([[2, 2], [3, 3]], [[0, 4], [5, 5]], seed=2)
    fit = straight(a_curve(one, two))
    assert fit is not None
    assert (fit.slope, fit.intercept, fit.n) == pytest.approx((1.1, 1.1, 4), abs=1e-12)
    gold = straight(a_curve(one, two), "gold")
    assert gold is not None and (gold.slope, gold.n) == (2.0, 2)


def test_one_kl_has_no_line() -> None:
    assert straight(a_curve(a_path([[1, 1]], [[2, 3]]))) is None


def test_what_falls_is_pooled_with_what_it_falls_from() -> None:
    # 3 then 2 become 2.5 each; the point at 1 nat is there twice, with a mean of 1
    rise = monotone([2, 0, 1, 3, 4, 1], [3, 0, 0, 2, 4, 2])
    assert rise.kl.tolist() == [0, 1, 2, 3, 4]
    assert rise.y.tolist() == pytest.approx([0, 1, 2.5, 2.5, 4], abs=1e-12)


def test_a_point_that_is_there_three_times_weighs_three() -> None:
    assert monotone([0, 0, 0, 1], [4, 4, 4, 0]).y.tolist() == pytest.approx([3, 3], abs=1e-12)


def test_between_its_points_a_rise_is_straight_and_beyond_them_it_is_not_known() -> None:
    rise = monotone([0, 2], [1, 5])
    np.testing.assert_array_equal(
        rise(np.array([-1, 0, 0.5, 2, 2.1])), [math.nan, 1, 2, 5, math.nan]
    )


def test_no_other_point_has_less_kl_and_more_reward() -> None:
    points = [(0, 0), (1, 2), (2, 1), (2, 3), (2, 3), (3, 3), (1, 1)]
    assert pareto(points).tolist() == [True, True, False, True, True, False, False]


def test_the_area_is_the_mean_height_up_to_a_kl() -> None:
    # from 0 to 2 nats y rises to 2, then stays there: (2 + 2) / 4
    assert area([4, 0, 2], [2, 0, 2], upto=2) == pytest.approx(1.0, abs=1e-12)
    assert area([4, 0, 2], [2, 0, 2], upto=4) == pytest.approx(1.5, abs=1e-12)
    assert area([4, 0, 2], [2, 0, 2], upto=1) == pytest.approx(0.5, abs=1e-12)


def test_the_area_begins_at_0_nats_also_if_the_points_do_not() -> None:
    # 1 up to 1 nat, then straight to 3 at 2 nats; a KL a little below 0 is as good as 0
    assert area([1, 2], [1, 3], upto=2) == pytest.approx(1.5, abs=1e-12)
    assert area([-1e-6, 2], [0, 2], upto=2) == pytest.approx(1.0, abs=1e-5)


def test_a_curve_that_does_not_reach_the_kl_has_no_area() -> None:
    assert math.isnan(area([0, 2], [0, 2], upto=2.1))
