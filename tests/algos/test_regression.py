"""Squared regressions: where each one comes to rest, and where its cousins do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling, Targets
from tests.algos.cases import case, judge
from tests.algos.discovery import tuned
from tests.algos.toys import (
    ARMS,
    THETA,
    THETA_OLD,
    TREE,
    World,
    ascent,
    close,
    enumerated,
    leaf,
    tensor,
)

EXACT = 1e-11
"""Two float64 routes to one number."""

FIRST, SECOND = tensor([0.1, 0.2, 0.7]), tensor([0.05, 0.05, 0.9])
"""Who draws the two responses of a pair in the bandit experiment of the CoPG paper (section 5)."""

Law = tuple[Tensor, Tensor]
Slope = Callable[[Tensor, Law], Tensor]
"""[1,3] the direction in which a method moves the logits, given the laws of the two responses."""


def climbed(slope: Slope, law: Law, steps: int = 1500, rate: float = 0.25) -> Tensor:
    """[3] the policy after many small steps from the reference."""
    theta = ARMS.ref.clone()
    for _ in range(steps):
        theta = theta + rate * slope(theta, law)
    return ARMS.probability(theta)


def regret(policy: Tensor) -> float:
    """J(pi*) - J(pi) on the bandit."""
    best, got = (ARMS.objective(pi.log().unsqueeze(0)) for pi in (ARMS.optimum(), policy))
    return float(best - got)


def copg(theta: Tensor, law: Law) -> Tensor:
    """The page itself, the two responses of a pair each from a law of its own."""
    theta, draws = leaf(theta), ARMS.draws(2)
    rollout = ARMS.rollout(ARMS.ref, draws)
    term = tuned("copg", beta=ARMS.beta).loss(ARMS.now(theta, rollout, draws), rollout, Targets())[
        "policy"
    ]
    chance = law[0][draws[:, 0]] * law[1][draws[:, 1]]
    return -torch.autograd.grad((chance * term).sum(), theta)[0]


def ipo(theta: Tensor, law: Law) -> Tensor:
    """(h_w - h_l - 1/(2 beta))^2 on Bradley-Terry preferences between the two responses."""
    theta, draws = leaf(theta), ARMS.draws(2)
    h1, h2 = (ARMS.logp(theta) - ARMS.logp(ARMS.ref)).sum(-1)[draws].unbind(-1)
    r1, r2 = ARMS.score[draws].unbind(-1)
    wins, wanted = (r1 - r2).sigmoid(), 1 / (2 * ARMS.beta)
    term = wins * (h1 - h2 - wanted) ** 2 + (1 - wins) * (h2 - h1 - wanted) ** 2
    chance = law[0][draws[:, 0]] * law[1][draws[:, 1]]
    return -torch.autograd.grad((chance * term).sum(), theta)[0]


def naive(baseline: str) -> Slope:
    """(R_beta - b) grad log pi on responses of others, as if they were the policy's own."""

    def slope(theta: Tensor, law: Law) -> Tensor:
        theta = leaf(theta)
        policy, reward = ARMS.probability(theta), ARMS.regularised(theta)
        level = {
            "none": torch.zeros(()),
            "reward": (policy * ARMS.score).sum(),
            "regularised": (policy * reward).sum(),
        }[baseline]
        advantage = (reward - level).detach()
        logp = ARMS.logp(theta).sum(-1)
        return torch.autograd.grad(((law[0] + law[1]) * advantage * logp).sum(), theta)[0]

    return slope


# --- CoPG


