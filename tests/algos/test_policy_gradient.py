"""Policy gradients on whole responses and their kin: what is equal, what is not, and where each one goes."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward, token_reward
from tests.algos.cases import case, judge
from tests.algos.discovery import tuned
from tests.algos.test_learning import distance, learn
from tests.algos.toys import (
    ARMS,
    BANDIT,
    THETA,
    THETA_OLD,
    TREE,
    World,
    ascent,
    bandit,
    close,
    leaf,
    per_prompt,
    tensor,
)

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

TREE_THETA = tensor([[0.2, -0.1], [0.3, 0], [-0.5, 0.4]])
OF_THE_TREE = [[-0.231156, 0.231156], [0.178855, -0.178855], [-0.152442, 0.152442]]

UNBIASED: dict[str, tuple[str, dict[str, Any]]] = {
    "vpg": ("vpg", {"baseline": "constant", "level": 0.0}),
    "vpg, two responses": ("vpg", {"level": 0.0, "responses": 2}),
    "vpg against 7": ("vpg", {"baseline": "constant", "level": 7.0}),
    "ppg": ("ppg", {"responses": 2}),
    "ppg of three": ("ppg", {"responses": 3}),
    "reinforce": ("reinforce", {"baseline": "past"}),
    "rloo": ("rloo", {"responses": 2}),
    "rloo of three": ("rloo", {"responses": 3}),
    "rloo, KL outside": ("rloo", {"variant": "outside", "responses": 2}),
    "rloo, clipped": ("rloo", {"ratio": "clip", "clip": 1e-6}),
    "rloo, KL outside, clipped": ("rloo", {"variant": "outside", "ratio": "clip", "clip": 1e-6}),
    "vanilla_pg": ("vanilla_pg", {}),
    "remax": ("remax", {"baseline": "score"}),
    "remax, regularised": ("remax", {"baseline": "regularised"}),
    "reinforce_pp": ("reinforce_pp", {"whiten_advantage": False, "clip": 1e-6}),
}
"""Whose expected gradient is that of J itself, on the policy's own samples."""


