"""AIHF: where demonstrations and preferences lead together, and what is left when one is missing.

The bandit of the literals: pi_ref = (.2, .3, .5), beta = .7, demonstrations (.5, .3, .2), and pairs that
are labelled by Bradley-Terry with r = (1, 0, -1), each ordered pair counting 1/6.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.rollout import Forward
from tests.algos.cases import case, judge, judge_side
from tests.algos.discovery import shipped, tuned
from tests.algos.toys import BANDIT, THETA, TREE, World, ascent, close, leaf, tensor

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

DEMOS = tensor([0.5, 0.3, 0.2])
ARENA = World(
    state=torch.zeros(3, 1, dtype=torch.long),
    token=torch.arange(3).unsqueeze(-1),
    ref=tensor([[0.2, 0.3, 0.5]]).log(),
    score=tensor([1, 0, -1]),
    beta=0.7,
    demos=DEMOS,
)
PAIRS = torch.tensor(list(permutations(range(3), 2)))
"""[6,2] winner and loser."""
WEIGHTS = (ARENA.score[PAIRS[:, 0]] - ARENA.score[PAIRS[:, 1]]).sigmoid() / 6


def induced(reward: Tensor) -> Tensor:
    """[1,3] logits of the policy that is best for a reward [3]: the inner problem, solved."""
    return ARENA.ref + reward / ARENA.beta


def pair_loss(algorithm: Any, theta: Tensor, reward: Tensor) -> Tensor:
    """The side stream on the six ordered pairs."""
    rollout = ARENA.rollout(ARENA.ref, PAIRS, Sampling(dataset=2))
    now = replace(ARENA.now(theta, rollout, PAIRS), score=reward[PAIRS])
    return (WEIGHTS * algorithm.side_loss(now, rollout)["preference"]).sum()


def reward_slope(algorithm: Any, reward: Tensor) -> Tensor:
    """[3] gradient of all the reward model is taught, the policy being the best for it."""
    reward, theta = leaf(reward), induced(reward)
    draws = ARENA.draws(algorithm.sampling().responses)
    rollout = ARENA.rollout(theta, draws, algorithm.sampling())
    now = replace(ARENA.now(theta, rollout, draws), score=reward[draws])
    targets, _ = algorithm.prepare(rollout, {})
    chances = ARENA.chances(theta, draws, algorithm.sampling())
    main = (chances * algorithm.loss(now, rollout, targets)["demo"]).sum()
    return torch.autograd.grad(main + pair_loss(algorithm, theta, reward), reward)[0]


def learned(algorithm: Any, steps: int = 400, rate: float = 0.5) -> Tensor:
    """[3] the reward that gradient descent ends with, mean 0."""
    reward = torch.zeros(3, dtype=torch.float64)
    for _ in range(steps):
        reward = reward - rate * reward_slope(algorithm, reward)
    return reward - reward.mean()


def aihf(w: float, v: float, demo_loss: str = "linear") -> Any:
    """AIHF with two draws of the policy per prompt, to have few rows to sum over."""
    return tuned(
        "aihf",
        beta=ARENA.beta,
        demo_loss=demo_loss,
        demo_weight=w,
        preference_weight=v,
        responses=2,
    )


# --- with a reward model


def test_demonstrations_alone_bring_back_their_own_distribution() -> None:
    reward = learned(aihf(w=1.0, v=0.0))
    close(reward, [0.641404, 0, -0.641404])
    close(ARENA.probability(induced(reward)), DEMOS, EXACT)


@pytest.mark.parametrize(
    ("w", "reward", "policy", "steps", "rate"),
    [
        (0.0, [1, 0, -1], [0.665310, 0.239163, 0.095526], 400, 4.0),
        (1.0, [0.679265, 0.011196, -0.690461], [0.517902, 0.299127, 0.182971], 200, 0.5),
        (10.0, [0.645610, 0.001385, -0.646995], [0.502002, 0.299989, 0.198009], 200, 0.05),
    ],
)
def test_pairs_and_demonstrations_meet_where_theory_says(
    w: float, reward: list[float], policy: list[float], steps: int, rate: float
) -> None:
    got = learned(aihf(w=w, v=1.0), steps, rate)
    close(got, reward)
    close(ARENA.probability(induced(got)), policy)


def test_without_demonstrations_it_is_rlhf_with_the_true_reward() -> None:
    close(ARENA.probability(induced(learned(aihf(w=0.0, v=1.0), 400, 4.0))), ARENA.optimum(), 1e-6)


def test_only_the_ratio_of_the_two_weights_decides_where_they_meet() -> None:
    both, half = learned(aihf(w=2.0, v=2.0), 200, 0.25), learned(aihf(w=1.0, v=1.0), 200, 0.5)
    close(both, half, EXACT)


def test_bt_against_demonstrations_falls_short_of_their_distribution() -> None:
    """Its balance, sum over b of d_a pi_b s(r_b - r_a) = pi_a d_b s(r_a - r_b), solved apart."""
    reward = learned(aihf(w=1.0, v=0.0, demo_loss="bt"))
    close(reward, [0.377296, 0, -0.377296])
    close(ARENA.probability(induced(reward)), [0.366878, 0.321019, 0.312103])
    assert reward_slope(aihf(w=1.0, v=0.0, demo_loss="bt"), learned(aihf(1.0, 0.0)))[0] > 0.01


def test_policy_term_is_the_exact_gradient_whatever_the_demonstration() -> None:
    for demos in (DEMOS, tensor([0, 0, 1])):
        world = replace(BANDIT, demos=demos)
        algorithm = tuned("aihf", beta=BANDIT.beta, responses=2)
        close(ascent(algorithm, world, THETA, THETA), BANDIT.gradient(THETA), EXACT)
    algorithm = tuned("aihf", beta=TREE.beta, responses=2)
    theta = tensor([[0.2, -0.1], [0.3, 0], [-0.5, 0.4]])
    close(ascent(algorithm, TREE, theta, theta), TREE.gradient(theta), EXACT)


def test_policy_term_is_p3o_on_its_own_samples_and_still_there_without_demonstrations() -> None:
    """Leave-one-out is the mean over all pairs; on-policy nothing of P3O is clipped."""
    one = case(3, sampling=Sampling(policy=3, demo=1))
    now = replace(one.now, logp=leaf(one.rollout.logp_old))
    drawn = replace(one.rollout.take(torch.arange(4)), source=("policy",) * 3)
    pick: dict[str, Any] = {
        word: getattr(drawn, word)[:, :3]
        for word in ("mask", "logp_old", "logp_ref", "score", "value_old", "coin", "logp_guide")
    }
    alone = replace(one, rollout=replace(drawn, **pick), now=Forward(leaf(now.logp[:, :3])))
    joint = tuned("aihf", beta=0.3, demo_weight=0.0, responses=3)
    got = judge(joint, replace(one, now=now)).d_logp
    p3o = judge(tuned("p3o_v2", beta=0.3, responses=3), alone).d_logp
    close(got[:, :3], p3o, EXACT)
    assert got[:, 3].abs().max() == 0 and p3o.abs().max() > 0.01


def test_reward_model_and_policy_share_no_gradient() -> None:
    algorithm = shipped("aihf")
    one = case(3, sampling=algorithm.sampling())
    targets, _ = algorithm.prepare(one.rollout, {})
    terms = algorithm.loss(one.now, one.rollout, targets)
    logp, score = one.now.logp, one.now.score
    assert score is not None
    for term, own, other in (("policy", logp, score), ("demo", score, logp)):
        mine, foreign = torch.autograd.grad(
            terms[term].sum(), [own, other], retain_graph=True, allow_unused=True
        )
        assert mine.abs().max() > 1e-3 and foreign is None
    assert algorithm.trains_reward
    assert judge_side(algorithm, case(3, sampling=algorithm.side())).d_logp.abs().max() == 0


# --- without one


def direct_slope(algorithm: Any, theta: Tensor) -> Tensor:
    """[1,3] gradient of direct AIHF on the six pairs and all demonstrations."""
    theta, single = leaf(theta), ARENA.draws(1)
    rollout = ARENA.rollout(ARENA.ref, PAIRS, algorithm.sampling())
    pairs = algorithm.loss(ARENA.now(theta, rollout, PAIRS), rollout, Targets())["policy"]
    rollout = ARENA.rollout(ARENA.ref, single, algorithm.side())
    demo = algorithm.side_loss(ARENA.now(theta, rollout, single), rollout)["demo"]
    return torch.autograd.grad((WEIGHTS * pairs).sum() + (DEMOS * demo).sum(), theta)[0]


def self_play_slope(algorithm: Any, theta: Tensor) -> Tensor:
    """[1,3] gradient of self-play AIHF on its own samples, all demonstrations and the six pairs."""
    main = -ascent(algorithm, ARENA, theta, theta)
    theta = leaf(theta)
    side = pair_loss(algorithm, theta, torch.zeros(3).double())
    return main + torch.autograd.grad(side, theta)[0]


@pytest.mark.parametrize(
    ("w", "policy", "steps", "rate"),
    [
        (0.0, [0.665310, 0.239163, 0.095526], 400, 8.0),
        (1.0, [0.517902, 0.299127, 0.182971], 200, 1.0),
        (10.0, [0.502002, 0.299989, 0.198009], 200, 0.1),
    ],
)
def test_direct_form_has_the_optimum_of_the_two_levels(
    w: float, policy: list[float], steps: int, rate: float
) -> None:
    algorithm, theta = tuned("aihf_direct", beta=ARENA.beta, demo_weight=w), ARENA.ref
    for _ in range(steps):
        theta = theta - rate * direct_slope(algorithm, theta)
    close(ARENA.probability(theta), policy)


def test_direct_gradient_is_the_reward_models_gradient_through_the_policy_it_induces() -> None:
    """r = beta h, up to a constant: d loss / d h is beta times d loss / d r."""
    reward = tensor([0.3, -0.2, 0.5])
    outer = reward_slope(aihf(w=0.8, v=1.0), reward)
    direct = direct_slope(tuned("aihf_direct", beta=ARENA.beta, demo_weight=0.8), induced(reward))
    close(direct[0], ARENA.beta * outer, EXACT)


@pytest.mark.parametrize("name", ["aihf_direct", "aihf_selfplay"])
def test_pairs_are_dpo(name: str) -> None:
    """At (log pi, log pi_ref) = (-12, -11.5) and (-15, -14) with beta .1: z = .05."""
    algorithm = tuned(name, beta=0.1)
    rollout = ARENA.rollout(ARENA.ref, torch.tensor([[0, 1]]), Sampling(dataset=2))
    rollout = replace(rollout, logp_ref=tensor([[[-11.5], [-14.0]]]))
    now = Forward(leaf(tensor([[[-12.0], [-15.0]]])))
    if name == "aihf_direct":
        term = algorithm.loss(now, rollout, Targets())["policy"]
    else:
        term = algorithm.side_loss(now, rollout)["preference"]
    close(term, [0.668460])
    close(torch.autograd.grad(term.sum(), now.logp)[0], [[[-0.048750], [0.048750]]])


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_demonstrations_of_the_direct_form_are_maximum_likelihood(w: float) -> None:
    algorithm = tuned("aihf_direct", demo_weight=w)
    one = case(3, sampling=algorithm.side())
    close(judge_side(algorithm, one).d_logp, -w * one.rollout.mask / 4, EXACT)


def test_self_play_from_its_own_samples_is_the_direct_form_at_w_b_half() -> None:
    theta, w, b = tensor([[0.4, -0.3, 0.1]]), 0.9, 0.6
    play = tuned("aihf_selfplay", beta=ARENA.beta, play_beta=b, demo_weight=w)
    direct = tuned("aihf_direct", beta=ARENA.beta, demo_weight=w * b / 2)
    got = self_play_slope(play, theta)
    close(got, direct_slope(direct, theta), EXACT)
    assert got.abs().max() > 0.01


def test_self_play_without_pairs_ends_at_the_demonstrations_and_teaches_nothing_there() -> None:
    algorithm = tuned("aihf_selfplay", play_beta=1.0, demo_weight=1.0)
    theta = ARENA.ref
    for _ in range(200):
        theta = theta + 2.0 * ascent(algorithm, ARENA, theta, theta)
    close(ARENA.probability(theta), DEMOS, 1e-9)
    there = DEMOS.log().unsqueeze(0)
    close(ascent(algorithm, ARENA, there, there), [[0, 0, 0]], EXACT)


def test_self_play_is_anchored_at_the_sampler_and_not_at_the_reference() -> None:
    algorithm = shipped("aihf_selfplay")
    one = case(3, sampling=algorithm.sampling())
    before = judge(algorithm, one)
    assert one.rollout.logp_ref is not None
    assert torch.equal(
        judge(algorithm, one.with_rollout(logp_ref=one.rollout.logp_ref - 1)).d_logp, before.d_logp
    )
    at_start = judge(algorithm, replace(one, now=replace(one.now, logp=leaf(one.rollout.logp_old))))
    half = algorithm.demo_weight * algorithm.play_beta / 2
    demo = torch.tensor([source == "demo" for source in one.rollout.source]).double()
    wanted = half * (1 - 2 * demo).view(1, 2, 1) * one.rollout.mask / 4
    close(at_start.d_logp, wanted, EXACT)