@pytest.mark.parametrize(
    ("slope", "policy", "lost"),
    [
        (copg, [0.705385, 0.259496, 0.035119], 0.0),
        (ipo, [0.4242, 0.3527, 0.2231], 0.1525),
        (naive("none"), [0.194, 0.250, 0.556], 0.638),
        (naive("reward"), [0.8115, 0.1675, 0.0209], 0.0148),
        (naive("regularised"), [0.705385, 0.259496, 0.035119], 0.0),
    ],
    ids=["copg", "ipo", "pg", "pg-reward-baseline", "pg-regularised-baseline"],
)
def test_on_pairs_drawn_by_two_other_policies_each_method_rests_here(
    slope: Slope, policy: list[float], lost: float
) -> None:
    found = climbed(slope, (FIRST, SECOND))
    rounded = 6e-7 if lost == 0 else 3e-4  # the others are literals of three or four digits
    close(found, policy, rounded)
    close(regret(found), lost, rounded)


@pytest.mark.parametrize(
    ("slope", "lost"),
    [(copg, 0.0129), (ipo, 0.152), (naive("none"), 0.635), (naive("reward"), 0.0275)],
    ids=["copg", "ipo", "pg", "pg-reward-baseline"],
)
def test_the_papers_budget_of_2000_adam_steps_ends_before_any_of_them_rests(
    slope: Slope, lost: float
) -> None:
    theta = leaf(ARMS.ref)
    adam = torch.optim.Adam([theta], lr=1e-3)
    for _ in range(2000):
        theta.grad = -slope(theta.detach(), (FIRST, SECOND))
        adam.step()
    # The literals are means over five seeds of 10,000 sampled pairs; here each pair has its weight.
    close(regret(ARMS.probability(theta.detach())), lost, 3e-3)


def test_copg_learns_from_one_other_policy_and_runs_away_once_its_reward_is_frozen() -> None:
    law = tensor([0.1, 0.2, 0.7])
    close(climbed(copg, (law, law)), [0.705385, 0.259496, 0.035119])
    # R_beta of a rollout drawn at the reference is r: a slope that never changes.
    pull = law * (ARMS.score - (law * ARMS.score).sum())
    close(ARMS.probability(164 * pull.unsqueeze(0)), [0.079, 0.921, 0], 6e-4)
    close(ARMS.probability(1000 * pull.unsqueeze(0)), [0, 1, 0], 1e-6)


def copg_pair(score: list[float]) -> Tensor:
    """[3] gradient of the pair's objective at a policy of the literals, arms 1 and 3."""
    world = replace(ARMS, score=tensor(score))
    theta, draws = leaf(tensor([[0.3, -0.2, 0.1]])), torch.tensor([[0, 2]])
    rollout = world.rollout(world.ref, draws)
    terms = tuned("copg", beta=0.5).loss(world.now(theta, rollout, draws), rollout, Targets())
    return -torch.autograd.grad(terms["policy"].sum(), theta)[0][0]


def test_copg_pushes_a_pair_apart_by_its_difference_in_regularised_reward() -> None:
    close(copg_pair([2.5, 2.0, 1.0]), [1.4, 0, -1.4])


def test_copg_is_ipo_where_the_winner_gets_a_quarter_and_the_loser_minus_a_quarter() -> None:
    # d/d theta of (1/2 - beta (h1 - h3))^2 with beta = 0.5 and theta1 - theta3 = 0.2.
    close(-2 * 0.5 * copg_pair([0.25, 0.0, -0.25]), [-0.4, 0, 0.4])


@pytest.mark.parametrize("responses", [2, 3, 4])
@pytest.mark.parametrize("theta", [THETA, THETA_OLD], ids=["one", "another"])
def test_copg_on_its_own_samples_is_twice_the_policy_gradient(
    responses: int, theta: Tensor
) -> None:
    direction = ascent(tuned("copg", beta=ARMS.beta, responses=responses), ARMS, theta, theta)
    close(direction, 2 * ARMS.gradient(theta), EXACT)


