"""ETPO: a consistent backup over tokens and turns, and a policy that goes where Q points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.algos.etpo import backed_up
from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.rollout import Forward
from tests.algos.cases import case, dialogue, judge
from tests.algos.discovery import oracle, shipped, tuned
from tests.algos.test_oracles import agree, numbers
from tests.algos.toys import ARMS, TREE, World, ascent, close, leaf, tensor

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

REF = tensor([0.2, 0.3, 0.5]).log()
Q = tensor([1, 0, 0.5])
TREE_THETA = tensor([[0.2, -0.1], [0.3, 0], [-0.5, 0.4]])


def etpo(**changes: Any) -> Any:
    """With the tree's beta."""
    return tuned(
        "etpo", **{"beta": TREE.beta, "lam": 0.0, "value_coef": 1.0, "huber": 10.0, **changes}
    )


def slope(logits: Tensor, q: Tensor) -> Tensor:
    """[3] gradient of the policy's term in the one state of a bandit, reference REF."""
    logits = leaf(logits)
    one = ARMS.rollout(ARMS.ref, torch.tensor([[0]]))
    now = Forward(
        one.logp_old,
        logps=logits.log_softmax(-1).view(1, 1, 1, 3),
        logps_ref=REF.view(1, 1, 1, 3),
        q=q.view(1, 1, 1, 3),
        q_taken=q[:1].view(1, 1, 1),
    )
    term = etpo().loss(now, one, Targets(returns=one.mask))["policy"]
    return torch.autograd.grad(term.sum(), logits)[0]


def soft_values(world: World, theta: Tensor, q: Tensor) -> Tensor:
    """[S] sum_a pi (Q - beta log ratio)."""
    logs = theta.log_softmax(-1)
    return (logs.exp() * (q - world.beta * (logs - world.ref.log_softmax(-1)))).sum(-1)


def backup(algorithm: Any, world: World, theta: Tensor, q: Tensor) -> Tensor:
    """[S,V] the targets the algorithm gives to every token in every state, Qbar = q."""
    draws = world.draws(1)
    rollout = world.rollout(theta, draws)
    values = soft_values(world, theta, q)[world.state][draws]
    targets, _ = algorithm.prepare(replace(rollout, value_old=values), {})
    table = q.clone()
    table[world.state, world.token] = targets.returns[:, 0]
    return table


# --- the policy


def test_policy_term_rests_at_the_reference_tilted_by_q() -> None:
    logits = REF
    for _ in range(300):
        logits = logits - slope(logits, Q)
    close(logits.softmax(-1), [0.471098, 0.095634, 0.433268])
    assert slope(REF, Q).abs().max() > 0.1


def test_policy_gradient_changes_with_q_but_not_with_its_level() -> None:
    """With equal weights for all tokens, as in the authors' code, Q would drop out."""
    before = slope(REF, Q)
    assert (slope(REF, Q.flip(0)) - before).abs().max() > 0.1
    close(slope(REF, Q + 5), before, EXACT)
    close(slope(REF, 0 * Q), [0, 0, 0], EXACT)


def test_policy_term_is_beta_kl_to_the_tilted_reference_up_to_a_constant() -> None:
    """L(pi) + beta log Z, for any pi."""
    beta, goal = TREE.beta, (REF + Q / TREE.beta).log_softmax(-1)
    log_z = torch.logsumexp(REF + Q / beta, -1)
    for seed in range(3):
        logs = torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        logs = logs.log_softmax(-1)
        one = ARMS.rollout(ARMS.ref, torch.tensor([[0]]))
        wide = {"logps": logs, "logps_ref": REF, "q": Q}
        now = Forward(
            one.logp_old, **{k: v.view(1, 1, 1, 3) for k, v in wide.items()}, q_taken=one.mask
        )
        term = etpo().loss(now, one, Targets(returns=one.mask))["policy"].sum()
        close(term + beta * log_z, float(beta * (logs.exp() * (logs - goal)).sum()), EXACT)


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_with_the_exact_soft_q_it_climbs_the_gradient_of_the_objective(world: World) -> None:
    theta = TREE_THETA if world is TREE else tensor([[0.3, -0.2, 0.1]])
    algorithm = etpo(beta=world.beta)
    close(ascent(algorithm, world, theta, theta), world.gradient(theta), EXACT)


