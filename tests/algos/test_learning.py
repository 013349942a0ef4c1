"""Where each algorithm goes: to the closed-form optimum, and along the gradients theory names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.rollout import Forward
from tests.algos.cases import case, judge, twins
from tests.algos.discovery import NAMES, oracle, tuned
from tests.algos.toys import ARMS, BANDIT, THETA, TREE, World, ascent, leaf, tensor

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

every = pytest.mark.parametrize("name", NAMES)


def as_derived(name: str) -> dict[str, Any] | None:
    """Settings under which the closed form is the algorithm's own optimum; None if it has another."""
    return getattr(oracle(name), "LEARNS", {}).get(name, {})


LEARNING = [name for name in NAMES if as_derived(name) is not None]


def learn(algorithm: Any, world: World, steps: int, rate: float = 2.0) -> Tensor:
    """[S,V] logits after gradient ascent from the reference, sampling afresh before each step."""
    theta = world.ref.clone()
    for _ in range(steps):
        theta = theta + rate * ascent(algorithm, world, theta, theta)
    return theta


def distance(world: World, theta: Tensor) -> float:
    """KL(pi || pi*) in nats."""
    logp = world.logp(theta).sum(-1)
    return float((logp.exp() * (logp - world.optimum().log())).sum())


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_learns_pi_ref_exp_r_over_beta(name: str, world: World) -> None:
    algorithm = tuned(name, **{"beta": world.beta, **(as_derived(name) or {})})
    assert distance(world, world.ref) > 0.1
    assert distance(world, learn(algorithm, world, steps=500)) < 1e-3


def test_dpo_with_argmax_labels_runs_away_from_the_optimum() -> None:
    algorithm = tuned("dpo_online", beta=ARMS.beta, label="argmax")
    early, late = (learn(algorithm, ARMS, steps) for steps in (300, 900))
    assert distance(ARMS, late) > distance(ARMS, early) > 0.1
    best = ARMS.probability(late)[0]
    assert best > ARMS.probability(early)[0] > ARMS.optimum()[0] + 0.1
    assert best > 0.98


# --- identities

P3O = ["p3o_v1", "p3o_v2"]


@pytest.mark.parametrize("name", P3O)
@pytest.mark.parametrize("clip", [1e-6, 0.2, 5.0])
def test_p3o_on_its_own_samples_is_the_pairwise_policy_gradient(name: str, clip: float) -> None:
    algorithm = tuned(name, beta=0.1, clip=clip)
    draws = BANDIT.draws(2)
    rollout, reward = BANDIT.rollout(THETA, draws), BANDIT.regularised(THETA)
    for row in range(len(draws)):
        theta = leaf(THETA)
        picked = torch.tensor([row])
        now = Forward(BANDIT.logp(theta)[draws][picked], None)
        targets, _ = algorithm.prepare(rollout, {})
        loss = algorithm.loss(now, rollout.take(picked), targets)["policy"].sum()
        a, b = draws[row]
        apart = BANDIT.logp(theta)[a, 0] - BANDIT.logp(theta)[b, 0]
        pairwise = 0.5 * (reward[a] - reward[b]) * apart
        torch.testing.assert_close(
            -torch.autograd.grad(loss, theta)[0],
            torch.autograd.grad(pairwise, theta)[0],
            atol=EXACT,
            rtol=EXACT,
        )


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_p3o_v1_and_v2_have_one_gradient_when_nothing_is_clipped(spread: float) -> None:
    one = case(2, spread=spread)
    v1, v2 = (judge(tuned(name, clip=1e6, clamp=1e6), one) for name in P3O)
    torch.testing.assert_close(v1.d_logp, v2.d_logp, atol=EXACT, rtol=0)
    v1, v2 = (judge(tuned(name, clip=0.1), one) for name in P3O)
    assert (v1.d_logp - v2.d_logp).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2", "dpo_online"])
def test_swapping_the_two_responses_swaps_the_gradient_and_nothing_else(name: str) -> None:
    algorithm = tuned(name, **(as_derived(name) or {}))
    for one in (case(1), case(2, spread=1.5), twins(4)):
        before, after = judge(algorithm, one), judge(algorithm, one.mapped(lambda x: x.flip(1)))
        torch.testing.assert_close(after.loss, before.loss, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(after.d_logp.flip(1), before.d_logp, atol=EXACT, rtol=EXACT)


@every
def test_one_response_drawn_over_and_over_teaches_nothing_to_an_algorithm_that_couples_the_group(
    name: str,
) -> None:
    algorithm = tuned(name, **(as_derived(name) or {}))
    sampling = algorithm.sampling()
    draws = torch.ones(1, sampling.responses, dtype=torch.long)
    rollout = BANDIT.rollout(THETA, draws, sampling)
    theta = leaf(THETA + tensor([[0.05, 0.1, 0.0]]))
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(BANDIT.now(theta, rollout, draws), rollout, targets)
    size = float(torch.autograd.grad(sum(t.sum() for t in terms.values()), theta)[0].abs().max())
    alone = name in getattr(oracle(name), "TEACHES_ALONE", ())
    assert size > 1e-3 if alone or not algorithm.couples_group else size <= EXACT
