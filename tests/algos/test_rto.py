"""RTO: what the guide pays, where that leads, and PPO when it pays nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Model
from tests.algos.cases import case, judge
from tests.algos.discovery import shipped, tuned
from tests.algos.test_learning import learn
from tests.algos.toys import TREE, World, close, tensor

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

BEST = tensor([[0.156559, 0.843441], [0.945179, 0.054821], [0.012294, 0.987706]]).log()
"""[S,V] the optimum on the tree, to six decimals: what DPO would have made of its rewards."""
GUIDED = replace(TREE, guide=BEST)

PLAIN: dict[str, Any] = {
    "guide_clip": None,
    "reward_clip": None,
    "gamma": 1.0,
    # Without whitening and at lambda 1 a critic that knows nothing of the guide does no harm.
    "lam": 1.0,
    "whiten_advantage": False,
}


def dense(algorithm: Any, world: World) -> Tensor:
    """[N,T] what the guide pays for each token of each response."""
    draws = world.draws(1)
    rollout = world.rollout(world.ref, draws)
    targets, _ = algorithm.prepare(rollout, {})
    now = world.now(world.ref, rollout, draws)
    return algorithm.watch(now, rollout, targets)["guide_reward"].squeeze(1)  # type: ignore[no-any-return]


# --- rewards


def test_the_guide_pays_what_it_prefers_token_by_token() -> None:
    got = dense(tuned("rto", **{**PLAIN, "guide_coef": TREE.beta}), GUIDED)
    first, second = [-0.671748, 0.373013], [0.150147, -0.849853, -1.394613, 0.105387]
    close(got, [[first[i // 2], second[i]] for i in range(4)], 2e-5)


def test_what_the_optimum_pays_adds_up_to_the_reward_less_the_value_of_the_prompt() -> None:
    # The exact optimum, so that the identity is exact.
    root = torch.stack([TREE.optimum()[:2].sum(), TREE.optimum()[2:].sum()])
    exact = torch.cat([root.unsqueeze(0), TREE.optimum().view(2, 2) / root.unsqueeze(1)]).log()
    got = dense(tuned("rto", **{**PLAIN, "guide_coef": TREE.beta}), replace(TREE, guide=exact))
    start = TREE.beta * (TREE.probability(TREE.ref) * (TREE.score / TREE.beta).exp()).sum().log()
    close(start, 1.521601)
    close(got.sum(-1), TREE.score - start, EXACT)


def test_reward_of_two_tokens_by_hand() -> None:
    one = case(1, prompts=1, responses=1, tokens=2).rollout
    one = replace(
        one,
        logp_old=tensor([[[-1.0, -2.0]]]),
        logp_ref=tensor([[[-1.5, -1.8]]]),
        logp_guide=tensor([[[-0.2, -2.3]]]),
        score=tensor([[20.0]]),
        value_old=torch.zeros(1, 1, 2, dtype=torch.float64),
    )
    settings = {"guide_coef": 0.5, "beta": 0.1, "score_coef": 2.0, "gamma": 0.0}
    for clips, expected in (
        # .5 * 1.3 - .1 * .5;  .5 * -.5 - .1 * -.2 + 2 * 20
        ((None, None), [0.60, 39.77]),
        # the first log-ratio is cut to 1; the score to 10
        ((1.0, 10.0), [0.45, 19.77]),
        ((0.25, 10.0), [0.075, 19.895]),
    ):
        guide_clip, reward_clip = clips
        algorithm = tuned(
            "rto", **{**PLAIN, **settings, "guide_clip": guide_clip, "reward_clip": reward_clip}
        )
        targets, _ = algorithm.prepare(one, {})
        assert targets.returns is not None
        close(targets.returns, [[expected]], EXACT)


def test_the_guide_pays_at_most_a_twentieth_per_token_as_shipped() -> None:
    algorithm = shipped("rto")
    assert (algorithm.guide_coef, algorithm.guide_clip) == (0.05, 1.0)
    one = case(1, tokens=9)
    assert one.rollout.logp_guide is not None
    far = one.with_rollout(logp_guide=one.rollout.logp_guide * 5)
    watched = judge(algorithm, far).watch["guide_reward"] * one.rollout.mask
    close(watched.abs().max(), 0.05, EXACT)
    length = one.rollout.mask.sum(-1)
    assert (watched.sum(-1).abs() <= 0.05 * length + EXACT).all()
    unbound = tuned("rto", guide_clip=None)
    assert judge(unbound, far).watch["guide_reward"].abs().max() > 0.1


# --- where it leads


@pytest.mark.parametrize(
    ("guide_coef", "score_coef", "optimum"),
    [
        (0.5, 0.0, [0.147976, 0.008583, 0.010369, 0.833072]),
        (0.25, 1.0, [0.061098, 0.001304, 0.002597, 0.935001]),
        (0.0, 1.0, [0.147976, 0.008583, 0.010369, 0.833072]),
    ],
)
def test_learns_the_reference_tilted_by_guide_and_score(
    guide_coef: float, score_coef: float, optimum: list[float]
) -> None:
    settings = {"guide_coef": guide_coef, "beta": 0.5, "score_coef": score_coef}
    algorithm = tuned("rto", **{**PLAIN, **settings})
    close(GUIDED.probability(learn(algorithm, GUIDED, steps=800, rate=8.0)), optimum, 1e-5)


def test_clipping_what_the_guide_prefers_moves_the_optimum() -> None:
    settings = {"guide_coef": 0.5, "beta": 0.5, "score_coef": 0.0, "guide_clip": 1.0}
    algorithm = tuned("rto", **{**PLAIN, **settings})
    got = GUIDED.probability(learn(algorithm, GUIDED, steps=800, rate=8.0))
    # Log-ratios -1.343, .746; .300, -1.700, -2.789, .211 are cut to -1, .746; .300, -1, -1, .211.
    tilt = tensor([-0.699705, -2.0, -0.253974, 0.956800])
    expected = (TREE.logp(TREE.ref).sum(-1) + tilt).softmax(-1)
    close(got, expected, 1e-5)
    assert (got - TREE.optimum()).abs().max() > 0.05


# --- identities

SHARED = ("gamma", "lam", "whiten_advantage", "clip", "clip_value", "value_coef", "beta")


@pytest.mark.parametrize(
    "changes", [{}, {"whiten_advantage": False, "gamma": 0.9, "lam": 0.7, "clip": 0.1, "beta": 0.4}]
)
@pytest.mark.parametrize("reward_clip", [None, 0.5])
def test_with_a_guide_that_pays_nothing_it_is_ppo_to_the_bit(
    changes: dict[str, Any], reward_clip: float | None
) -> None:
    rto = tuned("rto", guide_coef=0.0, score_coef=1.0, reward_clip=reward_clip, **changes)
    ppo = tuned("ppo", reward_clip=reward_clip, **{word: getattr(rto, word) for word in SHARED})
    for seed, spread in ((1, 0.05), (2, 0.3), (3, 1.5)):
        one = case(seed, responses=1, spread=spread)
        mine, theirs = judge(rto, one), judge(ppo, one)
        assert torch.equal(mine.loss, theirs.loss)
        for word in theirs.slopes:
            assert torch.equal(mine.slopes[word], theirs.slopes[word])
        for word in theirs.watch:
            assert torch.equal(mine.watch[word], theirs.watch[word])
        paying = judge(replace(rto, guide_coef=0.05), one)
        assert not torch.equal(paying.d_logp, theirs.d_logp)


def test_the_guide_is_a_run_of_its_own_with_an_algorithm_of_its_own() -> None:
    algorithm = shipped("rto")
    assert Model.GUIDE in algorithm.needs
    assert algorithm.guide.algo["_target_"].startswith("rlhf_cli.algos.dpo")
    assert {"update", "optim", "beta"} <= algorithm.guide.algo.keys()
