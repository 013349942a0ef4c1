"""GRPO and its relatives: advantages, clips, means, and where the KL in the loss leads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.rollout import Forward
from tests.algos.cases import Case, case, judge
from tests.algos.discovery import shipped, tuned
from tests.algos.toys import ARMS, BANDIT, THETA, World, ascent, bandit, close, leaf, tensor

EXACT = 1e-11
"""Two float64 routes to one number."""

FAMILY = ["grpo", "dr_grpo", "dapo", "gspo"]
SCORES = [0.8, 0.2, 0.5, 0.9]
BARE = {"std_eps": 1e-9, "overlong": 0.0, "drop_equal": False}


def one_prompt(scores: list[float], lengths: list[int] | None = None) -> Case:
    """Responses with these scores and lengths to one prompt."""
    one = case(1, prompts=1, responses=len(scores))
    lengths = lengths or [5] * len(scores)
    mask = (torch.arange(5) < torch.tensor(lengths).unsqueeze(-1)).double().unsqueeze(0)
    rollout = replace(one.rollout, mask=mask, score=tensor([scores]))
    return Case(rollout, one.now)


def advantage(algorithm: Any, one: Case) -> Tensor:
    """[P,G]."""
    return algorithm.prepare(one.rollout, {})[0].advantage


# --- advantages


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("population", [0.7303, -1.4606, -0.3651, 1.0954]),
        ("sample", [0.6325, -1.2649, -0.3162, 0.9487]),
        ("none", [0.2, -0.4, -0.1, 0.3]),
    ],
)
def test_advantages_are_gaps_to_the_mean_in_units_of_a_deviation(
    scale: str, expected: list[float]
) -> None:
    algorithm = tuned("grpo", **BARE, scale=scale)
    close(advantage(algorithm, one_prompt(SCORES)), [expected], 6e-5)


def test_equal_scores_with_a_deviation_of_zero_teach_nothing_and_divide_by_nothing() -> None:
    algorithm = tuned("grpo", beta=0.0)
    verdict = judge(algorithm, one_prompt([0.7, 0.7, 0.7]))
    assert verdict.d_logp.isfinite().all() and verdict.d_logp.abs().max() < EXACT


def test_dr_grpo_is_a_shrunken_leave_one_out_policy_gradient() -> None:
    one = case(3, responses=4, spread=0.0)
    assert one.rollout.score is not None
    others = (one.rollout.score.sum(1, keepdim=True) - one.rollout.score) / 3
    push = ((one.rollout.score - others) / 16).unsqueeze(-1) * one.rollout.mask
    got = judge(tuned("dr_grpo", beta=0.0, responses=4, max_tokens=9), one).d_logp
    close(got, -push * 3 / 4 / 9, EXACT)


@pytest.mark.parametrize("responses", [2, 3, 4])
def test_dr_grpo_climbs_the_expected_score_short_of_one_in_g(responses: int) -> None:
    world = bandit(BANDIT.score.tolist(), beta=0.0)
    algorithm = tuned("dr_grpo", beta=0.0, responses=responses, max_tokens=1)
    direction = ascent(algorithm, world, THETA, THETA)
    close(direction, (1 - 1 / responses) * world.gradient(THETA), EXACT)
    # Plain policy gradient of the score, without KL, as a literal.
    close(world.gradient(THETA), [[0.293219, -0.032867, -0.260352]])


@pytest.mark.parametrize("name", FAMILY)
def test_at_the_first_step_every_clip_and_ratio_gives_the_plain_gradient(name: str) -> None:
    one = case(2, responses=4, tokens=1, spread=0.0)
    like = {**BARE, "beta": 0.0, "scale": "population", "aggregate": "response", "responses": 4}
    got = judge(tuned(name, **like), one)
    algorithm = tuned("grpo", **like)
    close(got.d_logp, -advantage(algorithm, one).unsqueeze(-1) / 16, EXACT)


# --- ratios and clips


def moved(new: list[float], old: list[float], gain: float) -> Case:
    """Two responses, of which the first has these log-probabilities and `gain` as its advantage."""
    one = one_prompt([2 * gain, 0.0], [len(new)] * 2)
    mask = one.rollout.mask[..., : len(new)]
    rollout = replace(
        one.rollout.trim(len(new)),
        mask=mask,
        logp_old=tensor([[old, old]]),
        logp_ref=tensor([[new, old]]),
    )
    return Case(rollout, Forward(leaf(tensor([[new, old]]))))


def term(name: str, one: Case, **settings: Any) -> tuple[Tensor, Tensor]:
    """The first response's surrogate, and its slope in each of its log-probabilities."""
    algorithm = tuned(name, **{**BARE, "beta": 0.0, "scale": "none", **settings})
    targets, _ = algorithm.prepare(one.rollout, {})
    value = algorithm.loss(one.now, one.rollout, targets)["policy"][0, 0]
    return value, torch.autograd.grad(value.sum(), one.now.logp)[0][0, 0]


