"""Best of n against integrals and against every subset there is."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.integrate import quad

from rlhf_cli.errors import UserError
from rlhf_cli.evals.best_of_n import analytic_kl, as_curve, best_of_n, by_prompt
from rlhf_cli.evals.curves import Floats
from rlhf_cli.evals.matched import at_kl

RANDOM = np.random.default_rng(4)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_kl_is_that_of_the_largest_of_n_uniform_numbers_to_one(n: int) -> None:
    def integrand(u: float) -> float:
        density = n * u ** (n - 1)
        return density * math.log(density)

    assert analytic_kl(n) == pytest.approx(quad(integrand, 1e-12, 1)[0], abs=1e-6)


def over_all_subsets(score: Floats, gold: Floats, n: int) -> float:
    """Mean over the subsets of one prompt's samples; those that tie for the best share it."""
    worth = []
    for chosen in combinations(range(len(score)), n):
        best = max(score[i] for i in chosen)
        worth.append(np.mean([gold[i] for i in chosen if score[i] == best]))
    return float(np.mean(worth))


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_mean_over_all_subsets_of_n(n: int) -> None:
    score, gold = RANDOM.standard_normal((2, 5, 7))
    expected = [over_all_subsets(s, g, n) for s, g in zip(score, gold, strict=True)]
    assert by_prompt(score, gold, n).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", range(1, 7))
def test_samples_that_score_the_same_are_as_likely_to_be_kept(n: int) -> None:
    score = np.array([[1.0, 3.0, 3.0, 2.0, 1.0, 3.0]])
    gold = np.array([[0.0, 5.0, -1.0, 2.0, 7.0, 1.0]])
    expected = over_all_subsets(score[0], gold[0], n)
    assert by_prompt(score, gold, n)[0] == pytest.approx(expected, abs=1e-12)


def test_the_estimate_of_the_largest_of_n_uniform_numbers_is_unbiased() -> None:
    score = RANDOM.random((4000, 16))
    for found in best_of_n(score, score, [1, 4, 16]):
        assert found.gold == found.score
        # E max = n / (n + 1)
        assert found.gold.mean == pytest.approx(found.n / (found.n + 1), abs=4 * found.gold.se)


def test_errors_are_over_prompts_and_gold_goes_by_the_score() -> None:
    # best of two of two: score 2 and 4, gold 10 and 30
    score, gold = np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[0.0, 10.0], [30.0, 99.0]])
    (found,) = best_of_n(score, gold, [2])
    assert (found.n, found.kl) == (2, pytest.approx(math.log(2) - 0.5))
    assert found.score == pytest.approx((3.0, 1.0), abs=1e-12)
    assert found.gold == pytest.approx((20.0, 10.0), abs=1e-12)


def test_an_n_above_the_samples_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        best_of_n(np.zeros((3, 4)), np.zeros((3, 4)), [2, 8])
    assert str(refusal.value) == (
        "the best of 8 takes at least 8 responses to a prompt, but there are 4; draw more, or leave 8"
        " out."
    )


def test_as_a_curve_it_can_be_read_at_a_kl_like_a_run() -> None:
    score, gold = np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[0.0, 10.0], [30.0, 99.0]])
    curve = as_curve(score, gold, [1, 2], ["a", "b"])
    (path,) = curve.paths
    assert path.prompts == ("a", "b") and path.step.tolist() == [1, 2]
    assert path.gold.tolist() == [[5.0, 64.5], [10.0, 30.0]]
    half = at_kl(path, (math.log(2) - 0.5) / 2)
    assert half is not None and half.reward.tolist() == pytest.approx([1.75, 3.75])
