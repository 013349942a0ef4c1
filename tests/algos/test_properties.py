"""What every algorithm in conf/algo promises, whatever its formula."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf_cli.core.algorithm import Model
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import Forward
from tests.algos.cases import Case, Verdict, case, dialogue, judge, judge_side, leaves, twinned
from tests.algos.discovery import FOLDER, NAMES, oracle, shipped
from tests.algos.toys import leaf, tensor

EXACT = 1e-12
"""The same float64 numbers, added in another order."""

every = pytest.mark.parametrize("name", NAMES)


def cases(name: str) -> list[Case]:
    """Near the sampler, outside the clip, and a duplicated response."""
    sampling = shipped(name).sampling()
    drawn = [case(s, sampling=sampling, spread=x) for s, x in ((1, 0.05), (2, 0.3), (3, 1.5))]
    return [*drawn, twinned(case(4, sampling=sampling))]


def levelled(name: str) -> Case:
    """All responses to the first prompt score alike."""
    one = cases(name)[1]
    assert one.rollout.score is not None
    score = one.rollout.score.clone()
    score[0] = score[0, 0]
    return one.with_rollout(score=score)


def scope(one: Case) -> tuple[Tensor, dict[int, float]]:
    """The mask and its denominators."""
    return one.rollout.mask, denominators(one.rollout.mask)


def gap(one: Verdict, other: Verdict) -> float:
    """Largest difference between two gradients."""
    return max(
        float((slope - other.slopes[word]).abs().max()) for word, slope in one.slopes.items()
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
        policy = "logps" if Model.Q in shipped(name).needs else "logp"
        assert verdict.slopes[policy].abs().max() > 1e-6


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
            for word, slope in bare.slopes.items():
                if slope.dim() < 3:
                    torch.testing.assert_close(wide.slopes[word], slope, atol=EXACT, rtol=EXACT)
                    continue
                kept, past = wide.slopes[word].split([tokens, 3], dim=2)
                torch.testing.assert_close(kept, slope, atol=EXACT, rtol=EXACT)
                assert past.abs().max() == 0, word
            watched = averages(wide.watch, *scope(one.with_columns(fill)))
            for word, value in averages(bare.watch, *scope(one)).items():
                torch.testing.assert_close(watched[word], value, atol=1e-6, rtol=0)


@every
def test_neither_the_order_of_prompts_nor_that_of_draws_from_one_source_matters(name: str) -> None:
    algorithm = shipped(name)
    for one in cases(name)[:3]:
        sources = one.rollout.source
        drawn = [g for g, s in enumerate(sources) if s in ("policy", "ref", "mixture")]
        kinds = [sources[g] for g in drawn]
        swapped = {g: drawn[len(drawn) - 1 - i] for i, g in enumerate(drawn)}
        same = {g: to if kinds == kinds[::-1] else g for g, to in swapped.items()}
        columns = [same.get(g, g) for g in range(len(sources))]
        before = judge(algorithm, one)
        for axis, order in ((0, [2, 0, 3, 1]), (1, columns)):
            change = partial(torch.index_select, dim=axis, index=torch.tensor(order))
            after = judge(algorithm, one.mapped(change))
            torch.testing.assert_close(after.loss, before.loss, atol=EXACT, rtol=1e-11)
            torch.testing.assert_close(after.d_logp, change(before.d_logp), atol=EXACT, rtol=1e-10)


@every
def test_targets_of_a_padded_rollout_fit_its_trimmed_copy(name: str) -> None:
    algorithm = shipped(name)
    for one in cases(name):
        wide = one.with_columns(lambda x: x + 3.7)
        tokens = one.rollout.mask.shape[-1]
        targets, _ = algorithm.prepare(wide.rollout, {})
        before = algorithm.loss(wide.now, wide.rollout, targets)
        after = algorithm.loss(one.now, wide.rollout.trim(tokens), targets.trim(tokens))
        for word, term in after.items():
            kept = before[word][..., :tokens] if term.dim() == 3 else before[word]
            torch.testing.assert_close(term, kept, atol=EXACT, rtol=EXACT)


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
        mask, counts = scope(one)
        whole = averages(algorithm.loss(one.now, one.rollout, targets), mask, counts)
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
    one, twin = (case(7, sampling=algorithm.sampling()) for _ in range(2))
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


FILLS = {
    Model.REF: "logp_ref",
    Model.REWARD: "score",
    Model.CRITIC: "value_old",
    Model.GUIDE: "logp_guide",
    Model.Q: "value_old",
}
"""Which tensor of the rollout each model fills."""


def said_to(algorithm: Any, one: Case) -> Case:
    """The case with only what the engine would fill for this algorithm."""
    filled = {word for model, word in FILLS.items() if model in algorithm.needs}
    absent = {word: None for word in FILLS.values() if word not in filled}
    has_q = Model.Q in algorithm.needs
    asked = {
        "logp": True,
        "value": Model.CRITIC in algorithm.needs,
        "entropy": algorithm.wants_entropy(),
        "score": algorithm.trains_reward,
        **dict.fromkeys(("logps", "logps_ref", "q", "q_taken"), has_q),
    }
    now = Forward(**{word: x for word, x in leaves(one.now).items() if asked[word]})
    return replace(one.with_rollout(**absent), now=now)


@every
def test_tensors_it_did_not_ask_for_are_not_read(name: str) -> None:
    algorithm = shipped(name)
    one = case(1, sampling=algorithm.sampling())
    bare = judge(algorithm, said_to(algorithm, one))
    for word, slope in judge(algorithm, one).slopes.items():
        if word in bare.slopes:
            assert torch.equal(bare.slopes[word], slope)
    if algorithm.side().responses:
        other = case(2, sampling=algorithm.side())
        full = judge_side(algorithm, other).d_logp
        assert torch.equal(judge_side(algorithm, said_to(algorithm, other)).d_logp, full)


@every
def test_models_it_asked_for_matter(name: str) -> None:
    algorithm = shipped(name)
    for model in algorithm.needs & FILLS.keys():
        # In several cases, since what only counts by rank may stay in order in one of them.
        main = max(main_gap(algorithm, one, FILLS[model]) for one in cases(name))
        assert max(main, side_gap(algorithm, FILLS[model])) > 1e-6, f"{model} is asked for in vain"


def main_gap(algorithm: Any, one: Case, word: str) -> float:
    """How far another `word` of the rollout moves the gradients."""
    value = getattr(one.rollout, word)
    wave = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).sin()
    moved = one.with_rollout(**{word: value + wave})
    if word == "logp_ref":
        # The reference speaks of all tokens too, to those who asked for a Q network.
        assert one.now.logps_ref is not None
        whole = one.now.logps_ref + wave.unsqueeze(-1) * torch.arange(3)
        moved = replace(moved, now=replace(moved.now, logps_ref=leaf(whole)))
    return gap(judge(algorithm, one), judge(algorithm, moved))


def side_gap(algorithm: Any, word: str) -> float:
    """How far another `word` of the rollout moves the gradients of the second stream, if any."""
    if not algorithm.side().responses:
        return 0.0
    one = case(2, sampling=algorithm.side())
    value = getattr(one.rollout, word)
    wave = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).sin()
    moved = one.with_rollout(**{word: value + wave})
    return gap(judge_side(algorithm, one), judge_side(algorithm, moved))


# --- the second stream


@every
def test_the_second_stream_is_silent_on_padding_and_named_apart(name: str) -> None:
    algorithm = shipped(name)
    if not algorithm.side().responses:
        assert algorithm.side_loss(case(1).now, case(1).rollout) == {}
        return
    one = case(3, sampling=algorithm.side())
    bare = judge_side(algorithm, one)
    wide = judge_side(algorithm, one.with_columns(lambda x: x + 3.7))
    tokens = one.rollout.mask.shape[-1]
    torch.testing.assert_close(wide.d_logp[..., :tokens], bare.d_logp, atol=EXACT, rtol=EXACT)
    assert wide.d_logp[..., tokens:].abs().max() == 0
    main = judge(algorithm, case(3, sampling=algorithm.sampling()))
    assert not main.terms.keys() & bare.terms.keys()


# --- no dead knobs

READ_BY_THE_ENGINE = {
    "update",  # how many responses, passes and steps: the loop's
    "optim",  # the policy's optimiser
    "critic_lr",  # the critic's
    "critic_rollouts",  # how long the critic learns alone
    "reward_lr",  # the reward model's, where it learns
    "q_lr",  # the Q network's
    "tau",  # how slowly its copy follows
    "replay",  # how many rollouts are kept
    "guide",  # what trains the second policy
}


def other_values(hint: Any, value: Any) -> Iterator[Any]:
    """Values to try instead, some of which may be out of bounds."""
    if get_origin(hint) is Literal:
        yield from (word for word in get_args(hint) if word != value)
    elif isinstance(value, bool):
        yield not value
    elif value is None:
        yield from (0.1, 0.5, 2)
    elif isinstance(value, int):
        yield value + 1
    else:
        yield from (value / 2, value * 1.5, value / 8, 0.5, value + 1)


def everything_said(algorithm: Any, one: Case) -> list[Tensor]:
    """All outputs on a case, gradients included; of two rollouts, the second knowing the first."""
    _, state = algorithm.prepare(one.rollout, {})
    targets, _ = algorithm.prepare(one.rollout, state)
    later = algorithm.loss(one.now, one.rollout, targets)
    verdict = judge(algorithm, one)
    said = [*verdict.terms.values(), *verdict.watch.values(), *later.values()]
    said += verdict.slopes.values()
    if algorithm.side().responses:
        said += algorithm.side_loss(*_side(algorithm)).values()
    return said


def _side(algorithm: Any) -> tuple[Forward, Any]:
    one = case(5, sampling=algorithm.side())
    return one.now, one.rollout


def differs(algorithm: Any, other: Any, one: Case) -> bool:
    """Whether two settings can be told apart by anything they say."""
    if (algorithm.sampling(), algorithm.side()) != (other.sampling(), other.side()):
        return True
    before, after = everything_said(algorithm, one), everything_said(other, one)
    if len(before) != len(after):
        return True
    return any(
        a.shape != b.shape or not torch.allclose(a, b, atol=1e-9, rtol=1e-9)
        for a, b in zip(before, after, strict=True)
    )


@every
def test_no_hyperparameter_is_dead(name: str) -> None:
    under = getattr(oracle(name), "ALIVE_UNDER", {})
    hints = get_type_hints(type(shipped(name)))
    for word in {f.name for f in fields(shipped(name))} - READ_BY_THE_ENGINE:
        algorithm = replace(shipped(name), **under.get(word, {}))
        alive = False
        for value in other_values(hints[word], getattr(algorithm, word)):
            try:
                changed = replace(algorithm, **{word: value})
            except ValidationError:
                continue
            tried = [*cases(name), levelled(name)]
            tried += [dialogue(5)] if Model.Q in algorithm.needs else []
            alive = alive or any(differs(algorithm, changed, one) for one in tried)
        assert alive, f"{name}.{word} changes nothing"