NEW, OLD = [-1.0, -2.0, -0.5], [-1.1, -1.8, -0.7]


def test_gspo_judges_a_response_by_the_geometric_mean_of_its_ratios() -> None:
    loose = {"clip_low": 0.5, "clip_high": 0.5}
    value, slope = term("gspo", moved(NEW, OLD, 1.0), **loose)
    close(value, -1.033895)  # not the product, 1.105171
    close(slope, [-1.033895 / 3] * 3)


@pytest.mark.parametrize(
    ("new", "gain", "value", "cut"),
    [
        (NEW, 1.0, -1.0004, True),
        (NEW, -1.0, 1.033895, False),
        ([*OLD[:2], -0.8], 1.0, -0.967216, False),
        ([*OLD[:2], -0.8], -1.0, 1 - 3e-4, True),
    ],
    ids=["up and good", "up and bad", "down and good", "down and bad"],
)
def test_gspo_cuts_whole_responses_at_its_own_small_bounds(
    new: list[float], gain: float, value: float, cut: bool
) -> None:
    one = moved(new, OLD, gain)
    got, slope = term("gspo", one, clip_low=3e-4, clip_high=4e-4)
    close(got, value)
    assert (slope.abs().max() == 0) == cut


@pytest.mark.parametrize(
    ("ratio", "gain", "value", "cut"),
    [
        (1.25, 1.0, -1.25, False),
        (1.35, 1.0, -1.28, True),
        (1.35, -1.0, 1.35, False),
        (0.75, -1.0, 0.8, True),
        (0.75, 1.0, -0.75, False),
    ],
)
def test_dapo_lets_a_likely_token_grow_further_than_it_lets_one_shrink(
    ratio: float, gain: float, value: float, cut: bool
) -> None:
    assert (shipped("dapo").clip_low, shipped("dapo").clip_high) == (0.2, 0.28)
    one = moved(tensor([ratio]).log().tolist(), [0.0], gain)
    got, slope = term("dapo", one)
    close(got, [value])
    close(slope, [0.0 if cut else value])
    targets, _ = tuned("dapo", **BARE).prepare(one.rollout, {})
    watched = shipped("dapo").watch(one.now, one.rollout, targets)["clip_fraction"]
    assert watched[0, 0, 0] == cut


@pytest.mark.parametrize("name", FAMILY)
def test_a_token_200_nats_away_leaves_everything_finite(name: str) -> None:
    one = case(0, prompts=2, responses=4)
    logp = one.now.logp.detach().clone()
    logp[:, 0, 0] += 200
    logp[:, 1, 0] -= 200
    verdict = judge(tuned(name, responses=4), replace(one, now=Forward(leaf(logp))))
    assert verdict.loss.isfinite() and verdict.d_logp.isfinite().all()


# --- what the mean is over


@pytest.mark.parametrize(
    ("aggregate", "weights"),
    [
        # Advantages +1, -1 and 0 on 1, 4 and 5 tokens: each token's slope is minus its weight.
        ("response", [1 / 3, -1 / 12]),
        ("token", [1 / 10, -1 / 10]),
        ("constant", [1 / 24, -1 / 24]),
    ],
)
def test_length_weighs_by_what_the_mean_is_over(aggregate: str, weights: list[float]) -> None:
    one = one_prompt([1.0, -1.0, 0.0], [1, 4, 5])
    still = replace(one, now=Forward(leaf(one.rollout.logp_old)))
    settings = {**BARE, "beta": 0.0, "scale": "none", "max_tokens": 8}
    slope = judge(tuned("grpo", **settings, aggregate=aggregate), still).d_logp[0]
    close(slope[0], [-weights[0], 0, 0, 0, 0])
    close(slope[1], [-weights[1]] * 4 + [0])
    assert slope[2].abs().max() == 0


# --- DAPO: prompts left out, responses too long