@pytest.fixture(params=UNBIASED.values(), ids=UNBIASED)
def unbiased(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


# --- one expected gradient


@pytest.mark.parametrize(
    ("beta", "direction"),
    [(0.1, [0.293470, -0.025178, -0.268292]), (0.0, [0.293219, -0.032867, -0.260352])],
)
def test_all_climb_the_gradient_of_the_regularised_reward_on_the_bandit(
    beta: float, direction: list[float], unbiased: tuple[str, dict[str, Any]]
) -> None:
    name, settings = unbiased
    world = replace(BANDIT, beta=beta)
    got = ascent(tuned(name, **{"beta": beta, **settings}), world, THETA, THETA)
    close(got, [direction])
    close(got, world.gradient(THETA), EXACT)


def test_all_climb_it_token_by_token_on_the_tree(unbiased: tuple[str, dict[str, Any]]) -> None:
    name, settings = unbiased
    got = ascent(tuned(name, **{"beta": TREE.beta, **settings}), TREE, TREE_THETA, TREE_THETA)
    close(got, OF_THE_TREE)
    close(got, TREE.gradient(TREE_THETA), EXACT)


def test_the_pair_estimate_is_half_of_the_summed_convention() -> None:
    theta = tensor([[0.3, -0.2, 0.1]])
    for name in ("ppg", "rloo"):
        got = 2 * ascent(tuned(name, beta=0.5, responses=2), ARMS, theta, theta)
        close(got, [[0.441305, 0.142621, -0.583926]])


@pytest.mark.parametrize("level", [-3.0, 0.5, 20.0])
def test_no_constant_baseline_turns_the_expected_gradient(level: float) -> None:
    got = ascent(tuned("vpg", beta=TREE.beta, level=level), TREE, TREE_THETA, TREE_THETA)
    close(got, TREE.gradient(TREE_THETA), 1e-11)  # the level cancels out of terms 20 times as large


def test_a_wrong_critic_turns_vanilla_pg_nowhere_and_ppo_with_lambda_below_one_elsewhere() -> None:
    critic = tensor([[0.3, -0.8], [0.3, -0.8], [0.3, 1.7], [0.3, 1.7]])
    vanilla = tuned("vanilla_pg", beta=TREE.beta)
    got = ascent(vanilla, TREE, TREE_THETA, TREE_THETA, critic)
    close(got, TREE.gradient(TREE_THETA), EXACT)
    ppo = tuned("ppo", beta=TREE.beta, gamma=1.0, lam=0.95, whiten_advantage=False)
    astray = ascent(ppo, TREE, TREE_THETA, TREE_THETA, critic) - TREE.gradient(TREE_THETA)
    assert astray.abs().max() > 1e-2


def rows(algorithm: Any, world: World, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Each outcome's ascent direction [P,S*V] and probability [P], the outcome being the rollout."""
    sampling = algorithm.sampling()
    draws = world.draws(sampling.responses)
    steps = []
    for row in draws:
        rollout = world.rollout(theta, row.unsqueeze(0), sampling)
        targets, _ = algorithm.prepare(rollout, {})
        now = leaf(theta)
        terms = algorithm.loss(world.now(now, rollout, row.unsqueeze(0)), rollout, targets)
        loss = sum(per_prompt(term).sum() for term in terms.values())
        steps.append(-torch.autograd.grad(loss, now)[0].flatten())
    return torch.stack(steps), world.chances(theta, draws, sampling)


@pytest.mark.parametrize("responses", [2, 4])
def test_the_mean_of_a_batch_of_n_shrinks_the_expected_gradient_by_1_minus_1_over_n(
    responses: int,
) -> None:
    algorithm = tuned("vpg", beta=BANDIT.beta, baseline="batch", responses=responses)
    steps, chance = rows(algorithm, BANDIT, THETA)
    expected = (1 - 1 / responses) * BANDIT.gradient(THETA).flatten()
    close(chance @ steps, expected, EXACT)


@pytest.mark.parametrize(
    ("name", "shift", "variance"),
    [("vpg", 0.0, 0.063), ("vpg", 7.0, 16.9), ("ppg", 0.0, 0.273), ("ppg", 7.0, 0.273)],
)
def test_pairs_are_worse_than_a_good_baseline_and_better_than_a_bad_one(
    name: str, shift: float, variance: float
) -> None:
    world = replace(BANDIT, score=BANDIT.score + shift)
    steps, chance = rows(tuned(name, beta=0.1, responses=2, **LEVEL.get(name, {})), world, THETA)
    spread = (chance @ (steps - chance @ steps) ** 2).sum()
    close(spread, variance, 0.005 * variance + 4e-4)  # given to three digits


LEVEL = {"vpg": {"baseline": "constant", "level": 0.0}}


# --- one response, one pair, one group


def one_row(name: str, world: World, draws: list[int], **settings: Any) -> Tensor:
    """[3] ascent direction of one prompt on the bandit, under the policy that drew."""
    algorithm = tuned(name, **settings)
    picked, theta = torch.tensor([draws]), leaf(THETA)
    rollout = world.rollout(THETA, picked, algorithm.sampling())
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(world.now(theta, rollout, picked), rollout, targets)
    return -torch.autograd.grad(sum(per_prompt(t).sum() for t in terms.values()), theta)[0][0]


def test_a_level_of_seven_makes_one_response_eight_times_as_loud_and_leaves_a_pair_alone() -> None:
    high = replace(BANDIT, score=BANDIT.score + 7)
    vpg = {"beta": 0.0, "level": 0.0, "responses": 1}
    close(one_row("vpg", BANDIT, [0], **vpg), [0.662415, -0.250089, -0.412327])
    loud = one_row("vpg", high, [0], **vpg)
    close(loud, 8 * one_row("vpg", BANDIT, [0], **vpg), EXACT)
    for draws in BANDIT.draws(2).tolist():
        pair = {"beta": 0.0, "responses": 2}
        assert torch.equal(
            one_row("ppg", high, draws, **pair), one_row("ppg", BANDIT, draws, **pair)
        )


@pytest.mark.parametrize("name", ["ppg", "rloo"])
def test_all_pairs_of_four_are_leave_one_out(name: str) -> None:
    got = one_row(name, BANDIT, [0, 2, 1, 0], beta=0.1, responses=4)
    close(got, [0.415000, -0.115833, -0.299167])


@pytest.mark.parametrize("responses", [2, 3, 5])
def test_ppg_and_rloo_are_one_estimator(responses: int) -> None:
    one = case(3, responses=responses, spread=0.5)
    ppg, rloo = (
        judge(tuned(name, beta=0.3, responses=responses), one).d_logp for name in ("ppg", "rloo")
    )
    close(ppg, rloo, EXACT)


@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2"])
def test_ppg_is_the_first_step_of_p3o(name: str) -> None:
    one = case(5, spread=0.0)
    ppg, p3o = judge(tuned("ppg", beta=0.3), one), judge(tuned(name, beta=0.3), one)
    close(ppg.d_logp, p3o.d_logp, EXACT)


def test_rloo_of_four_scores() -> None:
    rollout = scored([[0.8, 0.2, 0.5, 0.9]])
    targets, _ = tuned("rloo", beta=0.0, responses=4).prepare(rollout, {})
    close(targets.advantage, [[0.266667, -0.533333, -0.133333, 0.4]])
    shifted, _ = tuned("rloo", beta=0.0, responses=4).prepare(
        replace(rollout, score=rollout.score + 3), {}
    )
    close(shifted.advantage, targets.advantage, EXACT)


def scored(score: list[list[float]], u: list[list[list[float]]] | None = None) -> Rollout:
    """Responses with these scores, and log pi_old - log pi_ref token by token (one token of 0)."""
    ratio = tensor(u if u is not None else [[[0.0] for _ in group] for group in score])
    return Rollout(
        tokens=torch.zeros(*ratio.shape[:2], 0),
        attention=torch.zeros(*ratio.shape[:2], 0),
        mask=torch.ones_like(ratio),
        logp_old=ratio - 2,
        logp_ref=torch.full_like(ratio, -2),
        score=tensor(score),
        value_old=torch.zeros_like(ratio),
        coin=torch.zeros(ratio.shape[:2]),
        source=Sampling(policy=ratio.shape[1]).sources,
    )


def test_the_reward_of_tokens_adds_up_to_that_of_the_response() -> None:
    rollout = scored([[1.0, 0.0]], [[[0.2, 0.4], [-0.2, 0.0]]])
    close(sequence_reward(rollout, 0.5), [[0.7, 0.1]], EXACT)
    close(token_reward(rollout, 0.5), [[[-0.1, 0.8], [0.1, 0.0]]], EXACT)
    ragged = case(3).rollout
    total = sequence_sum(token_reward(ragged, 0.3), ragged.mask)
    close(total, sequence_reward(ragged, 0.3), EXACT)
    # Whatever somebody wrote on padding.
    marked = replace(ragged, logp_old=ragged.logp_old + 7.0 * (1 - ragged.mask))
    assert (token_reward(marked, 0.3)[ragged.mask == 0] == 0).all()


@pytest.mark.parametrize("name", ["ppg", "rloo", "raft"])
def test_a_response_without_siblings_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        tuned(name, responses=1)


def test_a_rollout_of_single_responses_is_no_leave_one_out() -> None:
    for variant in ("paper", "outside"):
        with pytest.raises(ValueError, match="at least 2 responses per prompt, got 1"):
            tuned("rloo", variant=variant).prepare(scored([[0.8], [0.2]]), {})


# --- the past as a baseline


def test_reinforce_compares_a_rollout_with_what_came_before_it_and_not_with_itself() -> None:
    algorithm = tuned("reinforce", beta=0.5, baseline="past")
    first = scored([[1.0], [2.0]], [[[0.4]], [[0.0]]])  # earn 0.8 and 2
    second = scored([[0.0], [4.0]])
    third = scored([[10.0]])
    targets, state = algorithm.prepare(first, {})
    close(targets.advantage, [[0.8], [2.0]], EXACT)
    before = dict(state)
    targets, state = algorithm.prepare(second, state)
    close(targets.advantage, [[-1.4], [2.6]], EXACT)
    assert {word: float(x) for word, x in before.items()} == {
        "earned/count": 2, "earned/mean": pytest.approx(1.4), "earned/m2": pytest.approx(0.72)
    }  # fmt: skip
    targets, state = algorithm.prepare(third, state)
    close(targets.advantage, [[10 - 6.8 / 4]], EXACT)
    close(state["earned/mean"], 16.8 / 5, EXACT)


def test_the_past_scales_no_expected_gradient_and_without_it_reinforce_is_vpg() -> None:
    past = {"earned/count": tensor(9), "earned/mean": tensor(3.3), "earned/m2": tensor(1)}
    draws = BANDIT.draws(1)
    rollout = BANDIT.rollout(THETA, draws)
    for settings, state in (({"baseline": "past"}, past), ({"baseline": "none"}, past)):
        algorithm = tuned("reinforce", beta=0.1, **settings)
        targets, _ = algorithm.prepare(rollout, state)
        theta = leaf(THETA)
        term = algorithm.loss(BANDIT.now(theta, rollout, draws), rollout, targets)["policy"]
        loss = (BANDIT.chances(THETA, draws) * term[:, 0]).sum()
        close(-torch.autograd.grad(loss, theta)[0], BANDIT.gradient(THETA), EXACT)
        level = 3.3 if settings["baseline"] == "past" else 0.0
        close(targets.advantage, BANDIT.regularised(THETA).unsqueeze(-1) - level, EXACT)


# --- the KL inside and outside


def test_rloo_compares_rewards_with_their_kl_or_scores_and_charges_the_kl_token_by_token() -> None:
    rollout = scored([[1.0, 0.0]], [[[0.2, 0.4], [-0.2, 0.0]]])
    inside, _ = tuned("rloo", beta=0.5, variant="paper").prepare(rollout, {})
    close(inside.advantage, [[0.6, -0.6]], EXACT)
    outside, _ = tuned("rloo", beta=0.5, variant="outside").prepare(rollout, {})
    close(outside.advantage, [[[0.7, 0.8], [-0.9, -1.0]]], EXACT)


def test_the_two_variants_of_rloo_agree_without_a_kl_and_only_in_expectation_with_one() -> None:
    one = case(2, responses=3)
    for beta, equal in ((0.0, True), (0.3, False)):
        paper, outside = (
            judge(tuned("rloo", beta=beta, variant=variant, responses=3), one).d_logp
            for variant in ("paper", "outside")
        )
        assert ((paper - outside).abs().max() < EXACT) == equal


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rloo", {"variant": "outside"}),
        ("rloo", {"ratio": "clip", "clip": 0.05}),
        ("rloo", {"variant": "outside", "ratio": "clip", "responses": 3}),
        ("remax", {"baseline": "regularised"}),
        ("raft", {"rank": "score", "select": "best"}),
    ],
)
def test_other_settings_too_are_blind_to_a_reward_shifted_prompt_by_prompt(
    name: str, settings: dict[str, Any]
) -> None:
    algorithm = tuned(name, **settings)
    for seed, spread in ((1, 0.05), (2, 0.5)):
        one = case(seed, sampling=algorithm.sampling(), spread=spread)
        assert one.rollout.score is not None
        delta = tensor([[3.0], [-1.5], [0.25], [7.0]])
        shifted = judge(algorithm, one.with_rollout(score=one.rollout.score + delta))
        close(shifted.d_logp, judge(algorithm, one).d_logp, 1e-11)


