"""The size of every number: literals of the papers' toys, worked out apart from the code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Targets
from rlhf_cli.core.rollout import Forward
from tests.algos.cases import case, judge
from tests.algos.discovery import tuned
from tests.algos.toys import (
    ARMS,
    BANDIT,
    THETA,
    THETA_OLD,
    TREE,
    ascent,
    bandit,
    close,
    leaf,
    tensor,
)

EXACT = 1e-11
"""Two float64 routes to one number; sums of a few dozen terms of size 1 to 100."""

P3O = ["p3o_v1", "p3o_v2"]
ON_BANDIT = {"beta": 0.1, "clip": 0.2, "clamp": 10.0, "responses": 2, "kl_at": "update"}
UNCLIPPED = {**ON_BANDIT, "clip": 1e9, "clamp": 1e9}
PPO = {
    "beta": 0.05,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "clip_value": 0.2,
    "value_coef": 1.0,
    "whiten_advantage": False,
}
TREE_THETA = tensor([[0.2, -0.1], [0.3, 0], [-0.5, 0.4]])


# --- the toys are the toys the literals were computed on


def test_bandit_has_the_policies_and_the_objective_of_the_literals() -> None:
    close(BANDIT.probability(THETA), [0.337585, 0.250089, 0.412327])
    close(BANDIT.probability(THETA_OLD), [0.332225, 0.367165, 0.300610])
    close(BANDIT.regularised(THETA), [0.998733, 0.028733, -0.521267])
    close(BANDIT.objective(THETA), 0.129410)
    close(BANDIT.gradient(THETA), [[0.293470, -0.025178, -0.268292]])


def test_arms_have_their_closed_form_optimum() -> None:
    close(ARMS.optimum(), [0.705385, 0.259496, 0.035119])
    close(ARMS.objective(ARMS.optimum().log().unsqueeze(0)), 2.125200)


def test_tree_has_its_closed_form_optimum_and_soft_values() -> None:
    close(TREE.optimum(), [0.147976, 0.008583, 0.010369, 0.833072])
    best = tensor([[0.156559, 0.843441], [0.945179, 0.054821], [0.012294, 0.987706]]).log()
    close(TREE.objective(best), 1.521601)
    close(TREE.values(best)[[0, 0, 2], [0, 1, 1]], [1.521601, 0.849853, 1.894613], 2e-6)


# --- P3O


def pair_gradient(name: str, first: int, second: int) -> Tensor:
    """[3] d loss / d theta of one pair of arms."""
    theta, draws = leaf(THETA), torch.tensor([[first, second]])
    rollout = BANDIT.rollout(THETA_OLD, draws)
    now = Forward(BANDIT.logp(theta)[draws], None)
    loss = tuned(name, **ON_BANDIT).loss(now, rollout, Targets())["policy"].sum()
    return torch.autograd.grad(loss, theta)[0][0]


@pytest.mark.parametrize(
    ("name", "pair", "gradient"),
    [
        ("p3o_v1", (0, 1), [-0.222359, 0.083950, 0.138409]),
        ("p3o_v2", (0, 1), [0, 0, 0]),
        ("p3o_v1", (0, 2), [-1.059260, 0, 1.059260]),
        ("p3o_v2", (0, 2), [-1.059260, 0, 1.059260]),
        ("p3o_v1", (1, 2), [0, -0.256923, 0.256923]),
        ("p3o_v2", (1, 2), [0, -0.256923, 0.256923]),
    ],
)
def test_p3o_clips_one_side_in_v1_and_the_whole_pair_in_v2(
    name: str, pair: tuple[int, int], gradient: list[float]
) -> None:
    close(pair_gradient(name, *pair), gradient)


@pytest.mark.parametrize("shift", [0.0, 7.0])
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("p3o_v1", [0.265824, 0.036234, -0.302058]),
        ("p3o_v2", [0.211577, 0.056715, -0.268292]),
    ],
)
def test_p3o_clipped_climbs_in_this_direction_whatever_is_added_to_the_reward(
    name: str, direction: list[float], shift: float
) -> None:
    world = replace(BANDIT, score=BANDIT.score + shift)
    close(ascent(tuned(name, **ON_BANDIT), world, THETA, THETA_OLD), [direction])


@pytest.mark.parametrize("name", P3O)
def test_p3o_unclipped_is_the_exact_gradient_from_samples_of_another_policy(name: str) -> None:
    direction = ascent(tuned(name, **UNCLIPPED), BANDIT, THETA, THETA_OLD)
    close(direction, [[0.293470, -0.025178, -0.268292]])
    close(direction, BANDIT.gradient(THETA), EXACT)


@pytest.mark.parametrize("name", P3O)
def test_p3o_with_the_kl_of_the_rollout_is_slightly_biased_off_policy(name: str) -> None:
    algorithm = tuned(name, **{**UNCLIPPED, "kl_at": "rollout"})
    close(ascent(algorithm, BANDIT, THETA, THETA_OLD), [[0.292671, -0.035774, -0.256897]])


@pytest.mark.parametrize("name", P3O)
def test_p3o_in_all_pairs_of_four_responses_is_leave_one_out(name: str) -> None:
    theta, draws = leaf(THETA), torch.tensor([[0, 2, 1, 0]])
    algorithm = tuned(name, **{**ON_BANDIT, "responses": 4})
    now = Forward(BANDIT.logp(theta)[draws], None)
    loss = algorithm.loss(now, BANDIT.rollout(THETA, draws), Targets())["policy"].sum()
    close(-torch.autograd.grad(loss, theta)[0], [[0.415000, -0.115833, -0.299167]])


@pytest.mark.parametrize("name", P3O)
def test_p3o_survives_a_response_whose_log_ratio_is_200_nats(name: str) -> None:
    one = case(seed=0, prompts=2)
    logp = one.now.logp.detach().clone()
    logp[:, 0, 0] += 200
    verdict = judge(tuned(name, **ON_BANDIT), replace(one, now=Forward(leaf(logp), None)))
    assert verdict.loss.isfinite() and verdict.d_logp.isfinite().all()


# --- PPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1, -1.2, 0),
        (1.5, -1, 1.5, 1),
        (0.5, 1, -0.5, -1),
        (0.5, -1, 0.8, 0),
    ],
)
def test_ppo_clips_a_ratio_only_where_it_would_gain(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    rollout = ARMS.rollout(ARMS.ref, torch.tensor([[0]]))
    logp = leaf(rollout.logp_old + tensor(ratio).log())
    targets = Targets(advantage=tensor([[[advantage]]]), returns=rollout.value_old)
    terms = tuned("ppo", **PPO).loss(Forward(logp, rollout.value_old), rollout, targets)
    close(terms["policy"], [[[loss]]])
    # d/d ratio is the literal; d/d log pi is ratio times that.
    close(torch.autograd.grad(terms["policy"].sum(), logp)[0], [[[ratio * slope]]])


@pytest.mark.parametrize(
    ("value", "returns", "loss", "slope"), [(1, 0, 0.5, 1), (1, 2, 0.845, 0), (0.6, 2, 0.98, -1.4)]
)
def test_ppo_holds_the_critic_only_where_moving_would_gain(
    value: float, returns: float, loss: float, slope: float
) -> None:
    rollout = ARMS.rollout(ARMS.ref, torch.tensor([[0]]))
    rollout = replace(rollout, value_old=tensor([[[0.5]]]))
    now = Forward(rollout.logp_old, leaf(tensor([[[value]]])))
    targets = Targets(advantage=tensor([[[1]]]), returns=tensor([[[returns]]]))
    term = tuned("ppo", **PPO).loss(now, rollout, targets)["value"]
    close(term, [[[loss]]])
    assert now.value is not None
    close(torch.autograd.grad(term.sum(), now.value)[0], [[[slope]]])


@pytest.mark.parametrize(
    ("shift", "direction"),
    [
        (0.0, [0.293470, -0.025178, -0.268292]),
        (7.0, [1.195278, 0.642897, -1.838175]),
    ],
)
def test_ppo_without_a_critic_climbs_elsewhere_when_seven_is_added_to_the_reward(
    shift: float, direction: list[float]
) -> None:
    world = bandit((BANDIT.regularised(THETA) + shift).tolist(), beta=0.0)
    algorithm = tuned("ppo", **{**PPO, "beta": 0.0})
    close(ascent(algorithm, world, THETA, THETA_OLD, critic=tensor([[0]] * 3)), [direction])


def test_ppo_with_lambda_one_and_no_critic_is_reward_to_go_reinforce_on_the_tree() -> None:
    draws = TREE.draws(1)
    rollout = replace(TREE.rollout(TREE_THETA, draws), value_old=torch.zeros(4, 1, 2).double())
    algorithm = tuned("ppo", **{**PPO, "beta": TREE.beta, "lam": 1.0})
    targets, _ = algorithm.prepare(rollout, {})
    theta = leaf(TREE_THETA)
    logp, chance = TREE.logp(theta), TREE.probability(TREE_THETA)
    token = algorithm.loss(Forward(logp[draws], rollout.value_old), rollout, targets)["policy"]
    got = -torch.autograd.grad((chance * token.sum((1, 2))).sum(), theta)[0]

    spent = TREE.beta * (TREE.logp(TREE_THETA) - TREE.logp(TREE.ref))
    second = TREE.score - spent[:, 1]
    to_go = torch.stack([second - spent[:, 0], second], -1)
    logp = TREE.logp(theta)
    reinforce = torch.autograd.grad((chance * (to_go * logp).sum(-1)).sum(), theta)[0]
    close(got, reinforce.tolist(), EXACT)
    close(got, [[-0.231156, 0.231156], [0.178855, -0.178855], [-0.152442, 0.152442]])


# --- online DPO


def test_dpo_at_the_reference_costs_log_two_with_slope_half_beta() -> None:
    algorithm = tuned("dpo_online", beta=0.1, label="argmax", responses=2)
    rollout = ARMS.rollout(ARMS.ref, torch.tensor([[0, 1]]))
    logp = leaf(rollout.logp_old)
    targets, _ = algorithm.prepare(rollout, {})
    loss = algorithm.loss(Forward(logp, None), rollout, targets)["policy"]
    close(loss, [0.693147])
    close(torch.autograd.grad(loss.sum(), logp)[0], [[[-0.05], [0.05]]])


@pytest.mark.parametrize(
    ("label", "loss", "slope"), [(1.0, 0.668460, -0.048750), (0.9, 0.673460, -0.038750)]
)
def test_dpo_on_given_log_probabilities(label: float, loss: float, slope: float) -> None:
    rollout = replace(
        ARMS.rollout(ARMS.ref, torch.tensor([[0, 1]])), logp_ref=tensor([[[-11.5], [-14.0]]])
    )
    logp = leaf(tensor([[[-12.0], [-15.0]]]))
    algorithm = tuned("dpo_online", beta=0.1, responses=2)
    term = algorithm.loss(Forward(logp, None), rollout, Targets(label=tensor([[label]])))["policy"]
    close(term, [loss])
    close(torch.autograd.grad(term.sum(), logp)[0], [[[slope], [-slope]]])


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ("soft", [0.622459, 0.5, 0.268941]),
        ("argmax", [1, 1, 0]),
        # Coins .3 + .9 = .2 mod 1 < .62;  .3 + .4 = .7 > .5;  .9 + .95 = .85 > .27.
        ("bernoulli", [1, 0, 0]),
    ],
)
def test_dpo_labels_a_pair_by_rule(rule: str, labels: list[float]) -> None:
    rollout = replace(
        ARMS.rollout(ARMS.ref, torch.tensor([[0, 1], [0, 1], [0, 1]])),
        score=tensor([[1.5, 1.0], [1.0, 1.0], [0.0, 1.0]]),
        coin=tensor([[0.3, 0.9], [0.3, 0.4], [0.9, 0.95]]),
    )
    targets, _ = tuned("dpo_online", label=rule).prepare(rollout, {})
    assert targets.label is not None
    close(targets.label, [[p] for p in labels])
