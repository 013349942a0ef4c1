"""The nouns and the one mean, on numbers small enough to check by eye."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from math import sqrt

import pytest
import torch

from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.masked import averages, denominators, masked_mean, whiten
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.returns import at_last_token, gae
from rlhf_cli.core.rollout import sequence_sum
from tests.algos import toys
from tests.algos.cases import case
from tests.algos.toys import tensor

EXACT = 1e-12
"""Float64 sums of a handful of terms."""
close = partial(toys.close, tolerance=EXACT)

MASK = tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]])
"""Two prompts, two responses of 3, 1, 2 and 0 tokens."""


# --- the one mean


def test_denominators_are_6_tokens_4_responses_2_prompts() -> None:
    assert denominators(MASK) == {3: 6.0, 2: 4.0, 1: 2.0}


def test_averages_divide_each_term_by_the_number_of_what_it_judges() -> None:
    terms = {
        "token": tensor([[[1, 2, 3], [4, 99, 99]], [[5, 6, 99], [99, 99, 99]]]),
        "response": tensor([[1, 2], [3, 6]]),
        "prompt": tensor([1, 4]),
    }
    got = averages(terms, MASK, denominators(MASK))
    close(got["token"], 21 / 6)
    close(got["response"], 3)
    close(got["prompt"], 2.5)


def test_averages_of_a_part_use_the_counts_of_the_whole() -> None:
    term = {"token": torch.ones(1, 2, 3, dtype=torch.float64)}
    shares = [averages(term, MASK[[p]], denominators(MASK))["token"] for p in (0, 1)]
    close(torch.stack(shares), [4 / 6, 2 / 6])


def test_a_minibatch_without_a_single_token_averages_to_zero_not_nan() -> None:
    empty = torch.zeros_like(MASK)
    close(averages({"token": torch.ones_like(MASK)}, empty, denominators(empty))["token"], 0)
    close(masked_mean(torch.ones_like(MASK), empty), 0)


def test_masked_mean_of_1_2_3_and_a_hidden_100_is_2() -> None:
    close(masked_mean(tensor([1, 2, 3, 100]), tensor([1, 1, 1, 0])), 2)


def test_whitening_1_2_3_4_gives_the_population_z_scores() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    white = [-1.341641, -0.447214, 0.447214, 1.341641]
    close(whiten(tensor([1, 2, 3, 4]), ones), white, tolerance=6e-7)
    close(
        whiten(tensor([1, 2, 3, 4]), ones, shift_mean=False),
        [w + 2.5 for w in white],
        tolerance=6e-7,
    )


def test_whitening_sees_only_where_the_mask_is_one() -> None:
    x, mask = tensor([1, 50, 3, -50]), tensor([1, 0, 1, 0])
    close(whiten(x, mask), [-1, 0, 1, 0], tolerance=1e-8)
    close(whiten(x, mask, shift_mean=False), [1, 0, 3, 0], tolerance=1e-8)


def test_whitening_a_constant_gives_zero_and_a_small_spread_is_damped_by_1e_minus_8() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    close(whiten(tensor([3, 3]), ones), [0, 0])
    small = 1e-4 / sqrt(2e-8)
    close(whiten(tensor([1 - 1e-4, 1 + 1e-4]), ones), [-small, small], tolerance=1e-9)


# --- returns


@pytest.mark.parametrize(
    ("reward", "value", "lam", "advantage"),
    [
        ([-0.01, 0.02, 1], [0.5, 0.4, 0.3], 0.95, [0.44575, 0.585, 0.7]),
        ([-0.01, 0.02, 1], [0.5, 0.4, 0.3], 1.0, [0.51, 0.62, 0.7]),
        ([-0.01, 0.02, 1], [0.5, 0.4, 0.3], 0.0, [-0.11, -0.08, 0.7]),
        ([-0.1, -0.2, 1], [0.5, 0.4, 0.3], 0.95, [0.14675, 0.365, 0.7]),
        ([-0.1, -0.2, 1], [0.5, 0.4, 0.3], 1.0, [0.2, 0.4, 0.7]),
        ([-0.1, -0.2, 1], [0.5, 0.4, 0.3], 0.0, [-0.2, -0.3, 0.7]),
    ],
)
def test_gae_interpolates_between_one_step_and_reward_to_go(
    reward: list[float], value: list[float], lam: float, advantage: list[float]
) -> None:
    mask = torch.ones(3, dtype=torch.float64)
    got = gae(tensor(reward), tensor(value), mask, 1.0, lam)
    close(got, advantage)
    if lam == 0.95 and reward[0] == -0.01:
        close(got + tensor(value), [0.94575, 0.985, 1])


def test_gae_discounts_by_gamma() -> None:
    mask = torch.ones(2, dtype=torch.float64)
    # delta = (1 + .5*2 - 4, 3 - 2) = (-2, 1); A_0 = -2 + .5*.5*1.
    close(gae(tensor([1, 3]), tensor([4, 2]), mask, 0.5, 0.5), [-1.75, 1])


def test_gae_ends_at_the_last_response_token_whatever_the_padding_holds() -> None:
    mask = tensor([1, 1, 0, 0])
    got = gae(tensor([1, 3, 70, 80]), tensor([4, 2, 50, 60]), mask, 0.5, 0.5)
    close(got, [-1.75, 1, 0, 0])


def test_gae_steps_over_what_the_other_side_said_and_says_nothing_of_it() -> None:
    got = gae(tensor([1, 70, 3]), tensor([4, 50, 2]), tensor([1, 0, 1]), 0.5, 0.5)
    close(got, [-1.75, 0, 1])


def test_the_score_stands_on_the_last_token_and_nowhere_on_an_empty_response() -> None:
    got = at_last_token(tensor([[5, 6], [7, 8]]), MASK)
    close(got, [[[0, 0, 5], [6, 0, 0]], [[0, 7, 0], [0, 0, 0]]])


# --- pairs


def test_pairs_of_four_are_six_in_row_major_order() -> None:
    first, second = pairs(tensor([[0, 1, 2, 3], [10, 11, 12, 13]]))
    close(first, [[0, 0, 0, 1, 1, 2], [10, 10, 10, 11, 11, 12]])
    close(second, [[1, 2, 3, 2, 3, 3], [11, 12, 13, 12, 13, 13]])


def test_pairs_of_single_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 responses per prompt, got 1"):
        pairs(tensor([[1], [2]]))


# --- rollouts


def test_sequence_sum_adds_response_tokens_only() -> None:
    close(sequence_sum(torch.full((2, 2, 3), 2.5, dtype=torch.float64), MASK), [[7.5, 2.5], [5, 0]])


def test_sequence_sum_of_515_bf16_tokens_is_515_because_the_mask_is_fp32() -> None:
    # The neighbours of 515 in bf16 are 512 and 516.
    total = sequence_sum(torch.ones(1, 1, 515, dtype=torch.bfloat16), torch.ones(1, 1, 515))
    assert total.dtype == torch.float32 and total.item() == 515


def test_taking_prompts_2_and_0_takes_them_of_every_tensor_and_keeps_the_rest() -> None:
    rollout = replace(case(1, prompts=3).rollout, value_old=None)
    taken = rollout.take(torch.tensor([2, 0]))
    assert taken.value_old is None and taken.source == rollout.source
    for name in {f.name for f in fields(rollout)} - {"value_old", "source", "reward"}:
        assert torch.equal(getattr(taken, name), getattr(rollout, name)[[2, 0]]), name


def test_taking_prompts_of_targets_leaves_absent_ones_absent() -> None:
    targets = Targets(label=tensor([[0.1], [0.2], [0.3]])).take(torch.tensor([1]))
    assert targets.advantage is None and targets.returns is None and targets.label is not None
    close(targets.label, [[0.2]])


def test_trimming_undoes_three_columns_of_padding_and_nothing_else() -> None:
    one = case(1)
    assert one.rollout.value_old is not None
    wide = one.with_columns(lambda x: x + 1).rollout
    trimmed = replace(wide, value_old=None).trim(5)
    assert trimmed.value_old is None
    assert torch.equal(wide.trim(5).value_old, one.rollout.value_old)  # type: ignore[arg-type]
    for name in {f.name for f in fields(wide)} - {"value_old", "source", "reward"}:
        assert torch.equal(getattr(trimmed, name), getattr(one.rollout, name)), name


def test_trimming_targets_shortens_tokens_but_keeps_every_response_and_pair() -> None:
    tokens, responses = torch.rand(2, 4, 5), torch.rand(2, 4)
    per_token = Targets(advantage=tokens, returns=tokens + 1, label=torch.rand(2, 6)).trim(3)
    assert per_token.advantage is not None and per_token.returns is not None
    assert torch.equal(per_token.advantage, tokens[..., :3])
    assert torch.equal(per_token.returns, tokens[..., :3] + 1)
    assert per_token.label is not None and per_token.label.shape == (2, 6)
    assert Targets(advantage=responses).trim(3).advantage is responses


def test_sampling_three_of_the_policy_is_a_group_of_three() -> None:
    assert Sampling(policy=3).sources == ("policy", "policy", "policy")
    assert Sampling(policy=3).responses == 3
    assert Sampling().responses == 0