@pytest.mark.parametrize("responses", [2, 5])
def test_copg_is_leave_one_out_with_the_reward_of_now(responses: int) -> None:
    one = case(1, responses=responses)
    algorithm = tuned("copg", beta=0.3, responses=responses)
    assert one.rollout.score is not None and one.rollout.logp_ref is not None
    kl = ((one.now.logp - one.rollout.logp_ref) * one.rollout.mask).sum(-1).detach()
    gain = one.rollout.score - 0.3 * kl
    others = (gain.sum(1, keepdim=True) - gain) / (responses - 1)
    push = ((gain - others) / len(gain)).unsqueeze(-1) * one.rollout.mask
    close(responses / 2 * judge(algorithm, one).d_logp, -push, EXACT)


def test_copg_does_not_ask_who_drew_the_responses() -> None:
    one = case(1)
    before = judge(tuned("copg"), one)
    after = judge(tuned("copg"), one.with_rollout(logp_old=one.rollout.logp_old - 1.0))
    assert torch.equal(before.loss, after.loss) and torch.equal(before.d_logp, after.d_logp)


@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2"])
def test_the_first_step_of_p3o_is_half_that_of_copg(name: str) -> None:
    one = case(1, spread=0.0)
    half = judge(tuned(name, beta=0.3), one).d_logp
    close(2 * half, judge(tuned("copg", beta=0.3), one).d_logp, EXACT)


@pytest.mark.parametrize("name", ["copg", "copg_offline"])
def test_regularised_rewards_vary_everywhere_but_at_the_optimum(name: str) -> None:
    algorithm = tuned(name, beta=ARMS.beta)
    draws = ARMS.draws(2)
    for theta, settled in ((ARMS.optimum().log().unsqueeze(0), True), (ARMS.ref, False)):
        rollout = ARMS.rollout(ARMS.ref, draws, algorithm.sampling())
        now = ARMS.now(theta, rollout, draws)
        spread = algorithm.watch(now, rollout, Targets())["regularised_variance"]
        loss = algorithm.loss(now, rollout, Targets())["policy"]
        close(loss, spread / ARMS.beta, EXACT)
        assert spread.max() < EXACT if settled else spread.max() > 1.0


def test_copg_reads_pairs_or_draws_and_keeps_as_many_rollouts_as_it_is_told() -> None:
    assert tuned("copg", responses=3).sampling() == Sampling(policy=3)
    assert tuned("copg_offline").sampling() == Sampling(dataset=2)
    assert tuned("copg", replay=5).replayed() == 5
    with pytest.raises(ValidationError, match="be 2, the responses of a preference pair"):
        tuned("copg_offline", responses=3)


# --- REBEL


def after_a_round(world: World, old: Tensor, eta: float) -> Tensor:
    """[1,3] logits of pi_old exp(eta R)."""
    return old.log_softmax(-1) + eta * world.regularised(old)


@pytest.mark.parametrize("eta", [0.3, 1.0, 3.0])
def test_rebel_has_nothing_left_to_do_after_a_mirror_descent_step(eta: float) -> None:
    algorithm, draws = tuned("rebel", beta=ARMS.beta, eta=eta), ARMS.draws(2)
    rollout = ARMS.rollout(THETA, draws)
    best = after_a_round(ARMS, THETA, eta)
    there, here = (
        algorithm.loss(ARMS.now(theta, rollout, draws), rollout, Targets())["policy"]
        for theta in (best, THETA)
    )
    close(there, torch.zeros(9), EXACT)
    assert here.max() > 0.1 * eta**2
    # log pi - log pi* is defined up to a constant: differences between arms shrink by 1 - eta beta.
    before, after = (
        (logits - ARMS.optimum().log()).diff(dim=-1) for logits in (THETA.log_softmax(-1), best)
    )
    close(after, (1 - eta * ARMS.beta) * before, EXACT)


@pytest.mark.parametrize(("eta", "arrives"), [(1.0, True), (3.5, True), (4.5, False)])
def test_rebel_round_after_round_arrives_while_eta_beta_is_below_two(
    eta: float, arrives: bool
) -> None:
    theta = THETA
    for _ in range(100):
        theta = after_a_round(ARMS, theta, eta)
    gap = float((ARMS.probability(theta) - ARMS.optimum()).abs().max())
    assert gap < 1e-5 if arrives else gap > 0.1


