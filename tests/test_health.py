"""What tells that texts are no longer texts, and what a run says it has spent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlhf_cli.config import compose, recipe
from rlhf_cli.core.rollout import Source
from rlhf_cli.cost import Desk, rollout_flop
from rlhf_cli.evals.health import alarms, distinct, repetition, rouge_l
from rlhf_cli.stages.meter import Meter
from tests.algos.cases import case


def test_repetition_counts_what_a_text_has_said_before() -> None:
    assert repetition("one two three four five") == 0
    # a b c d a b c d: the 4-grams are abcd bcda cdab dabc abcd
    assert repetition("a b c d A, B. c d!") == pytest.approx(1 / 5)
    assert repetition("too few words") == 0 == repetition("")


def test_distinct_bigrams_are_counted_over_all_texts() -> None:
    # the cat | cat sat | the cat | cat ran: three of four
    assert distinct(["the cat sat", "The cat ran."]) == pytest.approx(3 / 4)
    assert math.isnan(distinct(["alone", ""]))


def test_rouge_l_is_that_of_its_paper() -> None:
    """The example of Lin 2004, section 3.1."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("", reference) == 0
    assert rouge_l("the Police, killed THE gunman!", reference) == pytest.approx(2 * 4 / (5 + 4))


START = {"eval/reward": 0.0, "eval/reward_se": 0.05, "eval/length": 20.0, "eval/repetition": 0.02}
START |= {"eval/perplexity_ref": 10.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 48.0}, "responses went from 20 to 48 tokens"),
        ({"length": 9.0}, "responses went from 20 to 9 tokens"),
        ({"perplexity_ref": 4.0}, "their perplexity under the SFT policy went from 10.0 to 4.0"),
        ({"perplexity_ref": 21.0}, "their perplexity under the SFT policy went from 10.0 to 21.0"),
        ({"repetition": 0.3}, "repeated 4-grams went from 2% to 30%"),
    ],
)
def test_a_reward_that_rises_while_texts_fall_apart_is_told_of(
    change: dict[str, float], said: str
) -> None:
    now = {**START, "eval/reward": 1.25, **{f"eval/{k}": v for k, v in change.items()}}
    assert list(alarms(START, now)) == [f"the reward rose by 1.25 while {said}"]
    assert list(alarms(START, {**now, "eval/reward": 0.1})) == []  # within two standard errors


def test_a_reward_that_rises_alone_is_no_alarm() -> None:
    assert list(alarms(START, {**START, "eval/reward": 2.0, "eval/length": 28.0})) == []
    assert list(alarms({}, {**START, "eval/reward": 2.0})) == []


def test_a_meter_adds_up_what_was_drawn_read_and_scored_and_survives_a_stop() -> None:
    made = recipe(compose(["algo=p3o_v2"]))
    sources: tuple[Source, ...] = ("policy", "dataset", "greedy")
    rollout = replace(case(0, prompts=4, responses=3).rollout, source=sources)
    meter = Meter(made, scored=True)
    meter.add(rollout, None, 2.0)
    meter.add(replace(rollout, score=None), rollout, 3.0)
    drawn = float(rollout.mask[:, [0, 2]].sum())
    row = meter.row()
    flops = row.pop("budget/flops")
    assert row == {
        "budget/prompts": 8, "budget/responses": 16, "budget/given": 8 + 12, "budget/tokens": 2 * drawn,
        "budget/scored": 12, "budget/seconds": 5.0,
    }  # fmt: skip
    assert flops > 0
    twin = Meter(made, scored=True)
    assert twin.restore({**meter.state(), "mean": torch.ones(1)}).keys() == {"mean"}
    assert twin.row() == {**row, "budget/flops": flops}


def test_the_flops_of_a_rollout_are_those_of_the_plan_at_the_plans_lengths() -> None:
    """A whole run is its rollouts and its evaluations; the latter are those of a run without rollouts."""
    words = ["algo=ppo", "model=pythia_70m", "data.source=embedded"]
    made = recipe(compose(words))
    data, update = made.data, made.algo.update
    one = rollout_flop(made, True, data.max_prompt_tokens, data.max_response_tokens)
    desk = Desk.longest(made)
    nets = desk.cast(True)
    evaluations = 1 + min(made.eval.points, update.episodes // update.batch)
    measured = [work for each in desk.draws(nets, 0, evaluations) for work in desk.draw(each)]
    measured += desk.passes(nets, 0, evaluations)
    rest = sum(work.flop for work in measured)
    assert desk.rl(True).flop == pytest.approx(update.episodes // update.batch * one + rest)
    half = rollout_flop(made, True, data.max_prompt_tokens / 2, data.max_response_tokens / 2)
    assert 0.2 < half / one <= 0.5
