"""What the engine does for algorithms beside averaging: sources, a second stream, replay, a head start."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.masked import denominators
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.data.corpus import Corpus, Demo, Pair, Split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.forward import Rows, in_parts
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.world import World, start
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor, Scorer, log_probs, next_logits
from rlhf_cli.models.load import new_policy, new_reward_model, zero_head
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.recipes import Drawing, Model, Optim, Scratch, Tuning
from rlhf_cli.stages.feed import Feed
from rlhf_cli.stages.replay import Replay
from tests.algos.cases import case
from tests.world_script import a_launch

LONGEST = 12
ASKED = [Asked(list(range(5, 5 + n))) for n in (3, 9, 5, 7)]
OPTIM = Optim(1e-2, "constant", 0.0, (0.9, 0.95), 1e-8, 0.0, 1.0)


def shape(seed: int) -> Model:
    return Model(
        "tiny", "nano", Scratch(2, 32, 2, 300, 64, seed), None, None, "fp32", Tuning(None, None)
    )


@pytest.fixture(scope="module")
def world() -> World:
    return start(60)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat and the dog lay by the door"], 300, 64)


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    return new_policy(shape(3), tokenizer)


@pytest.fixture(scope="module")
def collector(world: World, tokenizer: Any) -> Collector:
    """With a reference that is not the policy, and a reward model."""
    ref = new_policy(shape(4), tokenizer)
    scorer = Scorer(new_reward_model(shape(5), None, tokenizer, 1))
    return Collector(world, tokenizer, Judges(ref, scorer, ref), 8, LONGEST, 1)


def collect(collector: Collector, model: Any, asked: list[Asked], **sampling: Any) -> Rollout:
    actor = model if isinstance(model, Actor) else Actor(model)
    return collector.collect(actor, asked, Sampling(**sampling), "train", 0)[0]


def responses(rollout: Rollout) -> Tensor:
    """[P,G,T] ids."""
    return rollout.tokens[..., -LONGEST:]


# --- where responses come from


def test_policy_and_reference_answer_side_by_side_each_with_its_own_law(
    collector: Collector, policy: Any
) -> None:
    both = collect(collector, policy, ASKED, policy=1, ref=1)
    assert both.source == ("policy", "ref")
    drawn_alike = [collect(collector, m, ASKED, policy=2) for m in (policy, collector.judges.ref)]
    for place, rollout in enumerate(drawn_alike):  # the same random numbers, one law each
        assert torch.equal(responses(both)[:, place], responses(rollout)[:, place])
        assert not torch.equal(responses(both)[:, 1 - place], responses(rollout)[:, 1 - place])


def test_greedy_takes_the_likeliest_token_at_every_step(collector: Collector, policy: Any) -> None:
    rollout = collect(collector, policy, ASKED, policy=1, greedy=1)
    tokens, attention = (x[:, 1] for x in (rollout.tokens, rollout.attention))
    best = next_logits(policy, tokens, attention, LONGEST).argmax(-1)
    mask = rollout.mask[:, 1].bool()
    assert torch.equal(best[mask], responses(rollout)[:, 1][mask])


@pytest.mark.parametrize(("share", "like"), [(0.0, "policy"), (1.0, "ref")])
def test_a_mixture_with_all_weight_on_one_is_that_one(
    collector: Collector, policy: Any, share: float, like: str
) -> None:
    mixed = collect(collector, policy, ASKED, mixture=1, mixture_ref=share)
    pure = collect(collector, policy, ASKED, **{like: 1})
    assert torch.equal(mixed.tokens, pure.tokens)


def test_a_mixture_is_drawn_from_the_normalised_product(collector: Collector, policy: Any) -> None:
    share = 0.3
    one = [Asked(ASKED[0].prompt)] * 4000
    short = replace(collector, max_response_tokens=1, micro_batch=512)
    drawn = collect(short, policy, one, mixture=1, mixture_ref=share).tokens[:, 0, -1]
    ids = torch.tensor([[*ASKED[0].prompt, 0]])
    real = torch.ones_like(ids, dtype=torch.bool)
    logs = [
        next_logits(m, ids, real, 1)[0, 0].log_softmax(-1) for m in (policy, collector.judges.ref)
    ]
    law = ((1 - share) * logs[0] + share * logs[1]).softmax(-1)
    seen = torch.bincount(drawn, minlength=len(law)) / len(drawn)
    assert (seen - law).abs().max() < 0.02  # four standard errors of the likeliest token


def test_given_responses_are_laid_out_as_drawn_ones_are(collector: Collector, policy: Any) -> None:
    """A drawn response, handed in as a demonstration, is judged as it was when drawn."""
    drawn = collect(collector, policy, ASKED, policy=1)
    kept = [
        Asked(asked.prompt, (ids[m.bool()].tolist(),))
        for asked, ids, m in zip(ASKED, responses(drawn)[:, 0], drawn.mask[:, 0], strict=True)
    ]
    given = collect(collector, policy, kept, demo=1)
    for word in ("tokens", "attention", "mask", "logp_old", "logp_ref", "score"):
        torch.testing.assert_close(getattr(given, word), getattr(drawn, word), atol=1e-6, rtol=1e-6)
    assert given.source == ("demo",)


def test_temperature_divides_the_logits_in_drawing_and_in_every_log_probability(
    collector: Collector, policy: Any
) -> None:
    """A policy at temperature 2 is the policy whose output layer is halved, at temperature 1."""
    hot = replace(collector, drawing=Drawing(temperature=2.0, noise=0.0))
    halved = [copy.deepcopy(m) for m in (policy, collector.judges.ref)]
    for each in halved:
        each.get_output_embeddings().weight.data /= 2
    cold = replace(collector, judges=replace(collector.judges, ref=halved[1]))
    ours = collect(hot, policy, ASKED, policy=2, ref=1)
    theirs = collect(cold, halved[0], ASKED, policy=2, ref=1)
    for word in ("tokens", "mask", "logp_old", "logp_ref"):
        torch.testing.assert_close(getattr(ours, word), getattr(theirs, word), atol=1e-5, rtol=1e-5)
    said = Actor(policy, temperature=2.0)(ours.tokens[:, 0], ours.attention[:, 0], LONGEST)
    torch.testing.assert_close(said["logp"] * ours.mask[:, 0], ours.logp_old[:, 0])


def test_noise_of_the_scores_is_normal_and_changes_nothing_else(
    collector: Collector, policy: Any
) -> None:
    many = ASKED * 50
    plain = collect(collector, policy, many, policy=2)
    noisy = collect(replace(collector, drawing=Drawing(1.0, 3.0)), policy, many, policy=2)
    added = noisy.score - plain.score  # type: ignore[operator]
    assert torch.equal(noisy.tokens, plain.tokens) and torch.equal(noisy.coin, plain.coin)
    assert abs(added.mean()) < 4 * 3.0 / 20 and abs(added.std() - 3.0) < 4 * 3.0 / 28
    again = collect(replace(collector, drawing=Drawing(1.0, 3.0)), policy, many, policy=2)
    assert torch.equal(again.score, noisy.score)  # type: ignore[arg-type]


def test_an_unended_response_may_pay_a_penalty_instead_of_getting_a_fixed_score(
    collector: Collector, policy: Any
) -> None:
    plain, less = (
        collect(replace(collector, unended=-1.0, unended_adds=adds), policy, ASKED, policy=4)
        for adds in (False, True)
    )
    raw = collect(collector, policy, ASKED, policy=4)
    cut = collector.ended(raw) == 0
    assert cut.any()
    assert (plain.score[cut] == -1).all()  # type: ignore[index]
    torch.testing.assert_close(less.score[cut], raw.score[cut] - 1)  # type: ignore[index]


def test_scores_may_be_those_of_the_reward_model_that_learns(
    collector: Collector, policy: Any, tokenizer: Any
) -> None:
    actor = Actor(policy, reward=new_reward_model(shape(9), None, tokenizer, 2))
    learned = collect(replace(collector, learned_reward=True), actor, ASKED, policy=2)
    frozen = collect(collector, actor, ASKED, policy=2)
    said = actor(learned.tokens[:, 0], learned.attention[:, 0], LONGEST)
    torch.testing.assert_close(said["score"], learned.score[:, 0])  # type: ignore[index]
    assert not torch.allclose(learned.score, frozen.score)  # type: ignore[arg-type]


# --- rows


def corpus() -> Corpus:
    pairs = tuple(Pair(f"q{i}", f" good{i}", f" bad{i}") for i in range(5))
    demos = tuple(Demo(f"d{i}", f" demo{i}") for i in range(3))
    split = Split(demos, pairs, tuple(f"p{i}" for i in range(4)))
    return Corpus("toy", split, split, {}, None)


def uncut(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, 8, 16, lambda _: None)


def fed(tokenizer: Any, **sampling: int) -> list[tuple[str, ...]]:
    feed = Feed(corpus(), uncut(tokenizer), Sampling(**sampling), 1)
    return [
        tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in (a.prompt, *a.given))
        for a in feed.batch(5, 0)
    ]


def test_a_stream_reads_the_rows_its_sources_come_from(tokenizer: Any) -> None:
    assert all(len(row) == 1 and row[0][0] == "p" for row in fed(tokenizer, policy=2))
    for prompt, answer in fed(tokenizer, policy=1, demo=1):
        assert answer == f" demo{prompt[1:]}"
    rows = fed(tokenizer, dataset=2, mismatch=1)
    assert {row[0] for row in rows} == {f"q{i}" for i in range(5)}
    for prompt, chosen, rejected, other in rows:
        assert (chosen, rejected) == (f" good{prompt[1:]}", f" bad{prompt[1:]}")
        assert other.startswith(" good") and other != chosen


def test_a_stream_without_rows_is_one_sentence(tokenizer: Any) -> None:
    empty = Split((), (), ("p",))
    bare = Corpus("toy", empty, empty, {}, None)
    feed = Feed(bare, uncut(tokenizer), Sampling(dataset=2), 1)
    with pytest.raises(UserError, match="data=toy has no rows"):
        feed.batch(4, 0)


# --- replay


def test_replay_draws_prompts_evenly_out_of_the_newest_rollouts() -> None:
    replay = Replay(most=3, seed=1)
    rollouts = [case(i, prompts=4).rollout for i in range(5)]
    back = [replay.exchange(r, i) for i, r in enumerate(rollouts)]
    assert torch.equal(back[0].score.sort(0)[0], rollouts[0].score.sort(0)[0])  # type: ignore[union-attr]
    assert len(replay.kept) == 3 and back[4].mask.shape == rollouts[4].mask.shape
    pool = torch.cat([r.score for r in rollouts[2:]])  # type: ignore[misc]
    found = [(pool == row).all(-1).nonzero().item() for row in back[4].score]  # type: ignore[union-attr]
    assert len(set(found)) == 4 and max(found) // 4 != min(found) // 4


def test_a_replay_comes_out_of_a_checkpoint_as_it_went_in() -> None:
    replay = Replay(most=2, seed=1)
    for i in range(3):
        replay.exchange(case(i).rollout, i)
    saved = {**replay.state(), "beta": torch.tensor(0.5)}
    other = Replay(most=2, seed=1)
    rest = other.restore(saved, ("policy", "policy"))
    assert rest.keys() == {"beta"}
    one, two = (r.exchange(case(7).rollout, 9) for r in (replay, other))
    assert torch.equal(one.score, two.score) and one.source == two.source  # type: ignore[arg-type]
    assert Replay(most=1, seed=1).state() == {}


def test_joining_rollouts_of_different_widths_pads_prompts_on_the_left(
    collector: Collector, policy: Any
) -> None:
    short, long = (collect(collector, policy, ASKED[i : i + 1], policy=2) for i in (0, 1))
    joined = Rollout.join([short, long])
    for at, one in enumerate((short, long)):
        tokens, attention = (x[at] for x in (joined.tokens, joined.attention))
        logp = log_probs(policy, tokens, attention, LONGEST) * one.mask[0]
        torch.testing.assert_close(logp, one.logp_old[0], atol=1e-5, rtol=1e-5)


# --- who learns, and who follows


def learner(actor: Actor, world: World, **rates: float) -> Learner:
    return Learner(actor, OPTIM, 4, a_launch(micro_batch=8), world, "fp32", rates)


def stepped(made: Learner, rollout: Rollout, only: str | None) -> None:
    flat = (rollout.tokens[:, 0], rollout.attention[:, 0], rollout.mask[:, 0])

    def judge(part: Rows) -> Judged:
        said = made.engine(part.tokens, part.attention, part.length)
        policy, value = (said[w].unsqueeze(1) for w in ("logp", "value"))
        scale = 0.0 if only else 1.0
        mask = part.mask.unsqueeze(1)
        terms = {"policy": -policy * scale, "value": value**2}
        return Judged(terms, {}, mask, denominators(rollout.mask))

    made.step(list(in_parts(*flat, 8)), judge, only)


def test_a_critic_that_learns_alone_leaves_the_policy_bit_identical(
    collector: Collector, policy: Any, tokenizer: Any, world: World
) -> None:
    decays = replace(OPTIM, weight_decay=0.1)
    critic = new_reward_model(shape(5), None, tokenizer, 1)
    actor = Actor(copy.deepcopy(policy), critic)
    before = copy.deepcopy(actor.state_dict())
    made = Learner(
        actor,
        decays,
        4,
        a_launch(micro_batch=8),
        world,
        "fp32",
        {"critic": 1e-2},
    )
    rollout = collect(collector, policy, ASKED, policy=1)
    stepped(made, rollout, only="critic")
    after = actor.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"critic"}
    before = copy.deepcopy(actor.state_dict())
    stepped(made, rollout, only=None)
    after = actor.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"critic", "policy"}


def test_a_q_network_starts_at_0_and_its_copy_follows_slowly(
    policy: Any, world: World, tokenizer: Any
) -> None:
    actor = Actor(copy.deepcopy(policy), q=zero_head(copy.deepcopy(policy)))
    ids = torch.tensor([[5, 6, 7, 8]])
    real = torch.ones_like(ids, dtype=torch.bool)
    said = actor(ids, real, 2)
    assert said["q"].abs().max() == 0 and said["q_taken"].shape == (1, 2)
    assert actor.policy.get_output_embeddings().weight.abs().max() > 0
    made = learner(actor, world, q=1e-2)
    weight = actor.q.get_output_embeddings().weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.fill_(2.0)
    made.follow("q", "q_target", keep=0.75)
    follower = actor.q_target.get_output_embeddings().weight  # type: ignore[union-attr]
    torch.testing.assert_close(follower, torch.full_like(follower, 0.5))
    assert not follower.requires_grad


# --- scores relative to the data's own answers


def test_a_relative_score_is_what_a_response_scores_above_the_datas_answer(
    collector: Collector, policy: Any
) -> None:
    answers = [[7, 8, 9, 1], [6, 1], [5, 5, 1], [11, 12, 13, 14, 1]]
    against = [replace(each, answer=answer) for each, answer in zip(ASKED, answers, strict=True)]
    plain = collect(collector, policy, ASKED, policy=3).score
    relative = collect(collector, policy, against, policy=3).score
    reward = collector.judges.reward
    assert plain is not None and relative is not None and reward is not None
    for row, (each, answer) in enumerate(zip(ASKED, answers, strict=True)):
        text = torch.tensor([[*each.prompt, *answer]])
        own = reward(text, torch.ones_like(text).bool()).item()
        assert (plain[row] - relative[row]).tolist() == pytest.approx([own] * 3, abs=1e-5)


def test_the_feed_gives_each_prompt_its_first_demonstration_or_else_its_preferred_response(
    tokenizer: Any,
) -> None:
    demos = (Demo("the cat", " sat"), Demo("the cat", " on the mat"))
    pairs = (Pair("the cat", " lay", " by"), Pair("the dog", " lay by", " sat"))
    split = Split(demos, pairs, ("the cat", "the dog"))
    corpus = Corpus("two", split, split, {}, None)
    encoder = Encoder(tokenizer, 20, LONGEST, lambda prompt: None)
    asked = Feed(corpus, encoder, Sampling(policy=2), 1, relative=True).batch(2, 0)
    expected = {"the cat": encoder.response(" sat"), "the dog": encoder.response(" lay by")}
    assert {each.text: each.answer for each in asked} == expected
    plain = Feed(corpus, encoder, Sampling(policy=2), 1).batch(2, 0)
    assert [each.answer for each in plain] == [None, None]