def test_policy_and_q_share_no_gradient() -> None:
    one = case(3, sampling=Sampling(policy=1))
    algorithm = shipped("etpo")
    targets, _ = algorithm.prepare(one.rollout, {})
    terms = algorithm.loss(one.now, one.rollout, targets)
    leaves = [one.now.logps, one.now.q, one.now.q_taken]

    def reached(word: str) -> list[bool]:
        grads = torch.autograd.grad(terms[word].sum(), leaves, retain_graph=True, allow_unused=True)
        return [grad is not None and bool(grad.abs().max() > 1e-3) for grad in grads]

    assert reached("policy") == [True, False, False]
    assert reached("value") == [False, False, True]


# --- the backup


def test_token_backup_agrees_with_the_objective_of_whole_responses() -> None:
    q = torch.zeros(3, 2).double()
    for _ in range(2):
        q = backup(etpo(), TREE, TREE_THETA, q)
    root = soft_values(TREE, TREE_THETA, q)[0]
    close(root, 0.980995)
    close(root, float(TREE.objective(TREE_THETA)), EXACT)
    close(q, TREE.soft_q(TREE_THETA), EXACT)


def test_soft_value_iteration_finds_the_soft_values_and_the_optimum_of_the_tree() -> None:
    q = torch.zeros(3, 2).double()
    for _ in range(3):
        q = backup(etpo(), TREE, TREE.ref + q / TREE.beta, q)
    best = TREE.ref + q / TREE.beta
    close(soft_values(TREE, best, q), [1.521601, 0.849853, 1.894613])
    policy = [[0.156559, 0.843441], [0.945179, 0.054821], [0.012294, 0.987706]]
    close(best.softmax(-1), policy)


def test_q_and_policy_learned_together_reach_the_optimum() -> None:
    """Q starts at 0, its copy follows it at once, and both move by the algorithm's own gradients."""
    algorithm, theta, q = etpo(), TREE.ref, torch.zeros(3, 2).double()
    draws = TREE.draws(1)
    for _ in range(600):
        theta, q = leaf(theta), leaf(q)
        world = replace(TREE, q=q)
        values = soft_values(TREE, theta.detach(), q.detach())[TREE.state][draws]
        rollout = replace(TREE.rollout(theta.detach(), draws), value_old=values)
        targets, _ = algorithm.prepare(rollout, {})
        terms = algorithm.loss(world.now(theta, rollout, draws), rollout, targets)
        chances = TREE.probability(theta.detach())
        loss = sum((chances * term.sum((1, 2))).sum() for term in terms.values())
        d_theta, d_q = torch.autograd.grad(loss, [theta, q])  # type: ignore[arg-type]
        theta, q = (theta - d_theta).detach(), (q - d_q).detach()
    logp = TREE.logp(theta).sum(-1)
    assert float((logp.exp() * (logp - TREE.optimum().log())).sum()) < 1e-3


@pytest.mark.parametrize(
    ("error", "loss", "push"),
    # Below -delta the authors' code goes on with the square: 2 and -2.
    [(0.3, 0.045, 0.3), (-0.3, 0.045, -0.3), (2.0, 0.875, 0.5), (-2.0, 0.875, -0.5)],
)
def test_errors_beyond_delta_count_linearly_on_both_sides(
    error: float, loss: float, push: float
) -> None:
    one = ARMS.rollout(ARMS.ref, torch.tensor([[0]]))
    said = leaf(tensor([[[1.0 + error]]]))
    now = replace(ARMS.now(ARMS.ref, one, torch.tensor([[0]])), q_taken=said)
    term = etpo(huber=0.5, value_coef=2.0).loss(now, one, Targets(returns=one.mask))["value"]
    close(term, [[[2 * loss]]])
    close(torch.autograd.grad(term.sum(), said)[0], [[[2 * push]]])


# --- turns

MASK = tensor([1, 1, 0, 0, 1, 0, 1, 1, 0])
"""Three turns, of two, one and two tokens; then padding."""
PAID = tensor([0, -0.1, 0, 0, -0.1, 0, 0, 0.9, 0])
VALUE = tensor([7, 0.5, 99, 99, 0.4, 99, 0.6, 0.8, 99])
"""7 is read by nobody: nothing comes before the first token."""
SPENT = tensor([5, 0.2, 99, 99, -0.1, 99, 0.3, 0.4, 99])
"""Likewise 5."""


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_targets_by_hand_over_three_turns(gamma: float) -> None:
    wanted = [0.5, -0.1 + gamma * 0.4, 0, 0, -0.1 + gamma * 0.6, 0, 0.8, 0.9, 0]
    close(backed_up(PAID, VALUE, SPENT, MASK, gamma, 0.0), wanted, EXACT)