def test_rebel_without_a_kl_in_the_reward_runs_to_the_best_arm() -> None:
    theta = ARMS.ref.clone()
    for _ in range(300):
        theta = theta + ascent(tuned("rebel", beta=0.0, eta=1.0), ARMS, theta, theta)
    assert ARMS.probability(theta)[0] > 0.99 > ARMS.optimum()[0] + 0.2


def test_rebel_anchored_at_the_reference_is_copg_scaled_by_two_over_beta() -> None:
    one = case(2)
    anchored = one.with_rollout(logp_old=one.rollout.logp_ref)
    # There the KL of the rollout is 0, whatever its coefficient.
    for beta in (0.0, 0.7):
        rebel = judge(tuned("rebel", beta=beta, eta=1 / 0.4), anchored)
        close(rebel.d_logp, 2 / 0.4 * judge(tuned("copg", beta=0.4), one).d_logp, EXACT)


def test_rebel_on_its_own_samples_is_four_eta_times_the_policy_gradient() -> None:
    algorithm = tuned("rebel", beta=ARMS.beta, eta=0.7)
    close(ascent(algorithm, ARMS, THETA, THETA), 4 * 0.7 * ARMS.gradient(THETA), EXACT)


# --- APA and AWR

PLAIN = {
    "value_coef": 0.0,
    "gamma": 1.0,
    "lam": 1.0,
    "normalize_adv": False,
    "subtract_log_z": False,
}
"""Advantages that are the score less the critic's value, nothing else."""
INITIAL = tensor([[0.5, 0.3, 0.2]]).log()
OTHER = tensor([[0.8, 0.1, 0.1]]).log()
GAINS = [0.1, 0.0, -0.1]
"""Under the initial policy exp(A / 0.1) averages 1.733."""


def advantaged(gains: Tensor | list[float]) -> World:
    """A bandit whose advantages are given: scores, where the critic says 0."""
    return replace(ARMS, ref=INITIAL, score=tensor(gains))


def minimised(name: str, world: World, old: Tensor, beta: float) -> tuple[Tensor, float]:
    """[3] the policy with the least expected loss on responses of `old`, and that loss."""
    algorithm, theta = tuned(name, **PLAIN, beta=beta), leaf(world.ref)
    search = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def expected() -> Tensor:
        search.zero_grad()
        loss = enumerated(algorithm, world, theta, old, critic=torch.zeros(3, 1).double())
        loss.backward()
        return loss

    search.step(expected)
    return world.probability(theta.detach()), float(expected().detach())


@pytest.mark.parametrize(
    ("name", "old", "policy"),
    [
        ("apa", INITIAL, [0.7186, 0.2175, 0.0639]),
        ("apa", OTHER, [0.8027, 0.1422, 0.0551]),
        ("awr", OTHER, [0.9408, 0.0433, 0.0159]),
    ],
    ids=["apa-initial", "apa-other", "awr-other"],
)
def test_where_z_is_not_one_the_minimiser_depends_on_who_drew_and_misses_the_target(
    name: str, old: Tensor, policy: list[float]
) -> None:
    world = advantaged(GAINS)
    target = (INITIAL[0] + world.score / 0.1).softmax(-1)
    close(target, [0.7844, 0.1731, 0.0425], 6e-5)
    found, loss = minimised(name, world, old, beta=0.1)
    close(found, policy, 6e-5)
    assert name == "awr" or loss > 0.1
    assert (found - target).abs().max() > 0.01


def test_awr_fits_the_law_that_drew_times_the_exponential() -> None:
    world = advantaged(GAINS)
    found, _ = minimised("awr", world, OTHER, beta=0.1)
    close(found, (OTHER[0] + world.score / 0.1).softmax(-1))
    elsewhere, _ = minimised("awr", replace(world, ref=OTHER), OTHER, beta=0.1)
    close(elsewhere, found)