# --- stale rollouts


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rloo", {"responses": 2, "ratio": "clip", "clip": 1e9}),
        ("reinforce_pp", {"whiten_advantage": False, "clip": 1e9}),
    ],
)
def test_an_unclipped_ratio_corrects_for_an_older_policy_up_to_the_kl_of_the_rollout(
    name: str, settings: dict[str, Any]
) -> None:
    """The same bias as that of P3O with the KL of the rollout; without KL there is none."""
    got = ascent(tuned(name, beta=0.1, **settings), BANDIT, THETA, THETA_OLD)
    close(got, [[0.292671, -0.035774, -0.256897]])
    free = replace(BANDIT, beta=0.0)
    got = ascent(tuned(name, beta=0.0, **settings), free, THETA, THETA_OLD)
    close(got, free.gradient(THETA), EXACT)


@pytest.mark.parametrize("name", ["vpg", "ppg", "reinforce", "rloo", "remax", "vanilla_pg"])
def test_without_a_ratio_an_older_policy_leads_elsewhere(name: str) -> None:
    free = replace(BANDIT, beta=0.0)
    got = ascent(tuned(name, beta=0.0), free, THETA, THETA_OLD)
    assert (got - free.gradient(THETA)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "slope"),
    [(1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1), (0.5, 1, -0.5, -1), (0.5, -1, 0.8, 0)],
)
def test_the_ratio_is_clipped_only_where_it_would_gain(
    rho: float, advantage: float, loss: float, slope: float
) -> None:
    """Of whole responses in rloo, of tokens with the KL outside and in REINFORCE++."""
    rollout = scored([[0.0]], [[[0.0, 0.0]]])
    for name, settings in (
        ("rloo", {"ratio": "clip"}),
        ("rloo", {"ratio": "clip", "variant": "outside"}),
        ("reinforce_pp", {}),
    ):
        algorithm = tuned(name, clip=0.2, **settings)
        whole = name == "rloo" and "variant" not in settings
        # A whole response moves as far with both of its tokens as one token moves alone.
        step = tensor([[[log(rho), 0.0]]]) if not whole else tensor([[[log(rho) / 2] * 2]])
        logp = leaf(rollout.logp_old + step)
        a = tensor([[advantage]]) if whole else tensor([[[advantage, 0.0]]])
        now, targets = Forward(logp), Targets(advantage=a)
        term = algorithm.loss(now, rollout, targets)["policy"]
        close(term.sum(), loss, EXACT)
        gradient = torch.autograd.grad(term.sum(), logp)[0]
        # d/d ratio is the literal; d/d log pi is ratio times that.
        close(gradient, [[[rho * slope, rho * slope if whole else 0.0]]], EXACT)
        cut = algorithm.watch(now, rollout, targets)["clip_fraction"]
        assert float(cut.flatten()[0]) == (slope == 0)


