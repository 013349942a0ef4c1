"""What every algorithm in conf/algo promises, whatever its formula."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_cli.core.algorithm import Model
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import Forward
from tests.algos.discovery import FOLDER, NAMES, oracle, shipped, tuned
from tests.algos.toys import (
    ARMS,
    BANDIT,
    THETA,
    TREE,
    Case,
    Verdict,
    World,
    ascent,
    case,
    judge,
    leaf,
    tensor,
    twins,
)

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

every = pytest.mark.parametrize("name", NAMES)


def cases(name: str) -> list[Case]:
    """Near the sampler, outside the clip, and a duplicated response."""
    responses = shipped(name).sampling().responses
    drawn = [case(s, responses=responses, spread=x) for s, x in ((1, 0.05), (2, 0.3), (3, 1.5))]
    return [*drawn, twins(4)] if responses == 2 else drawn


def gap(one: Verdict, other: Verdict) -> float:
    """Largest difference between two gradients."""
    return max(
        float((one.d_logp - other.d_logp).abs().max()),
        float((one.d_value - other.d_value).abs().max()),
    )


# --- the folder is the registry


def test_every_file_of_the_folder_is_found_and_is_an_algorithm_with_an_oracle() -> None:
    on_disk = [
        file
        for _, _, files in os.walk(FOLDER)
        for file in files
        if file.endswith(".yaml") and not file.startswith("_")
    ]
    assert len(NAMES) == len(on_disk) >= 4
    for name in NAMES:
        algorithm = shipped(name)
        assert algorithm.revision >= 1
        assert algorithm.needs <= set(Model)
        assert callable(oracle(name).judge)


# --- structure


@every
def test_gradient_is_finite_and_not_zero(name: str) -> None:
    for one in cases(name):
        verdict = judge(shipped(name), one)
        assert verdict.loss.isfinite()
        assert verdict.d_logp.isfinite().all() and verdict.d_value.isfinite().all()
        assert verdict.d_logp.abs().max() > 1e-6


@every
def test_terms_have_the_shape_of_what_they_judge(name: str) -> None:
    for one in cases(name):
        verdict = judge(shipped(name), one)
        allowed = [one.rollout.mask.shape[:rank] for rank in (1, 2, 3)]
        for term in (*verdict.terms.values(), *verdict.watch.values()):
            assert term.shape in allowed


@every
def test_padding_is_silent_whatever_finite_numbers_it_holds(name: str) -> None:
    for one in cases(name):
        bare = judge(shipped(name), one)
        for fill in (lambda x: x, lambda x: x + 3.7, lambda x: x - 5.1):
            wide = judge(shipped(name), one.with_columns(fill))
            tokens = one.rollout.mask.shape[-1]
            assert abs(wide.loss - bare.loss) <= EXACT * (1 + bare.loss.abs())
            torch.testing.assert_close(
                wide.d_logp[..., :tokens], bare.d_logp, atol=EXACT, rtol=EXACT
            )
            torch.testing.assert_close(
                wide.d_value[..., :tokens], bare.d_value, atol=EXACT, rtol=EXACT
            )
            assert wide.d_logp[..., tokens:].abs().max() == 0
            assert wide.d_value[..., tokens:].abs().max() == 0


@every
def test_each_prompt_is_judged_alone_once_the_targets_are_there(name: str) -> None:
    algorithm = shipped(name)
    for one in cases(name):
        targets, _ = algorithm.prepare(one.rollout, {})
        whole = [f(one.now, one.rollout, targets) for f in (algorithm.loss, algorithm.watch)]
        for p in range(4):
            picked = torch.tensor([p])
            part, own = one.take(picked), targets.take(picked)
            alone = [f(part.now, part.rollout, own) for f in (algorithm.loss, algorithm.watch)]
            for everything, single in zip(whole, alone, strict=True):
                assert everything.keys() == single.keys()
                for word, term in everything.items():
                    torch.testing.assert_close(term[picked], single[word], atol=EXACT, rtol=EXACT)


@every
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0], [1, 2, 3]], [[3, 1], [0], [2]]])
def test_averages_of_any_micro_batches_add_up_to_the_whole(
    name: str, split: list[list[int]]
) -> None:
    algorithm = shipped(name)
    for one in cases(name):
        targets, _ = algorithm.prepare(one.rollout, {})
        counts = denominators(one.rollout.mask)
        whole = averages(
            algorithm.loss(one.now, one.rollout, targets), one.rollout.mask, counts
        )
        total = dict.fromkeys(whole, torch.zeros((), dtype=torch.float64))
        for prompts in map(torch.tensor, split):
            part = one.take(prompts)
            terms = algorithm.loss(part.now, part.rollout, targets.take(prompts))
            for word, share in averages(terms, part.rollout.mask, counts).items():
                total[word] = total[word] + share
        for word, value in whole.items():
            torch.testing.assert_close(total[word], value, atol=EXACT, rtol=EXACT)


@every
def test_preparing_and_judging_change_no_input_and_leave_no_gradient_in_the_targets(
    name: str,
) -> None:
    algorithm = shipped(name)
    one, twin = case(7), case(7)
    judge(algorithm, one)
    for f in fields(one.rollout):
        before, after = getattr(twin.rollout, f.name), getattr(one.rollout, f.name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after
    targets, _ = algorithm.prepare(one.rollout, {})
    made = [t for f in fields(targets) if (t := getattr(targets, f.name)) is not None]
    assert not any(t.requires_grad for t in made)


# --- claims


@every
def test_reward_shifted_per_prompt_moves_the_gradient_exactly_if_the_algorithm_says_so(
    name: str,
) -> None:
    algorithm = shipped(name)
    delta = tensor([[3.0], [-1.5], [0.25], [7.0]])
    for one in cases(name):
        assert one.rollout.score is not None
        shifted = one.with_rollout(score=one.rollout.score + delta)
        moved = gap(judge(algorithm, one), judge(algorithm, shifted))
        size = 1 + float(judge(algorithm, one).d_logp.abs().max())
        assert moved <= EXACT * size if algorithm.shift_invariant else moved > 1e-3


SOURCES: dict[Model, dict[str, bool]] = {
    Model.REF: {"logp_ref": True},
    Model.REWARD: {"score": True},
    Model.CRITIC: {"value_old": True, "value": False},
}
"""Which tensors each model fills: of the rollout (True) or of the forward (False)."""


def without(one: Case, word: str, in_rollout: bool) -> Case:
    """The case with one tensor absent."""
    if in_rollout:
        return one.with_rollout(**{word: None})
    return replace(one, now=Forward(one.now.logp, None))


@every
def test_tensors_of_models_it_did_not_ask_for_are_not_read(name: str) -> None:
    algorithm = shipped(name)
    one = case(1, responses=algorithm.sampling().responses)
    bare = one
    for model in set(Model) - algorithm.needs:
        for word, in_rollout in SOURCES[model].items():
            bare = without(bare, word, in_rollout)
    assert torch.equal(judge(algorithm, bare).d_logp, judge(algorithm, one).d_logp)


@every
def test_models_it_asked_for_matter(name: str) -> None:
    algorithm = shipped(name)
    one = case(1, responses=algorithm.sampling().responses)
    filled = {"logp_ref": one.rollout.logp_ref, "score": one.rollout.score}
    filled["value_old"] = one.rollout.value_old
    for model in algorithm.needs:
        words = [word for word, in_rollout in SOURCES[model].items() if in_rollout]
        before = judge(algorithm, one)
        for word in words:
            value = filled[word]
            assert value is not None
            wave = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).sin()
            moved = one.with_rollout(**{word: value + wave})
            assert gap(before, judge(algorithm, moved)) > 1e-6, f"{model} is asked for in vain"


# --- no dead knobs

READ_BY_THE_ENGINE = {
    "update",  # how many responses, passes and steps: the loop's
    "optim",  # the policy's optimiser
    "critic_lr",  # the critic's
}


def other_values(hint: Any, value: Any) -> Iterator[Any]:
    """Values to try instead, some of which may be out of bounds."""
    if get_origin(hint) is Literal:
        yield from (word for word in get_args(hint) if word != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    else:
        yield from (value / 2, value * 1.5, value / 8, 0.5)


def everything_said(algorithm: Any, one: Case) -> list[Tensor]:
    """All outputs on a case, gradients included."""
    verdict = judge(algorithm, one)
    return [*verdict.terms.values(), *verdict.watch.values(), verdict.d_logp, verdict.d_value]


def differs(algorithm: Any, other: Any, one: Case) -> bool:
    """Whether two settings can be told apart by anything they say."""
    if algorithm.sampling() != other.sampling():
        return True
    before, after = everything_said(algorithm, one), everything_said(other, one)
    return any(not torch.allclose(a, b, atol=1e-9, rtol=1e-9) for a, b in zip(before, after, strict=True))


@every
def test_no_hyperparameter_is_dead(name: str) -> None:
    algorithm = shipped(name)
    hints = get_type_hints(type(algorithm))
    for word in {f.name for f in fields(algorithm)} - READ_BY_THE_ENGINE:
        alive = False
        for value in other_values(hints[word], getattr(algorithm, word)):
            try:
                changed = replace(algorithm, **{word: value})
            except ValidationError:
                continue
            alive = alive or any(differs(algorithm, changed, one) for one in cases(name))
        assert alive, f"{name}.{word} changes nothing"


# --- learning

AS_DERIVED: dict[str, dict[str, Any]] = {
    # Moments over the rows of an enumeration would count likely and unlikely responses alike.
    "ppo": {"whiten_advantage": False},
    "dpo_online": {"label": "soft"},  # argmax labels have no optimum
}
"""Settings under which the closed form is the algorithm's own optimum."""


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


