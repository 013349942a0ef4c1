"""Losses of preferences: literal numbers, identities, and where each of them comes to rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.rollout import Forward, Rollout
from tests.algos.cases import Case, case, judge
from tests.algos.discovery import tuned
from tests.algos.toys import (
    ARMS,
    THETA,
    TREE,
    World,
    ascent,
    bandit,
    close,
    enumerated,
    leaf,
    per_prompt,
    tensor,
)

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

REST = 2e-6
"""Literals of six decimals, met by a minimiser that stops at a gradient of about 1e-9."""


def settled(loss: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """[S,V] logits at which a smooth loss is smallest, from theta on."""
    theta = leaf(theta)
    search = torch.optim.LBFGS(
        [theta],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    search.step(closure)  # type: ignore[no-untyped-call]
    return theta.detach()


def at_rest(algorithm: Any, world: World, old: Tensor | None = None) -> Tensor:
    """[N] where the expected loss on samples of a fixed `old`, the reference if None, is smallest."""
    old = world.ref if old is None else old
    return world.probability(settled(lambda t: enumerated(algorithm, world, t, old), old))


def under(algorithm: Any, world: World, theta: Tensor, law: Tensor) -> Tensor:
    """Expected loss where `law` [P] gives each row of `world.draws` its chance."""
    sampling = algorithm.sampling()
    draws = world.draws(sampling.responses)
    rollout = world.rollout(world.ref, draws, sampling)
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(world.now(theta, rollout, draws), rollout, targets).values()
    return sum((law * per_prompt(term)).sum() for term in terms)  # type: ignore[return-value]


def labelled(world: World, first: Tensor, second: Tensor) -> Tensor:
    """[P] law of (preferred, other) for draws of two distributions and a Bradley-Terry label."""
    better, worse = world.draws(2).unbind(1)
    pair = first[better] * second[worse] + first[worse] * second[better]
    return pair * (world.score[better] - world.score[worse]).sigmoid()


def wins(world: World, against: Tensor) -> Tensor:
    """[N] P(y > y') of each response, y' drawn from `against`."""
    return (world.score.unsqueeze(1) - world.score).sigmoid() @ against


def given(log_ratios: list[float], sampling: Sampling, score: list[float] | None = None) -> Case:
    """One prompt with responses of one token, each at its log pi - log pi_ref; all of ref 0."""
    shape = (1, len(log_ratios), 1)
    level = tensor(log_ratios).view(shape)
    rollout = Rollout(
        tokens=torch.zeros(1, len(log_ratios), 0),
        attention=torch.zeros(1, len(log_ratios), 0),
        mask=torch.ones(shape, dtype=torch.float64),
        logp_old=level,
        logp_ref=torch.zeros_like(level),
        score=None if score is None else tensor([score]),
        value_old=None,
        coin=torch.zeros(1, len(log_ratios), dtype=torch.float64),
        source=sampling.sources,
    )
    return Case(rollout, Forward(leaf(level)))


def relabelled(one: Case) -> Case:
    """The pair the other way round."""
    return one.mapped(lambda x: x.flip(1))


PAIR = Sampling(dataset=2)

# --- DPO and IPO


@pytest.mark.parametrize(
    ("name", "settings", "loss", "slope"),
    [
        # log 2 and -beta / 2;  1 / (4 tau^2) and -1 / tau.
        ("dpo", {"beta": 0.1}, 0.693147, -0.05),
        ("ipo", {"beta": 0.1}, 25.0, -10.0),
    ],
)
def test_a_policy_at_the_reference_has_this_loss_and_slope(
    name: str, settings: dict[str, Any], loss: float, slope: float
) -> None:
    verdict = judge(tuned(name, **settings), given([0.0, 0.0], PAIR))
    close(verdict.loss, loss)
    close(verdict.d_logp, [[[slope], [-slope]]])


@pytest.mark.parametrize(
    ("name", "settings", "loss", "slope"),
    [
        ("dpo", {}, 0.668460, -0.048750),
        ("dpo", {"noise": 0.1}, 0.673460, -0.038750),
        ("dpo", {"noise": 0.1, "robust": True}, 0.662210, -0.061250),
        ("ipo", {}, 20.25, -9.0),
    ],
)
def test_half_a_nat_of_gap_has_this_loss_and_slope(
    name: str, settings: dict[str, Any], loss: float, slope: float
) -> None:
    # log pi and log pi_ref: -12 and -11.5 of the preferred response, -15 and -14 of the other.
    one = given([-12.0, -15.0], PAIR).with_rollout(logp_ref=tensor([[[-11.5], [-14.0]]]))
    verdict = judge(tuned(name, beta=0.1, **settings), one)
    close(verdict.loss, loss)
    close(verdict.d_logp, [[[slope], [-slope]]])


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_robust_loss_over_wrong_labels_is_the_clean_loss(name: str) -> None:
    one, eps = case(3, sampling=PAIR), 0.2
    robust, clean = tuned(name, noise=eps, robust=True), judge(tuned(name, noise=0.0), one)
    right, wrong = judge(robust, one), judge(robust, relabelled(one))
    slope = (1 - eps) * right.d_logp + eps * wrong.d_logp.flip(1)
    torch.testing.assert_close(slope, clean.d_logp, atol=EXACT, rtol=EXACT)
    loss = (1 - eps) * right.loss + eps * wrong.loss
    torch.testing.assert_close(loss, clean.loss, atol=EXACT, rtol=EXACT)
    assert (right.d_logp - clean.d_logp).abs().max() > 1e-4


def test_robust_dpo_never_stops_on_a_pair_that_is_always_seen_the_same_way() -> None:
    algorithm = tuned("dpo", beta=0.5, noise=0.2, robust=True)
    losses = [float(judge(algorithm, given([gap, 0.0], PAIR)).loss) for gap in (10.0, 20.0, 40.0)]
    assert 0 > losses[0] > losses[1] + 1 > losses[2] + 2


def test_conservative_dpo_comes_to_rest_at_the_log_odds_of_the_noisy_labels() -> None:
    world, eps = bandit([1.0, 0.0], beta=0.5), 0.1
    noisy = (1 - 2 * eps) * world.score[0].sigmoid() + eps
    expected = torch.stack([noisy.logit() / world.beta, tensor(0.0)]).softmax(0)
    got = at_rest(tuned("dpo", beta=world.beta, noise=eps), world)
    close(got, expected, REST)
    assert (got - world.optimum()).abs().max() > 0.02


SKEWED = (tensor([0.1, 0.2, 0.7]), tensor([0.05, 0.05, 0.9]))
"""Two laws of the CoPG paper's bandit (Flet-Berliac et al. 2024, section 5)."""


def test_dpo_finds_the_optimum_and_ipo_does_not_whoever_drew_the_pairs() -> None:
    law = labelled(ARMS, *SKEWED)
    close(law.sum(), 1.0, EXACT)
    rest = {}
    for name in ("dpo", "ipo"):
        loss = partial(under, tuned(name, beta=0.5), ARMS, law=law)
        rest[name] = ARMS.probability(settled(loss, ARMS.ref))
    close(rest["dpo"], ARMS.optimum(), REST)
    close(rest["ipo"], [0.4242, 0.3527, 0.2231], 6e-5)  # literals of four decimals


def test_ipo_is_linear_in_the_preference_over_the_law_of_the_pairs() -> None:
    mu = tensor([0.5, 0.3, 0.2])
    law = labelled(ARMS, mu, mu)
    got = ARMS.probability(settled(lambda t: under(tuned("ipo", beta=0.5), ARMS, t, law), ARMS.ref))
    close(got, [0.4324, 0.3434, 0.2242], 6e-5)  # literals of four decimals
    close(got, (wins(ARMS, mu) / 0.5).softmax(0), REST)
    online = tuned("ipo_online", beta=0.5, label="soft")
    close(at_rest(online, ARMS, mu.log().unsqueeze(0)), got, REST)


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_ipo_on_the_pairs_of_the_reference_rests_off_the_optimum(world: World) -> None:
    got = at_rest(tuned("ipo", beta=world.beta), world)
    ref = world.probability(world.ref)
    close(got, (ref.log() + wins(world, ref) / world.beta).softmax(0), REST)
    assert (got - world.optimum()).abs().max() > 0.1


@pytest.mark.parametrize("name", ["ipo", "ipo_online"])
def test_ipo_over_the_average_token_is_a_quarter_of_half_the_tau_for_two_tokens(name: str) -> None:
    one = case(3, tokens=2, sampling=tuned(name).sampling())
    one = one.with_rollout(mask=torch.ones_like(one.rollout.mask))
    mean = judge(tuned(name, beta=0.4, ipo_norm="mean"), one)
    total = judge(tuned(name, beta=0.2, ipo_norm="sum"), one)
    torch.testing.assert_close(4 * mean.d_logp, total.d_logp, atol=EXACT, rtol=EXACT)


def equilibrium(world: World, beta: float, opponent: Callable[[Tensor], Tensor]) -> Tensor:
    """[N] the policy with h = E[P(y > y')] / beta + c, y' drawn from `opponent` of that policy."""
    ref = world.probability(world.ref)
    policy = ref
    for _ in range(300):
        policy = (ref.log() + wins(world, opponent(policy)) / beta).softmax(0)
    return policy


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_online_ipo_rests_where_it_is_the_best_answer_to_itself(world: World) -> None:
    expected = equilibrium(world, world.beta, lambda policy: policy)
    theta = world.ref
    for _ in range(60):
        old, algorithm = theta, tuned("ipo_online", beta=world.beta, label="soft")
        theta = settled(lambda t, a=algorithm, o=old: enumerated(a, world, t, o), old)
    close(world.probability(theta), expected, REST)
    assert (expected - world.optimum()).abs().max() > 0.1


# --- XPO

LEANING = replace(ARMS, ref=tensor([[0.2, 0.3, 0.5]]).log())


def test_xpo_without_its_bonus_is_online_dpo_with_a_sample_of_the_reference() -> None:
    one = case(2, spread=0.3, sampling=Sampling(policy=1, ref=1))
    for label in ("soft", "argmax", "bernoulli"):
        explorer = tuned("xpo", beta=0.3, alpha=0.0, label=label)
        plain = tuned("dpo_online", beta=0.3, label=label, responses=2)
        assert torch.equal(judge(explorer, one).d_logp, judge(plain, one).d_logp)


@pytest.mark.parametrize(
    ("alpha", "policy"),
    [(0.0, [0.596557, 0.329191, 0.074252]), (0.01, [0.665361, 0.278693, 0.055946])],
)
def test_xpo_on_samples_of_the_reference_rests_beyond_the_optimum(
    alpha: float, policy: list[float]
) -> None:
    algorithm = tuned("xpo", beta=0.5, alpha=alpha, label="soft")
    close(at_rest(algorithm, LEANING), policy, REST)


def least_held(world: World, beta: float) -> float:
    """The alpha at which some set of responses starts to fall, both samples from the reference."""
    ref = world.probability(world.ref)
    size = len(ref)
    bounds = []
    for word in range(1, 2**size - 1):
        inside = [i for i in range(size) if word >> i & 1]
        held = sum(
            2 * ref[i] * ref[j] * (world.score[i] - world.score[j]).sigmoid()
            for i in inside
            for j in range(size)
            if j not in inside
        )
        bounds.append(float(beta * held / ref[inside].sum()))
    return min(bounds)


def test_xpo_has_a_minimum_up_to_its_bound_and_none_beyond() -> None:
    close(least_held(LEANING, 0.5), 0.051119)
    held = at_rest(tuned("xpo", beta=0.5, alpha=0.05, label="soft"), LEANING)
    close(held[0], 0.99982, 6e-6)  # a literal of five decimals
    # Beyond the bound the loss falls along the ray on which the critical set, arms 1 and 2, sinks.
    ray = tensor([[0.0, -1.0, -1.0]])
    for alpha, falls in ((0.050, False), (0.055, True)):
        algorithm = tuned("xpo", beta=0.5, alpha=alpha, label="soft")
        near, far = (
            enumerated(algorithm, LEANING, LEANING.ref + k * ray, LEANING.ref) for k in (80, 120)
        )
        assert (float(far - near) < -0.01) is falls, alpha


@pytest.mark.parametrize("world", [ARMS, LEANING, TREE], ids=["arms", "leaning", "tree"])
def test_xpo_bonus_is_paid_for_the_reference_s_divergence_from_the_policy(world: World) -> None:
    theta = leaf(world.ref + torch.linspace(-0.5, 0.7, world.ref.numel()).view(world.ref.shape))
    with_bonus, without = (
        enumerated(tuned("xpo", beta=0.5, alpha=a, label="soft"), world, theta, world.ref)
        for a in (0.04, 0.0)
    )
    ref = world.probability(world.ref)
    divergence = (ref * (ref.log() - world.logp(theta).sum(-1))).sum()
    (got,) = torch.autograd.grad(with_bonus - without, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-0.04 * divergence, theta)
    torch.testing.assert_close(got, expected, atol=EXACT, rtol=EXACT)
    assert expected.abs().max() > 1e-3


def test_xpo_bonus_stays_when_all_pairs_are_one_response_seen_twice() -> None:
    theta, draws = leaf(THETA), torch.tensor([[1, 1]])
    algorithm = tuned("xpo", beta=0.5, alpha=0.01, label="soft")
    rollout = LEANING.rollout(LEANING.ref, draws, algorithm.sampling())
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(LEANING.now(theta, rollout, draws), rollout, targets)
    slopes = {
        w: torch.autograd.grad(t.sum(), theta, retain_graph=True)[0] for w, t in terms.items()
    }
    close(slopes["policy"], [[0.0, 0.0, 0.0]], EXACT)
    unit = tensor([0.0, 1.0, 0.0])
    close(slopes["bonus"], 0.01 * (unit - ARMS.probability(THETA)).unsqueeze(0), EXACT)


def test_xpo_pays_for_the_reference_s_sample_only() -> None:
    one = given([0.4, -0.3], Sampling(policy=1, ref=1), score=[1.0, 0.0])
    slopes = [judge(tuned("xpo", beta=0.2, alpha=a), one).d_logp for a in (0.0, 0.1)]
    close(slopes[1] - slopes[0], [[[0.0], [0.1]]], EXACT)


def test_xpo_counts_the_pairs_that_cannot_hold_the_bonus() -> None:
    # beta P(y' > y) is .2 x .119 = .0238 and .2 x .5 = .1.
    for alpha, share in ((0.02, 0.0), (0.03, 0.5), (0.12, 1.0)):
        one = case(1, prompts=2, sampling=Sampling(policy=1, ref=1))
        one = one.with_rollout(score=tensor([[2.0, 0.0], [1.0, 1.0]]))
        watch = judge(tuned("xpo", beta=0.2, alpha=alpha), one).watch["unheld"]
        assert float(watch.mean()) == share


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"label": "argmax", "alpha": 1e-6}, "be 0 with algo.label=argmax"),
        ({"beta": 0.1, "alpha": 0.1}, "be less than algo.beta=0.1"),
    ],
)
def test_xpo_refuses_a_bonus_nothing_can_hold(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        tuned("xpo", **settings)
    assert tuned("xpo", **{**settings, "alpha": 0.0}).alpha == 0


def test_xpo_keeps_as_many_rollouts_as_it_is_told() -> None:
    assert [tuned("xpo", replay=n).replayed() for n in (1, 5)] == [1, 5]


# --- KTO

TRIPLE = Sampling(dataset=2, mismatch=1)


@pytest.mark.parametrize(("good", "bad"), [(1.0, 1.0), (1.33, 0.5)])
def test_kto_at_the_reference_costs_half_of_each_weight(good: float, bad: float) -> None:
    algorithm = tuned("kto", beta=0.1, desirable=good, undesirable=bad)
    verdict = judge(algorithm, given([0.0, 0.0, 0.0], TRIPLE))
    close(verdict.terms["policy"], [0.5 * (0.5 * good + 0.5 * bad)], EXACT)
    # d/dh of sigma(beta h) at 0 is beta / 4; two responses share the mean.
    close(verdict.d_logp, [[[-0.0125 * good], [0.0125 * bad], [0.0]]], EXACT)


def test_kto_judges_by_the_mean_of_the_mismatched_responses_unless_it_is_negative() -> None:
    algorithm = tuned("kto", beta=0.5, desirable=1.0, undesirable=1.0)
    one = case(1, tokens=1, sampling=TRIPLE)
    for mismatched, level in (([1.0, 2.0, -0.5, 1.5], 1.0), ([1.0, -2.0, -0.5, -1.5], 0.0)):
        old = torch.zeros_like(one.rollout.logp_old)
        old[:, 2, 0] = tensor(mismatched)
        old[:, 0, 0] = 9.0  # the matched ones do not enter
        rollout = replace(one.rollout, logp_old=old, logp_ref=torch.zeros_like(old))
        targets, _ = algorithm.prepare(rollout, {})
        assert targets.baseline is not None
        close(targets.baseline, [level] * 4, EXACT)
        # A response that lies at the level is worth one half, whichever side it is on.
        now = Forward(torch.full_like(old, level))
        close(algorithm.loss(now, rollout, targets)["policy"], [0.5] * 4, EXACT)


def test_kto_no_longer_minds_a_response_far_on_the_wrong_side() -> None:
    slopes = [
        float(judge(tuned("kto", beta=0.5), given([h, 0.0, 0.0], TRIPLE)).d_logp[0, 0, 0])
        for h in (-1.0, -10.0, -40.0)
    ]
    assert slopes[0] < 8 * slopes[1] < 1e5 * slopes[2] < 0


def test_kto_drives_every_response_to_the_side_it_is_more_often_on() -> None:
    algorithm = tuned("kto", beta=ARMS.beta, desirable=1.0, undesirable=1.0)
    often = wins(ARMS, ARMS.probability(ARMS.ref))
    assert often[0] > often[1] > 0.5 > often[2]
    theta, seen = ARMS.ref, []
    for _ in range(3):
        for _ in range(400):
            slope = leaf(theta)
            loss = enumerated(algorithm, ARMS, slope, theta)
            theta = theta - 20 * torch.autograd.grad(loss, slope)[0]
        seen.append(ARMS.probability(theta))
    assert seen[0][2] > 2 * seen[1][2] > 3 * seen[2][2]
    assert seen[-1][2] < 0.01 * ARMS.optimum()[2]


# --- SimPO


@pytest.mark.parametrize("tokens", [1, 4])
def test_simpo_wants_a_margin_of_the_average_token(tokens: int) -> None:
    # Means of -.7 and -1.2: 2.5 x .5 - 1.375 = -.125, softplus(.125) = .757599, sigma(.125) = .531209.
    one = case(1, prompts=1, tokens=tokens, sampling=PAIR)
    levels = tensor([[[-0.7], [-1.2]]]).expand(1, 2, tokens)
    one = replace(one, now=Forward(leaf(levels))).with_rollout(mask=torch.ones_like(levels))
    verdict = judge(tuned("simpo", beta=2.5, gamma=1.375), one)
    close(verdict.loss, 0.757599)
    slope = tensor([[[-1.328023], [1.328023]]]).expand(1, 2, tokens) / tokens
    close(verdict.d_logp, slope, REST)


@pytest.mark.parametrize("world", [LEANING, TREE], ids=["arms", "tree"])
def test_simpo_forgets_the_reference(world: World) -> None:
    got = at_rest(tuned("simpo", beta=world.beta, gamma=0.0), world)
    length = world.state.shape[1]
    close(got, (length * world.score / world.beta).softmax(0), REST)
    assert (got - world.optimum()).abs().max() > 0.04


def test_simpo_with_a_margin_rests_where_two_arms_balance() -> None:
    # d/du of P softplus(g - u) + (1 - P) softplus(g + u), u = beta (m1 - m2), is 0 where, with
    # a = exp(u) and b = exp(g), (1 - P) a^2 + b (1 - 2 P) a - P = 0.
    world, beta, gamma = bandit([1.0, 0.0], beta=0.5), 0.5, 0.8
    p, b = float(world.score[0].sigmoid()), float(tensor(gamma).exp())
    half = b * (2 * p - 1) / (2 * (1 - p))
    a = half + (half**2 + p / (1 - p)) ** 0.5
    apart = tensor([a, 1.0]).log() / beta
    got = at_rest(tuned("simpo", beta=beta, gamma=gamma), world)
    close(got, apart.softmax(0), REST)
    assert float(got[0]) > float(at_rest(tuned("simpo", beta=beta, gamma=0.0), world)[0]) + 0.03


# --- ORPO


def test_orpo_at_mean_log_probabilities_of_minus_point_seven_and_minus_one_point_two() -> None:
    one = given([-0.7, -1.2], PAIR)
    verdict = judge(tuned("orpo", lam=0.1), one)
    close(verdict.loss, 0.736252)
    close(verdict.terms["nll"], [0.7], EXACT)
    # The log-odds are .827959 apart.
    close(verdict.terms["policy"], [0.1 * float(tensor(-0.827959).exp().log1p())])


@pytest.mark.parametrize("world", [LEANING, TREE], ids=["arms", "tree"])
def test_orpo_without_odds_is_fine_tuning_on_the_preferred_responses(world: World) -> None:
    ref = world.probability(world.ref)
    preferred = 2 * ref * wins(world, ref)
    close(preferred.sum(), 1.0, EXACT)
    close(at_rest(tuned("orpo", lam=0.0), world), preferred, REST)
    sharper = at_rest(tuned("orpo", lam=1.0), world)
    best = int(world.score.argmax())
    assert sharper[best] > preferred[best] + 0.02
    assert (sharper - world.optimum()).abs().max() > 0.02


def test_orpo_stays_finite_at_certainty() -> None:
    for levels in ([0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [-1e-9, -50.0]):
        verdict = judge(tuned("orpo", lam=0.5), given(levels, PAIR))
        assert verdict.loss.isfinite() and verdict.d_logp.isfinite().all()


# --- SPPO

STEP = tensor([0.593865, 0.282954, 0.123180])
"""pi_t exp(eta P) / Z of the bandit for pi_t = (.5, .3, .2) and eta = 2."""


def test_sppo_aims_at_a_step_of_multiplicative_weights_but_for_one_number() -> None:
    old = tensor([[0.5, 0.3, 0.2]]).log()
    algorithm = tuned("sppo", beta=0.5, responses=2)
    draws = ARMS.draws(2)
    targets, _ = algorithm.prepare(ARMS.rollout(old, draws, algorithm.sampling()), {})
    assert targets.advantage is not None
    aims = torch.stack(
        [(old.exp()[0] * targets.advantage[draws[:, 0] == arm, 0]).sum() for arm in range(3)]
    )
    close((old[0] + aims).softmax(0), STEP)
    # The missing number is log Z less the 1/2 taken for granted: the same for every response.
    missed = STEP.log() - old[0] - aims
    close(missed, [float(missed[0])] * 3, 4e-6)  # literals of six decimals, divided by .12
    assert missed[0] < -0.01


def test_sppo_counts_a_response_against_the_others_only() -> None:
    one = case(1, prompts=1, responses=3).with_rollout(score=tensor([[2.0, 0.0, 0.0]]))
    targets, _ = tuned("sppo", beta=0.1, responses=3).prepare(one.rollout, {})
    # sigma(2) = .880797; the others win .119203 of one meeting and half of the other.
    assert targets.advantage is not None
    close(targets.advantage, [[3.80797, -1.903985, -1.903985]], 6e-6)


def test_sppo_measures_from_the_sampling_policy() -> None:
    one = case(5, responses=4)
    at_start = replace(one, now=Forward(leaf(one.rollout.logp_old)))
    algorithm = tuned("sppo", beta=0.5)
    targets, _ = algorithm.prepare(one.rollout, {})
    assert targets.advantage is not None
    close(judge(algorithm, at_start).terms["policy"], targets.advantage**2, EXACT)


def test_sppo_goes_on_towards_the_response_that_beats_all_others() -> None:
    algorithm, theta, best = tuned("sppo", beta=0.25, responses=2), ARMS.ref, []
    for _ in range(3):
        for _ in range(6):
            old = theta
            theta = settled(lambda t, o=old: enumerated(algorithm, ARMS, t, o), old)
        best.append(float(ARMS.probability(theta)[0]))
    assert ARMS.optimum()[0] + 0.05 < best[0] < best[1] - 0.02 < best[2] - 0.02
    assert best[2] > 0.98


# --- Nash-MD


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_nash_md_rests_where_it_is_the_best_answer_to_its_mixture(
    world: World, weight: float
) -> None:
    algorithm = tuned("nash_md", beta=world.beta, mixture=weight)
    sampling = algorithm.sampling()
    theta = world.ref
    for _ in range(600):
        theta = theta + 2 * ascent(algorithm, world, theta, theta)

    def opponent(policy: Tensor) -> Tensor:
        # The product of a tree is taken token by token, so it is asked of the world itself.
        draws = world.draws(2)
        chances = world.chances(theta, draws, sampling)
        return torch.stack([chances[draws[:, 1] == y].sum() for y in range(len(policy))])

    expected = equilibrium(world, world.beta, opponent)
    close(world.probability(theta), expected, 1e-5)  # plain ascent, 600 steps
    assert (expected - world.optimum()).abs().max() > 0.05


def test_nash_md_played_against_itself_rests_with_online_ipo() -> None:
    theta = ARMS.ref
    algorithm = tuned("nash_md", beta=0.5, mixture=0.0)
    for _ in range(600):
        theta = theta + 2 * ascent(algorithm, ARMS, theta, theta)
    expected = equilibrium(ARMS, 0.5, lambda policy: policy)
    close(ARMS.probability(theta), expected, 1e-5)  # plain ascent, 600 steps


def test_nash_md_climbs_the_win_rate_less_the_penalty_of_whole_responses() -> None:
    theta = tensor([[0.2, -0.1], [-1.5, 0.5], [1.0, 0.4]])
    algorithm = tuned("nash_md", beta=0.5, mixture=1.0)
    got = ascent(algorithm, TREE, theta, theta)
    asked = replace(TREE, score=wins(TREE, TREE.probability(TREE.ref)))
    close(got, asked.gradient(theta), EXACT)
    # The log-ratio of a token alone is another direction: what it leads to is left out.
    moving = leaf(theta)
    logp, ref = TREE.logp(moving), TREE.logp(TREE.ref)
    alone = 0.5 * ((logp.detach() - ref) * logp).sum(-1)
    score = asked.score * logp.sum(-1)
    value = (TREE.probability(theta) * (score - alone)).sum()
    (other,) = torch.autograd.grad(value, moving)
    assert (other - got).abs().max() > 1e-2


# --- SPIN


def test_spin_at_the_sampling_policy_is_half_beta_of_demonstration_less_sample() -> None:
    one = case(4, sampling=Sampling(policy=1, demo=1))
    one = replace(one, now=Forward(leaf(one.rollout.logp_old)))
    verdict = judge(tuned("spin", beta=0.3), one)
    close(verdict.terms["policy"], [0.693147] * 4)
    sign = tensor([1.0, -1.0]).view(1, 2, 1)
    close(verdict.d_logp, 0.15 / 4 * sign * one.rollout.mask, EXACT)


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_spin_first_climbs_as_fine_tuning_does_and_rests_with_the_demonstrations(
    world: World,
) -> None:
    demos = torch.linspace(1, 2, len(world.score)).double()
    shown = replace(world, demos=demos / demos.sum())
    assert shown.demos is not None
    algorithm = tuned("spin", beta=0.8)
    theta = leaf(world.ref)
    fitted = (shown.demos * world.logp(theta).sum(-1)).sum()
    (tuning,) = torch.autograd.grad(fitted, theta)
    close(ascent(algorithm, shown, world.ref, world.ref), 0.4 * tuning, EXACT)
    theta = world.ref
    for _ in range(600):
        theta = theta + 2 * ascent(algorithm, shown, theta, theta)
    close(world.probability(theta), shown.demos, 1e-5)  # plain ascent, 600 steps


def test_spin_is_dpo_with_the_last_iterate_as_reference() -> None:
    one = case(6, spread=0.4, sampling=Sampling(policy=1, demo=1))
    got = judge(tuned("spin", beta=0.3), one)
    pair = one.mapped(lambda x: x.flip(1))
    pair = pair.with_rollout(logp_ref=pair.rollout.logp_old, source=PAIR.sources)
    expected = judge(tuned("dpo", beta=0.3), pair)
    torch.testing.assert_close(got.d_logp, expected.d_logp.flip(1), atol=EXACT, rtol=EXACT)


def test_the_implicit_reward_falls_on_average_where_the_reference_would_answer() -> None:
    """E under pi_ref of beta h is -beta KL(pi_ref || pi): Toy B at its optimum, -0.421601."""
    theta = tensor([[0.156559, 0.843441], [0.945179, 0.054821], [0.012294, 0.987706]]).log()
    draws = TREE.draws(2)
    rollout = TREE.rollout(TREE.ref, draws, tuned("dpo").sampling())
    seen = tuned("dpo", beta=TREE.beta).watch(TREE.now(theta, rollout, draws), rollout, Targets())
    chance = TREE.chances(TREE.ref, draws)  # both sides drawn from the reference
    for word in ("implicit_chosen", "implicit_rejected"):
        close((chance * seen[word]).sum(), -0.421601, 2e-6)  # the table has six decimals
    apart = seen["implicit_chosen"] - seen["implicit_rejected"]
    close(apart.abs(), (TREE.beta * seen["margin"]).tolist(), 1e-12)