# --- with a critic


def test_vanilla_pg_is_the_reward_to_go_minus_the_value() -> None:
    rollout = scored([[1.0]], [[[0.1, 0.2, 0.0]]])  # rewards -.1, -.2, 1
    rollout = replace(rollout, value_old=tensor([[[0.5, 0.4, 0.3]]]))
    targets, _ = tuned("vanilla_pg", beta=1.0).prepare(rollout, {})
    close(targets.returns, [[[0.7, 0.8, 1.0]]], EXACT)
    close(targets.advantage, [[[0.2, 0.4, 0.7]]], EXACT)


def test_vanilla_pg_is_ppo_with_lambda_one_on_its_own_samples() -> None:
    one = case(4, responses=1, spread=0.0)
    ppo = tuned("ppo", beta=0.3, gamma=1.0, lam=1.0, whiten_advantage=False)
    vanilla = tuned("vanilla_pg", beta=0.3)
    for a, b in zip(
        (vanilla.prepare(one.rollout, {})[0].advantage, judge(vanilla, one).d_logp),
        (ppo.prepare(one.rollout, {})[0].advantage, judge(ppo, one).d_logp),
        strict=True,
    ):
        assert a is not None and b is not None
        close(a, b, EXACT)
    moved = case(4, responses=1, spread=0.5)
    assert (judge(vanilla, moved).d_logp - judge(ppo, moved).d_logp).abs().max() > 1e-3


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_reinforce_pp_is_ppo_with_lambda_one_and_a_critic_that_knows_nothing(
    whiten: bool, spread: float
) -> None:
    one = case(6, responses=1, spread=spread)
    one = one.with_rollout(value_old=torch.zeros_like(one.rollout.mask))
    common = {"beta": 0.3, "clip": 0.2, "whiten_advantage": whiten}
    ppo = judge(tuned("ppo", gamma=1.0, lam=1.0, **common), one)
    close(judge(tuned("reinforce_pp", **common), one).d_logp, ppo.d_logp, EXACT)