@pytest.mark.parametrize("aggregate", ["response", "token", "constant"])
def test_prompts_whose_scores_are_equal_leave_the_mean_as_if_they_had_not_been_drawn(
    aggregate: str,
) -> None:
    one = case(3, responses=4)
    assert one.rollout.score is not None
    score = one.rollout.score.clone()
    score[1] = 0.3
    one = one.with_rollout(score=score)
    rest = one.take(torch.tensor([0, 2, 3]))
    settings = {"beta": 0.0, "responses": 4, "aggregate": aggregate, "max_tokens": 5}
    for overlong in (0.0, 0.6):
        algorithm = tuned("dapo", **settings, overlong=overlong)
        whole, kept = judge(algorithm, one), judge(algorithm, rest)
        close(whole.loss, kept.loss, EXACT)
        close(whole.d_logp[[0, 2, 3]], kept.d_logp, EXACT)
        assert whole.d_logp[1].abs().max() == 0
    # Left in, it does not teach either, but it makes the others count for less.
    left_in = judge(tuned("dapo", **settings, overlong=0.0, drop_equal=False), one)
    kept = judge(tuned("dapo", **settings, overlong=0.0), rest)
    share = rest.rollout.mask.sum() / one.rollout.mask.sum() if aggregate == "token" else 3 / 4
    close(left_in.d_logp[[0, 2, 3]], share * kept.d_logp, EXACT)


def test_a_rollout_of_equal_scores_alone_teaches_nothing() -> None:
    one = case(3, responses=2)
    one = one.with_rollout(score=torch.full((4, 2), 0.3, dtype=torch.float64))
    verdict = judge(tuned("dapo", beta=0.0, responses=2, max_tokens=5, overlong=0.6), one)
    assert verdict.loss == 0 and verdict.d_logp.abs().max() == 0


def test_the_reward_falls_by_one_over_the_last_tokens_there_are() -> None:
    settings = {**BARE, "scale": "none", "max_tokens": 5}
    one = one_prompt([0.0] * 5, [1, 2, 3, 4, 5])
    # Of 5 tokens the last 3: nothing up to 2, then a third each.
    fine = tensor([[0, 0, -1, -2, -3]]) / 3
    algorithm = tuned("dapo", **{**settings, "overlong": 0.6})
    close(advantage(algorithm, one), fine - fine.mean(), EXACT)
    longer = one_prompt([0.0] * 5, [1, 2, 3, 4, 5])
    algorithm = tuned("dapo", **{**settings, "overlong": 1.0, "max_tokens": 4})
    steep = tensor([[-0.25, -0.5, -0.75, -1, -1]])
    close(advantage(algorithm, longer), steep - steep.mean(), EXACT)


# --- the KL in the loss


def test_the_penalty_costs_k3_and_pulls_the_reference_towards_the_policy() -> None:
    world = replace(ARMS, score=torch.zeros(3).double())
    algorithm = tuned("dr_grpo", beta=0.7, responses=2, max_tokens=1)
    direction = ascent(algorithm, world, THETA, THETA)
    policy, ref = ARMS.probability(THETA), ARMS.probability(ARMS.ref)
    # - d/d theta of KL(ref || pi), not of KL(pi || ref).
    close(direction, (0.7 * (ref - policy)).unsqueeze(0), EXACT)
    other = -0.7 * policy * (policy.log() - (policy * policy.log()).sum())
    assert (direction[0] - other).abs().max() > 1e-3


def reversed_optimum(world: World, share: float) -> Tensor:
    """pi_ref beta / (level - share r): what maximises share E[r] - beta KL(pi_ref || pi)."""
    ref = world.probability(world.ref)
    low, high = share * float(world.score.max()), share * float(world.score.max()) + 10.0
    for _ in range(200):
        level = (low + high) / 2
        total = (ref * world.beta / (level - share * world.score)).sum()
        low, high = (level, high) if total > 1 else (low, level)
    return ref * world.beta / (level - share * world.score)


@pytest.mark.parametrize("responses", [2, 3])
def test_dr_grpo_rests_at_the_optimum_of_the_reversed_kl_and_not_at_pi_star(
    responses: int,
) -> None:
    algorithm = tuned("dr_grpo", beta=ARMS.beta, responses=responses, max_tokens=1)
    theta = ARMS.ref.clone()
    for _ in range(600):
        theta = theta + 2.0 * ascent(algorithm, ARMS, theta, theta)
    found = ARMS.probability(theta)
    close(found, reversed_optimum(ARMS, 1 - 1 / responses))
    assert (found - ARMS.optimum()).abs().max() > 0.05


@pytest.mark.parametrize("name", FAMILY)
def test_without_the_penalty_the_best_arm_takes_all(name: str) -> None:
    algorithm = tuned(name, **{**BARE, "beta": 0.0, "responses": 2, "max_tokens": 1})
    theta = ARMS.ref.clone()
    for _ in range(300):
        theta = theta + ascent(algorithm, ARMS, theta, theta)
    assert ARMS.probability(theta)[0] > 0.98 > ARMS.optimum()[0] + 0.2


def test_the_longest_response_is_the_datasets() -> None:
    assert shipped("dr_grpo").max_tokens == 48  # of the embedded hh, the default
