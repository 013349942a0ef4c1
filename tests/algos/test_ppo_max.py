"""What PPO's options do, in numbers: the tricks of Zheng et al. 2023, one by one, and what they cost."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling, State, Targets
from rlhf_cli.core.rollout import Forward, Rollout
from tests.algos.cases import case, judge, judge_side
from tests.algos.discovery import shipped, tuned
from tests.algos.test_learning import distance, learn
from tests.algos.toys import (
    ARMS,
    BANDIT,
    THETA,
    THETA_OLD,
    TREE,
    ascent,
    close,
    leaf,
    tensor,
)

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

PLAIN: dict[str, Any] = {
    "beta": 0.0,
    "kl_target": None,
    "reward_scale": "none",
    "reward_clip": None,
    "whiten_reward": False,
    "gamma": 1.0,
    "lam": 1.0,
    "whiten_advantage": False,
    "advantage_clip": None,
    "clip": None,
    "ratio_to": "old",
    "clip_value": None,
    "value_coef": 1.0,
    "entropy_coef": 0.0,
    "entropy_target": None,
    "ptx_coef": 0.0,
    "critic_rollouts": 0,
}
"""Everything off."""


def ppo(**changes: Any) -> Any:
    """PPO with everything off but the changes."""
    return tuned("ppo", **{**PLAIN, **changes})


def responses(score: Any, over_ref: Any = 0.0, value: Any = 0.0) -> Rollout:
    """One response per prompt: scores [P], log pi_old - log pi_ref and V_old as [P,T] or one number."""
    score = tensor(score)
    shape = (
        len(score),
        1,
        max(tensor(x).shape[-1] if tensor(x).dim() else 1 for x in (over_ref, value)),
    )
    full = [
        tensor(x).view(shape) if tensor(x).dim() else tensor(x).expand(shape)
        for x in (over_ref, value)
    ]
    return Rollout(
        tokens=torch.zeros(len(score), 1, 0),
        attention=torch.zeros(len(score), 1, 0),
        mask=torch.ones(shape, dtype=torch.float64),
        logp_old=full[0] - 9,
        logp_ref=torch.full(shape, -9.0, dtype=torch.float64),
        score=score.unsqueeze(-1),
        value_old=full[1],
        coin=torch.zeros(len(score), 1, dtype=torch.float64),
        source=Sampling(policy=1).sources,
    )


def paid(algorithm: Any, rollout: Rollout, state: State | None = None) -> tuple[Tensor, State]:
    """[P,T] the reward of each token, and the state after the rollout."""
    # Without discounted future, what the critic should say is the reward of the token itself.
    targets, state = replace(algorithm, gamma=0.0).prepare(rollout, state or {})
    assert targets.returns is not None
    return targets.returns.squeeze(1), state


# --- advantages


@pytest.mark.parametrize(
    ("lam", "advantage", "returns"),
    [
        (0.95, [0.44575, 0.585, 0.7], [0.94575, 0.985, 1.0]),
        (1.0, [0.51, 0.62, 0.7], [1.01, 1.02, 1.0]),
        (0.0, [-0.11, -0.08, 0.7], [0.39, 0.32, 1.0]),
    ],
)
@pytest.mark.parametrize("whitened", [False, True])
def test_advantages_and_returns_of_three_tokens(
    lam: float, advantage: list[float], returns: list[float], whitened: bool
) -> None:
    # beta u = .01, -.02 and 0 make the rewards -.01, .02 and 1.
    rollout = responses([1.0], over_ref=[[0.1, -0.2, 0.0]], value=[[0.5, 0.4, 0.3]])
    targets, _ = ppo(beta=0.1, lam=lam, whiten_advantage=whitened).prepare(rollout, {})
    assert targets.advantage is not None and targets.returns is not None
    close(targets.returns, [[returns]], EXACT)  # formed before whitening
    raw = tensor(advantage)
    white = (raw - raw.mean()) / (raw.var(unbiased=False) + 1e-8).sqrt()
    close(targets.advantage, [[(white if whitened else raw).tolist()]], 1e-11)


def test_advantages_of_1_2_3_4_are_whitened_to_z_scores_and_then_clipped() -> None:
    rollout = responses([1, 2, 3, 4])
    for limit, expected in (
        (None, [-1.341641, -0.447214, 0.447214, 1.341641]),
        (0.5, [-0.5, -0.447214, 0.447214, 0.5]),
        (0.12, [-0.12, -0.12, 0.12, 0.12]),
    ):
        targets, _ = ppo(whiten_advantage=True, advantage_clip=limit).prepare(rollout, {})
        assert targets.advantage is not None and targets.returns is not None
        close(targets.advantage.flatten(), expected)
        close(targets.returns.flatten(), [1, 2, 3, 4], EXACT)


# --- rewards


def test_each_token_pays_eta_times_its_log_ratio_and_nothing_else_depends_on_eta() -> None:
    one = case(3, responses=1).rollout
    assert one.logp_ref is not None
    without, _ = paid(ppo(beta=0.0), one)
    for eta in (0.05, 0.1, 0.2):
        charged, _ = paid(ppo(beta=eta), one)
        k1 = ((one.logp_old - one.logp_ref) * one.mask).squeeze(1)
        close(charged - without, -eta * k1, EXACT)
        assert k1.abs().max() > 0.1


def test_the_score_is_paid_once_on_the_last_response_token() -> None:
    one = case(3, responses=1, tokens=4).rollout
    assert one.score is not None
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for p in range(4):
        expected[p, int(one.mask[p, 0].sum()) - 1] = one.score[p, 0]
    close(paid(ppo(), one)[0], expected, EXACT)


def test_token_rewards_1_2_3_4_are_whitened_around_their_own_mean() -> None:
    got, _ = paid(ppo(whiten_reward=True), responses([1, 2, 3, 4]))
    close(got.flatten(), [1.158359, 2.052786, 2.947214, 3.841641])


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        ("none", [1, 2, 3], [5, 7]),
        ("scale", [1, 2, 3], [2.076137, 2.906592]),
        ("normalize", [-1, 0, 1], [0.581318, 1.411773]),
    ],
)
def test_scores_are_scaled_by_moments_that_already_hold_them(
    rule: str, first: list[float], second: list[float]
) -> None:
    algorithm = ppo(reward_scale=rule)
    got, state = paid(algorithm, responses([1, 2, 3]))
    close(got.flatten(), first)
    again, after = paid(algorithm, responses([5, 7]), state)
    close(again.flatten(), second)
    if rule == "none":
        assert state == after == {}
        return
    for known, mean, deviation in ((state, 2.0, 1.0), (after, 3.6, 2.408319)):
        count = float(known["score/count"])
        close(known["score/mean"], mean)
        close((known["score/m2"] / (count - 1)).sqrt(), deviation)


@pytest.mark.parametrize(("rule", "expected"), [("scale", [4.0, 4.0]), ("normalize", [0.0, 0.0])])
def test_equal_scores_have_no_scale_of_their_own(rule: str, expected: list[float]) -> None:
    close(paid(ppo(reward_scale=rule), responses([4, 4]))[0].flatten(), expected)
    close(paid(ppo(reward_scale=rule), responses([4]))[0].flatten(), expected[:1])


def test_scores_are_clipped_after_they_are_scaled() -> None:
    rollout = responses([10, 20, 30])
    close(paid(ppo(reward_clip=15.0), rollout)[0].flatten(), [10, 15, 15])
    for rule, limit, expected in (
        ("normalize", 0.8, [-0.8, 0, 0.8]),
        ("normalize", 0.3, [-0.3, 0, 0.3]),
        ("scale", 2.5, [1, 2, 2.5]),
    ):
        algorithm = ppo(reward_scale=rule, reward_clip=limit)
        close(paid(algorithm, rollout)[0].flatten(), expected)


def test_normalised_scores_are_bounded_and_blind_to_the_units_of_the_reward_model() -> None:
    algorithm = ppo(reward_scale="normalize", reward_clip=0.8)
    random = torch.Generator().manual_seed(1)
    state: State = {}
    other: State = {}
    shifted: State = {}
    prompt = 2 * torch.randn(16, generator=random, dtype=torch.float64)
    for _ in range(20):
        score = torch.randn(16, generator=random, dtype=torch.float64)
        got, state = paid(algorithm, responses(score), state)
        same, other = paid(algorithm, responses(7 * score - 30), other)
        moved, shifted = paid(algorithm, responses(score + prompt), shifted)
        assert got.abs().max() <= 0.8
        close(same, got, 1e-11)
    assert (got.abs() == 0.8).any() and (got.abs() < 0.8).any()
    assert (moved - got).abs().max() > 0.5  # but not to a shift of its own for each prompt


# --- the KL coefficient


@pytest.mark.parametrize(
    ("kl", "after"), [(9, 0.151536), (6, 0.15), (5.7, 0.149616), (0, 0.148464)]
)
@pytest.mark.parametrize("ratio_to", ["old", "ref"])
def test_beta_adapts_to_the_sequence_kl_of_512_responses(
    kl: float, after: float, ratio_to: str
) -> None:
    algorithm = ppo(beta=0.15, kl_target=6.0, kl_horizon=10000.0, ratio_to=ratio_to)
    # Two tokens a response: what counts is their sum. Half the responses have twice the KL. Of
    # responses that the reference drew, log pi_ref - log pi_old is the one that is positive.
    sign = 1 if ratio_to == "old" else -1
    each = sign * kl * tensor([[0.25, 0.25], [0.75, 0.75]]).repeat(256, 1)
    rollout = responses(torch.zeros(512), over_ref=each)
    charged, state = paid(algorithm, rollout)
    close(charged, -0.15 * each, EXACT)  # this rollout pays the old price
    close(state["beta"], after)
    charged, _ = paid(algorithm, rollout, state)
    close(charged, -float(state["beta"]) * each, EXACT)


def test_beta_and_the_moments_of_the_scores_are_remembered_together() -> None:
    algorithm = ppo(beta=0.15, kl_target=6.0, reward_scale="normalize")
    _, state = paid(algorithm, responses([1, 2, 3], over_ref=[[9.0]] * 3))
    close(state["beta"], 0.15 * (1 + 0.2 * 3 / 10000), EXACT)
    close(state["score/mean"], 2.0, EXACT)
    assert state.keys() == {"beta", "score/count", "score/mean", "score/m2"}


def test_beta_without_a_target_stays() -> None:
    assert paid(ppo(beta=0.15), responses([0.0], over_ref=[[9.0]]))[1] == {}


# --- the losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"), [(1.5, 1, -1.5, -1), (0.5, -1, 0.5, 1)]
)
def test_without_clip_a_ratio_keeps_its_slope(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    rollout = responses([0.0])
    logp = leaf(rollout.logp_old + tensor(ratio).log())
    targets = Targets(advantage=tensor([[[advantage]]]), returns=rollout.value_old)
    now = Forward(logp, rollout.value_old)
    term = ppo().loss(now, rollout, targets)["policy"]
    close(term, [[[loss]]])
    close(torch.autograd.grad(term.sum(), logp)[0], [[[ratio * slope]]])
    assert float(ppo().watch(now, rollout, targets)["clip_fraction"]) == 0
    assert float(ppo(clip=0.2).watch(now, rollout, targets)["clip_fraction"]) == 1


@pytest.mark.parametrize(
    ("value", "returns", "loss", "slope"), [(1, 0, 0.5, 1), (1, 2, 0.5, -1), (0.6, 2, 0.98, -1.4)]
)
def test_without_clip_the_critic_is_only_a_square(
    value: float, returns: float, loss: float, slope: float
) -> None:
    rollout = responses([0.0], value=[[0.5]])
    now = Forward(rollout.logp_old, leaf(tensor([[[value]]])))
    targets = Targets(advantage=tensor([[[0.0]]]), returns=tensor([[[returns]]]))
    term = ppo().loss(now, rollout, targets)["value"]
    close(term, [[[loss]]])
    assert now.value is not None
    close(torch.autograd.grad(term.sum(), now.value)[0], [[[slope]]])
    moved = ppo().watch(now, rollout, targets)["value_clip_fraction"]
    assert float(moved) == 0
    held = ppo(clip_value=0.2).watch(now, rollout, targets)["value_clip_fraction"]
    assert float(held) == (value == 1)


@pytest.mark.parametrize(
    ("target", "loss", "slope"),
    [
        (None, [-0.005, -0.02], [-0.01, -0.01]),
        (1.5, [0.01, 0.005], [-0.01, 0.01]),
        (30.0, [0.295, 0.28], [-0.01, -0.01]),
    ],
)
def test_entropy_is_rewarded_or_held_at_a_level(
    target: float | None, loss: list[float], slope: list[float]
) -> None:
    algorithm = ppo(entropy_coef=0.01, entropy_target=target)
    assert algorithm.wants_entropy() and not ppo(entropy_target=target).wants_entropy()
    rollout = responses([0.0], over_ref=[[0.0, 0.0]])
    entropy = leaf(tensor([[[0.5, 2.0]]]))
    targets = Targets(advantage=torch.zeros(1, 1, 2), returns=rollout.value_old)
    now = Forward(rollout.logp_old, rollout.value_old, entropy)
    term = algorithm.loss(now, rollout, targets)["entropy_loss"]
    close(term, [[loss]])
    close(torch.autograd.grad(term.sum(), entropy)[0], [[slope]])


def test_a_level_beyond_every_vocabulary_is_a_plain_bonus() -> None:
    one = case(1, responses=1)
    bonus, level = (
        judge(ppo(entropy_coef=0.01, entropy_target=target), one) for target in (None, 30.0)
    )
    assert torch.equal(bonus.slopes["entropy"], level.slopes["entropy"])
    assert bonus.slopes["entropy"].abs().max() > 1e-4


# --- demonstrations and the critic's head start


def test_demonstrations_weigh_their_coefficient_per_token() -> None:
    algorithm = ppo(ptx_coef=0.5)
    assert algorithm.side() == Sampling(demo=1)
    one = case(2, sampling=algorithm.side())
    said = judge_side(algorithm, one)
    count = one.rollout.mask.sum()
    close(said.loss, -0.5 * (one.now.logp * one.rollout.mask).detach().sum() / count, EXACT)
    close(said.d_logp, -0.5 * one.rollout.mask / count, EXACT)


def test_without_weight_there_are_no_demonstrations_and_the_rest_is_the_same_to_the_bit() -> None:
    one = case(2, responses=1)
    on, off = shipped("ppo_max"), tuned("ppo_max", ptx_coef=0.0)
    assert on.side() == Sampling(demo=1) and off.side() == Sampling()
    assert off.side_loss(one.now, one.rollout) == {}
    with_, without = judge(on, one), judge(off, one)
    for word, slope in without.slopes.items():
        assert torch.equal(with_.slopes[word], slope)


def test_the_critic_learns_alone_for_as_long_as_it_is_told() -> None:
    assert (ppo(critic_rollouts=7).critic_only(), ppo().critic_only()) == (7, 0)
    assert shipped("ppo_max").critic_only() > 0 == shipped("ppo").critic_only()


def test_ppo_max_without_its_tricks_is_ppo() -> None:
    plain = shipped("ppo")
    mine = {f.name: getattr(plain, f.name) for f in fields(plain)}
    assert tuned("ppo_max", **mine) == plain
    different = {w for w, value in mine.items() if getattr(shipped("ppo_max"), w) != value}
    assert different == {
        "reward_scale",
        "reward_clip",
        "lam",
        "whiten_advantage",
        "value_coef",
        "ptx_coef",
        "critic_rollouts",
    }


# --- responses of the reference (trick 2)


def test_responses_of_the_reference_give_the_policy_gradient_of_another_policy() -> None:
    algorithm = ppo(beta=0.1, ratio_to="ref")
    assert algorithm.sampling() == Sampling(ref=1)
    close(ascent(algorithm, BANDIT, THETA, THETA), BANDIT.gradient(THETA), EXACT)
    # The penalty is that of the rollout, as it is with P3O's `kl_at: rollout`.
    off_policy = ascent(algorithm, BANDIT, THETA, THETA_OLD)
    close(off_policy, [[0.292671, -0.035774, -0.256897]])


def test_responses_of_the_reference_are_clipped_about_the_reference() -> None:
    theta = BANDIT.ref + tensor([[0.5, 0.0, -0.5]])
    algorithm = ppo(beta=0.0, ratio_to="ref", clip=0.2)
    # pi is 1.519, .921 and .559 times pi_ref: the good arm has risen and the bad one fallen enough.
    draws = BANDIT.draws(1)
    rollout = replace(
        BANDIT.rollout(THETA, draws, Sampling(ref=1)), value_old=tensor([[[0.0]]] * 3)
    )
    targets, _ = algorithm.prepare(rollout, {})
    now = BANDIT.now(theta, rollout, draws)
    close(BANDIT.probability(theta) * 3, [1.519449, 0.921592, 0.558979], 2e-5)
    cut = algorithm.watch(now, rollout, targets)["clip_fraction"].flatten()
    close(cut, [1, 0, 1], EXACT)


@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_responses_of_the_reference_teach_the_optimum(lam: float) -> None:
    # Longer traces let the reference answer for the policy, but at the optimum every delta is 0.
    algorithm = ppo(beta=TREE.beta, ratio_to="ref", lam=lam)
    assert distance(TREE, learn(algorithm, TREE, steps=500)) < 1e-5


def test_longer_traces_of_the_reference_point_elsewhere_on_the_way() -> None:
    theta = TREE.ref + tensor([[0.8, 0.0], [0.0, 0.5], [0.0, 0.9]])
    short, longer = (
        ascent(ppo(beta=TREE.beta, ratio_to="ref", lam=lam), TREE, theta, theta)
        for lam in (0.0, 0.95)
    )
    assert (short - longer)[0].abs().max() > 1e-2  # at the root, which has a future
    close(short[1:], longer[1:].tolist(), EXACT)


# --- where the tricks lead


def reached(algorithm: Any) -> Tensor:
    """[3] the policy after learning on the arms."""
    return ARMS.probability(learn(algorithm, ARMS, steps=500))


def test_scaled_scores_have_the_optimum_of_scaled_scores() -> None:
    deviation = 0.763763  # of 2.5, 2 and 1: every rollout here is all there is, each response once
    expected = (ARMS.score / deviation / ARMS.beta).softmax(-1)
    for rule in ("scale", "normalize"):
        got = reached(ppo(beta=ARMS.beta, reward_scale=rule))
        close(got, expected, 2e-6)
        assert (got - ARMS.optimum()).abs().max() > 0.05


def test_clipped_scores_have_the_optimum_of_clipped_scores() -> None:
    got = reached(ppo(beta=ARMS.beta, reward_scale="normalize", reward_clip=0.8))
    # (r - 1.833) / .763763 = .873, .218 and -1.091
    close(got, (tensor([0.8, 0.218218, -0.8]) / ARMS.beta).softmax(-1), 2e-6)
    assert (got - ARMS.optimum()).abs().max() > 0.03


def test_an_entropy_bonus_softens_the_optimum() -> None:
    # Against a uniform reference, beta and the bonus ask for the same.
    got = reached(ppo(beta=ARMS.beta, entropy_coef=0.25))
    close(got, (ARMS.score / (ARMS.beta + 0.25)).softmax(-1))


def test_whitened_advantages_lead_elsewhere_only_in_size_on_one_state() -> None:
    plain = ascent(ppo(beta=0.1), BANDIT, THETA, THETA)
    white = ascent(ppo(beta=0.1, whiten_advantage=True), BANDIT, THETA, THETA)
    close(white / white.norm(), plain / plain.norm(), EXACT)
    assert abs(float(white.norm() / plain.norm()) - 1) > 0.1