# --- the batch as a baseline


def test_whitening_divides_the_expected_gradient_by_the_deviation_and_turns_it_nowhere() -> None:
    algorithm = tuned("reinforce_pp", beta=0.1, whiten_advantage=True)
    earned = BANDIT.regularised(THETA).tolist()
    mean = sum(earned) / 3
    deviation = (sum((x - mean) ** 2 for x in earned) / 3 + 1e-8) ** 0.5
    got = ascent(algorithm, BANDIT, THETA, THETA)
    close(deviation * got, BANDIT.gradient(THETA), EXACT)


def test_whitened_steps_do_not_shrink_on_the_way_to_the_optimum() -> None:
    def size(whiten: bool, away: float) -> float:
        theta = ARMS.optimum().log().unsqueeze(0) + away * tensor([[1.0, -1.0, 0.5]])
        algorithm = tuned("reinforce_pp", beta=ARMS.beta, whiten_advantage=whiten)
        return float(ascent(algorithm, ARMS, theta, theta).norm())

    assert 9 < size(False, 1e-2) / size(False, 1e-3) < 11
    assert 0.9 < size(True, 1e-2) / size(True, 1e-3) < 1.1


# --- the greedy response as a baseline


def against_greedy(baseline: str) -> Targets:
    """A draw of score 1 and the greedy response of score .4, two tokens each."""
    algorithm = tuned("remax", beta=0.5, baseline=baseline)
    rollout = scored([[1.0, 0.4]], [[[0.1, 0.2], [0.6, 0.0]]])
    return algorithm.prepare(replace(rollout, source=algorithm.sampling().sources), {})[0]