@every
@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_learns_pi_ref_exp_r_over_beta(name: str, world: World) -> None:
    algorithm = tuned(name, beta=world.beta, **AS_DERIVED.get(name, {}))
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
    assert gap(v1, v2) <= EXACT
    shipped_v1, shipped_v2 = (judge(tuned(name, clip=0.1), one) for name in P3O)
    assert gap(shipped_v1, shipped_v2) > 1e-3


@pytest.mark.parametrize("name", ["p3o_v1", "p3o_v2", "dpo_online"])
def test_swapping_the_two_responses_swaps_the_gradient_and_nothing_else(name: str) -> None:
    algorithm = tuned(name, **AS_DERIVED.get(name, {}))
    for one in cases(name):
        assert one.now.value is not None
        swapped = {
            f.name: x.flip(1)
            for f in fields(one.rollout)
            if isinstance(x := getattr(one.rollout, f.name), Tensor)
        }
        now = Forward(leaf(one.now.logp.flip(1)), leaf(one.now.value.flip(1)))
        before = judge(algorithm, one)
        after = judge(algorithm, Case(replace(one.rollout, **swapped), now))
        torch.testing.assert_close(after.loss, before.loss, atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(after.d_logp.flip(1), before.d_logp, atol=EXACT, rtol=EXACT)


@every
def test_one_response_drawn_twice_teaches_nothing_to_an_algorithm_that_couples_the_group(
    name: str,
) -> None:
    algorithm = tuned(name, **AS_DERIVED.get(name, {}))
    draws = torch.tensor([[1, 1]])
    rollout = BANDIT.rollout(THETA, draws)
    theta = leaf(THETA + tensor([[0.05, 0.1, 0.0]]))
    now = Forward(BANDIT.logp(theta)[draws], rollout.value_old)
    targets, _ = algorithm.prepare(rollout, {})
    loss = sum(term.sum() for term in algorithm.loss(now, rollout, targets).values())
    size = float(torch.autograd.grad(loss, theta)[0].abs().max())
    assert size <= EXACT if algorithm.couples_group else size > 1e-3