@pytest.mark.parametrize("old", [INITIAL, OTHER, THETA], ids=["initial", "other", "third"])
@pytest.mark.parametrize("policy", [[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]], ids=str)
def test_apa_where_z_is_one_has_the_target_alone_as_its_minimiser_whoever_drew(
    policy: list[float], old: Tensor
) -> None:
    world = advantaged(0.1 * (tensor([policy]).log() - INITIAL)[0])
    found, loss = minimised("apa", world, old, beta=0.1)
    close(found, policy)
    close(loss, 0.0, EXACT)


def test_apa_with_a_dear_kl_stays_at_the_reference() -> None:
    found, _ = minimised("apa", advantaged(GAINS), OTHER, beta=1e7)
    close(found, [0.5, 0.3, 0.2])


def test_apa_less_log_z_hits_the_target_where_the_reference_drew() -> None:
    algorithm = tuned("apa", **{**PLAIN, "subtract_log_z": True}, beta=0.1)
    world = advantaged(GAINS)
    draws = torch.tensor([[0]] * 5 + [[1]] * 3 + [[2]] * 2)  # as often as the reference would
    rollout = world.rollout(INITIAL, draws)
    rollout = replace(rollout, value_old=torch.zeros(10, 1, 1).double())
    targets, _ = algorithm.prepare(rollout, {})
    target = (INITIAL + world.score / 0.1).log_softmax(-1)
    close(algorithm.loss(world.now(target, rollout, draws), rollout, targets)["policy"].sum(), 0.0)
    assert targets.advantage is not None
    close(targets.advantage[0, 0, 0], 0.1 - 0.1 * tensor(1.733).log(), 6e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["apa", "awr"])
def test_advantages_see_response_tokens_only(name: str, normalize: bool) -> None:
    one = case(3)
    algorithm = tuned(name, normalize_adv=normalize, subtract_log_z=True, beta=0.7)
    bare, wide = (
        algorithm.prepare(each.rollout, {})[0].advantage
        for each in (one, one.with_columns(lambda x: x - 5.1))
    )
    close(wide[..., :5], bare, EXACT)
    assert wide[..., 5:].abs().max() == 0 and (bare * (1 - one.rollout.mask)).abs().max() == 0
    kept = one.rollout.mask.bool()
    close((bare[kept] / 0.7).exp().mean(), 1.0, EXACT)


def rested(name: str, world: World, steps: int, rate: float) -> Tensor:
    """[S,V] logits after learning with an exact critic of the score, sampling afresh each step."""
    theta = world.ref.clone()
    for _ in range(steps):
        critic = replace(world, beta=0.0).values(theta)
        direction = ascent(tuned(name, **PLAIN, beta=world.beta), world, theta, theta, critic)
        theta = theta + rate * direction
    return theta


def test_apa_sampling_afresh_has_the_optimum_of_a_bandit() -> None:
    # Sampling from the policy itself, what is missing in Z is one constant for all arms.
    close(ARMS.probability(rested("apa", ARMS, 400, 0.3)), ARMS.optimum())


def test_apa_on_the_tree_is_blind_to_the_kl_still_to_be_paid() -> None:
    policy = rested("apa", TREE, 800, 1.0).softmax(-1)
    close(policy[1:], [[0.945179, 0.054821], [0.012294, 0.987706]], 1e-6)
    # The first token is worth the score it leads to, not the score less beta times the KL.
    worth = tensor([0.945179 * 1, 0.012294 * 0.5 + 0.987706 * 2])
    close(policy[0], (TREE.ref[0] + worth / TREE.beta).softmax(-1), 1e-6)
    assert abs(policy[0, 0] - 0.156559) > 1e-3


def test_awr_sampling_afresh_leaves_the_reference_for_the_best_arm() -> None:
    policy = ARMS.probability(rested("awr", ARMS, 300, 0.5))
    assert policy[0] > 0.95 > ARMS.optimum()[0] + 0.2