@pytest.mark.parametrize(
    ("baseline", "advantage"), [("score", [0.45, 0.5]), ("regularised", [0.75, 0.8])]
)
def test_remax_takes_the_greedy_response_off_and_learns_nothing_from_it(
    baseline: str, advantage: list[float]
) -> None:
    close(against_greedy(baseline).advantage, [[advantage, [0.0, 0.0]]], EXACT)
    algorithm = tuned("remax", baseline=baseline)
    one = case(1, sampling=algorithm.sampling())
    assert (judge(algorithm, one).d_logp[:, 1] == 0).all()


def test_remax_knows_the_greedy_response_by_its_source_and_not_by_its_place() -> None:
    algorithm = tuned("remax", beta=0.3)
    one = case(1, sampling=algorithm.sampling())
    turned = one.mapped(lambda x: x.flip(1)).with_rollout(source=("greedy", "policy"))
    close(judge(algorithm, turned).d_logp.flip(1), judge(algorithm, one).d_logp, EXACT)


def test_a_draw_that_is_the_greedy_response_teaches_only_its_kl() -> None:
    rollout = replace(scored([[0.4, 0.4]], [[[0.1, 0.2], [0.1, 0.2]]]), source=("policy", "greedy"))
    for baseline, advantage in (("score", [-0.15, -0.1]), ("regularised", [0.0, 0.05])):
        targets, _ = tuned("remax", beta=0.5, baseline=baseline).prepare(rollout, {})
        assert targets.advantage is not None
        close(targets.advantage[0, 0], advantage, EXACT)


# --- the best of k


def after_a_round(theta: Tensor, world: World, **settings: Any) -> Tensor:
    """[3] what an exact fit to the selected would answer: pi plus the slope of their likelihood."""
    algorithm = tuned("raft", **{"rank": "score", "select": "best", **settings})
    return world.probability(theta) + ascent(algorithm, world, theta, theta)[0]