def test_targets_that_look_to_the_end_are_what_is_paid_less_the_kl_still_to_be_spent() -> None:
    ends = [0.9, 0.9, 0, 0, 0.9, 0, 0.9, 0.9, 0]
    costs = [-0.1 - 0.1, -0.1 - 0.1, 0, 0, -0.1, 0, 0, 0, 0]
    kl = [0.2 - 0.1 + 0.3 + 0.4, -0.1 + 0.3 + 0.4, 0, 0, 0.3 + 0.4, 0, 0.4, 0, 0]
    wanted = [e + c - k for e, c, k in zip(ends, costs, kl, strict=True)]
    close(backed_up(PAID, VALUE, SPENT, MASK, 1.0, 1.0), wanted, EXACT)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_looking_further_changes_no_target_on_average(lam: float) -> None:
    """On TREE, under the policy's own draws, y of the first token has the mean of its one-step y."""
    theta, draws = TREE.ref + tensor([[0.3, 0], [0, 0.5], [-0.4, 0]]), TREE.draws(1)
    values = TREE.values(theta)[draws]  # exact soft values of the policy
    rollout = replace(TREE.rollout(theta, draws), value_old=values)
    algorithm = etpo(gamma=1.0, lam=lam)
    targets, _ = algorithm.prepare(rollout, {})
    assert targets.returns is not None
    chance = TREE.probability(theta)
    for token in (0, 1):
        mine = TREE.token[:, 0] == token
        mean = (chance * targets.returns[:, 0, 0])[mine].sum() / chance[mine].sum()
        close(mean, TREE.values(theta)[mine][0, 1].item(), EXACT)


def test_a_reward_inside_a_turn_does_not_end_it() -> None:
    paid = tensor([0.3, -0.1, 0, 0, -0.1, 0, 0, 0.9, 0])
    close(backed_up(paid, VALUE, SPENT, MASK, 0.5, 0.0)[0], 0.3 + 0.5, EXACT)


def test_taking_the_other_side_out_changes_nothing_without_discount() -> None:
    one = dialogue(5).rollout
    assert one.reward is not None and one.value_old is not None
    for row in range(4):
        said = one.mask[row, 0] > 0
        four = (one.reward, one.value_old, one.logp_old, one.mask)
        whole = backed_up(*(x[row, 0] for x in four), gamma=1.0, lam=0.4)
        parts = (x[row, 0][said] for x in four)
        close(whole[said], backed_up(*parts, gamma=1.0, lam=0.4).tolist(), EXACT)
        assert whole[~said].abs().sum() == 0


def test_a_single_turn_is_a_task_that_pays_the_score_at_the_end() -> None:
    one = case(3, sampling=Sampling(policy=1)).rollout
    algorithm = shipped("etpo")
    assert one.score is not None
    paid = torch.zeros_like(one.mask)
    for p in range(4):
        paid[p, 0, int(one.mask[p, 0].sum()) - 1] = one.score[p, 0]
    task = replace(one, reward=paid, score=None)
    alone, paid_alike = (algorithm.prepare(x, {})[0].returns for x in (one, task))
    assert torch.equal(alone, paid_alike) and alone.abs().max() > 0.1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("gamma", [0.99, 0.5])
def test_the_oracle_agrees_on_dialogues(gamma: float, seed: int) -> None:
    algorithm, one = tuned("etpo", gamma=gamma), dialogue(seed)
    inner = one.rollout.mask[:, 0, 1:] - one.rollout.mask[:, 0, :-1]
    assert (inner > 0).any()
    agree(judge(algorithm, one), oracle("etpo").judge(algorithm, numbers(one)), one)


def test_what_the_other_side_says_is_silent() -> None:
    algorithm, one = shipped("etpo"), dialogue(2)
    before = judge(algorithm, one)
    noise = 3.7 * (1 - one.rollout.mask)
    assert one.rollout.value_old is not None and one.now.q_taken is not None
    loud = one.with_rollout(value_old=one.rollout.value_old + noise)
    loud = replace(loud, now=replace(one.now, q_taken=leaf(one.now.q_taken + noise)))
    after = judge(algorithm, loud)
    close(after.loss, float(before.loss), EXACT)
    for word, slopes in before.slopes.items():
        close(after.slopes[word], slopes.tolist(), EXACT)
    silent = one.rollout.mask == 0
    assert before.slopes["logps"][silent].abs().sum() == 0
    assert before.slopes["q_taken"][silent].abs().sum() == 0