@pytest.mark.parametrize(
    ("k", "chances"), [(2, [5 / 9, 3 / 9, 1 / 9]), (4, [0.802469, 0.185185, 0.012346])]
)
def test_raft_fits_the_best_of_k_whatever_the_size_of_the_scores(
    k: int, chances: list[float]
) -> None:
    for world in (ARMS, bandit([9.0, 0.01, 0.0], beta=0.5)):
        close(after_a_round(ARMS.ref, world, responses=k), chances)


def test_two_rounds_of_the_best_of_two_are_one_round_of_the_best_of_four() -> None:
    once = after_a_round(ARMS.ref, ARMS, responses=2)
    twice = after_a_round(once.log().unsqueeze(0), ARMS, responses=2)
    close(twice, after_a_round(ARMS.ref, ARMS, responses=4), EXACT)
    moved = float((twice * (twice * 3).log()).sum())
    close(moved, 0.5555, 5e-5)  # given to four digits
    assert moved < log(4) - 3 / 4


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_raft_ranked_by_score_runs_to_the_best_response(world: World) -> None:
    algorithm = tuned("raft", beta=world.beta, rank="score", select="best", responses=2)
    theta = learn(algorithm, world, steps=300)
    assert distance(world, theta) > 0.1
    best = int(world.score.argmax())
    assert world.probability(theta)[best] > 0.998 > world.optimum()[best] + 0.1


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_raft_ranked_with_the_kl_in_hovers_about_the_optimum_as_closely_as_its_steps_are_small(
    world: World,
) -> None:
    algorithm = tuned("raft", beta=world.beta, rank="regularised", select="best", responses=2)
    assert distance(world, learn(algorithm, world, steps=1500, rate=0.1)) < 1e-3


def test_raft_does_not_look_at_the_kl_when_it_ranks_by_score() -> None:
    one = case(2, responses=4)
    assert one.rollout.logp_ref is not None
    far = one.with_rollout(logp_ref=one.rollout.logp_ref.flip(0, 1) * 3)
    score, both = (tuned("raft", beta=0.5, rank=rank) for rank in ("score", "regularised"))
    assert torch.equal(judge(score, one).d_logp, judge(score, far).d_logp)
    assert not torch.equal(judge(both, one).d_logp, judge(both, far).d_logp)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"select": "best"}, [[2, 0], [2, 0], [0, 2]]),  # ties keep the first
        ({"select": "top", "share": 0.5}, [[2, 0], [2, 2], [0, 0]]),
        ({"select": "top", "share": 0.4}, [[3, 0], [3, 0], [0, 0]]),  # 2.4 responses are 2
        ({"select": "top", "share": 0.01}, [[6, 0], [0, 0], [0, 0]]),
        ({"select": "top", "share": 1.0}, [[1, 1], [1, 1], [1, 1]]),
        ({"select": "threshold", "threshold": 2.0}, [[2, 0], [2, 2], [0, 0]]),
        ({"select": "threshold", "threshold": 3.5}, [[0, 0], [0, 0], [0, 0]]),
    ],
)
def test_raft_weighs_the_selected_alike_and_by_how_few_they_are(
    settings: dict[str, Any], weights: list[list[float]]
) -> None:
    rollout = scored([[3.0, 1.0], [2.0, 2.0], [0.0, 1.5]])
    algorithm = tuned("raft", rank="score", responses=2, **settings)
    targets, _ = algorithm.prepare(rollout, {})
    close(targets.advantage, weights, EXACT)


@pytest.mark.parametrize("rule", ["top", "threshold"])
def test_raft_across_prompts_is_not_blind_to_the_level_of_a_prompt(rule: str) -> None:
    algorithm = tuned("raft", rank="score", select=rule, share=0.5, threshold=0.0, responses=2)
    low, high = scored([[3.0, 1.0], [2.0, 0.0]]), scored([[3.0, 1.0], [-8.0, -10.0]])
    before, after = (algorithm.prepare(x, {})[0].advantage for x in (low, high))
    assert before is not None and after is not None and not torch.equal(before, after)
