"""The engine on one process: what is drawn, what is scored, what is learned, what is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.masked import denominators
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.forward import Rows, in_parts, per_token
from rlhf_cli.engine.learner import Judged, Learner, schedule
from rlhf_cli.engine.order import batch_at, shuffled
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.sampler import Expert, draw, inverse_cdf, uniforms
from rlhf_cli.engine.world import World, start
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor, Critic, Scorer, log_probs
from rlhf_cli.models.load import (
    load_policy,
    load_reward_model,
    new_policy,
    new_reward_model,
)
from rlhf_cli.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_cli.recipes import Launch, Model, Optim, Scratch, Tuning
from tests.world_script import a_launch

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 5, 7)]
LONGEST = 12


@pytest.fixture(scope="module")
def world() -> World:
    return start(60)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog lay by the door"], 300, 64)


@pytest.fixture
def model() -> Model:
    scratch = Scratch(layers=2, width=32, heads=2, vocab=300, context=64, seed=3)
    return Model("tiny", "nano", scratch, None, None, "fp32", Tuning(None, None))


@pytest.fixture
def policy(model, tokenizer):
    return new_policy(model, tokenizer)


def optim(**changes) -> Optim:
    values = {"lr": 1e-2, "schedule": "constant", "warmup": 0.0, "betas": (0.9, 0.95)}
    return Optim(**{**values, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0, **changes})


def launch(micro_batch: int = 8) -> Launch:
    return a_launch(micro_batch=micro_batch)


def drawn(policy, tokenizer, rows=range(8), prompts=PROMPTS, responses=2):
    uniform = uniforms(1, "train", 0, list(rows), LONGEST)
    return draw(
        [Expert(policy)],
        prompts,
        responses,
        uniform,
        10,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_a_response_does_not_depend_on_what_else_is_in_the_batch(policy, tokenizer):
    whole = drawn(policy, tokenizer)
    alone = drawn(policy, tokenizer, rows=[2, 3], prompts=PROMPTS[1:2])
    assert torch.equal(alone.tokens, whole.tokens[2:4])
    assert torch.equal(alone.mask, whole.mask[2:4])


def test_the_responses_to_one_prompt_differ_from_each_other(policy, tokenizer):
    tokens = drawn(policy, tokenizer).tokens
    assert not torch.equal(tokens[0], tokens[1])


def test_what_is_drawn_follows_the_policys_own_probabilities(policy, tokenizer):
    """The uniform of each token falls into the interval that the full forward pass gives it."""
    sample = drawn(policy, tokenizer)
    tokens, attention = sample.tokens.clone(), sample.attention.clone()
    uniform = uniforms(1, "train", 0, range(8), LONGEST)
    with torch.no_grad():
        positions = (attention.long().cumsum(-1) - 1).clamp_min(0)
        logits = policy(
            input_ids=tokens, attention_mask=attention.long(), position_ids=positions
        ).logits
    cumulative = logits[:, -LONGEST - 1 : -1].double().softmax(-1).cumsum(-1)
    chosen = tokens[:, -LONGEST:].unsqueeze(-1)
    high = cumulative.gather(-1, chosen).squeeze(-1)
    low = (cumulative - logits[:, -LONGEST - 1 : -1].double().softmax(-1)).gather(-1, chosen)
    inside = (low.squeeze(-1) - 1e-5 <= uniform) & (uniform <= high + 1e-5)  # fp32 rounding
    assert inside[sample.mask.bool()].all()


def test_inverse_cdf_never_picks_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]]).expand(3, -1)
    picked, _ = inverse_cdf(logits, torch.tensor([0.0, 0.49, 0.999999]))
    assert picked.tolist() == [1, 1, 3]


def test_inverse_cdf_has_the_softmax_as_its_frequencies():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    grid = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(inverse_cdf(logits.expand(len(grid), -1), grid)[0], minlength=4)
    assert torch.allclose(counts / len(grid), logits.softmax(0), atol=2e-5)  # 1/n of the grid


def test_nothing_follows_the_end_token_and_the_end_token_counts(policy, tokenizer):
    end = tokenizer.eos_token_id
    with torch.no_grad():
        policy.get_output_embeddings().weight[end] *= 40
    sample = drawn(policy, tokenizer)
    response = sample.tokens[:, 10:]
    lengths = sample.mask.sum(-1).long()
    stopped = [row for row in range(8) if lengths[row] < LONGEST]
    assert stopped
    for row in stopped:
        assert response[row, lengths[row] - 1] == end
        assert (response[row, lengths[row] :] == tokenizer.pad_token_id).all()
    assert torch.equal(sample.attention[:, 10:], sample.mask.bool())


@pytest.mark.parametrize("most", [1, 3, 8])
def test_parts_of_any_size_give_the_same_log_probabilities(policy, tokenizer, most):
    sample = drawn(policy, tokenizer)
    batch = sample.tokens.clone(), sample.attention.clone(), sample.mask.clone()

    def ask(part: Rows) -> Tensor:
        return log_probs(policy, part.tokens, part.attention, part.length)

    whole = torch.zeros_like(batch[2])
    with torch.no_grad():
        whole = log_probs(policy, batch[0], batch[1], LONGEST) * batch[2]
    assert torch.allclose(per_token(ask, *batch, most), whole, atol=2e-6)  # fp32 sums


def test_parts_keep_groups_together_and_lose_no_row(policy, tokenizer):
    sample = drawn(policy, tokenizer)
    parts = list(in_parts(sample.tokens, sample.attention, sample.mask, 3, group=2))
    seen = list(itertools.chain.from_iterable(part.index.tolist() for part in parts))
    assert sorted(seen) == list(range(8))
    assert all(a % 2 == 0 and b == a + 1 for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_padding_changes_no_score_and_no_value(policy, model, tokenizer, tmp_path):
    checkpoint.save_final(tmp_path / "final", policy, tokenizer, "")
    scorer = Scorer(new_reward_model(model, tmp_path / "final", tokenizer, 1))
    ids = torch.tensor([[7, 8, 9, 10]])
    real = torch.ones_like(ids, dtype=torch.bool)
    padded = torch.nn.functional.pad(ids, (3, 2), value=tokenizer.pad_token_id)
    attention = torch.nn.functional.pad(real, (3, 2))
    with torch.no_grad():
        assert torch.allclose(scorer(ids, real), scorer(padded, attention), atol=1e-6)  # fp32
        critic = Critic(scorer.model)
        value = critic(padded, attention, 4)[:, :2]
        assert torch.allclose(critic(ids, real, 2), value, atol=1e-6)


def test_a_reward_model_without_its_head_is_refused(policy, tokenizer, tmp_path):
    checkpoint.save_final(tmp_path / "final", policy, tokenizer, "")
    with pytest.raises(UserError, match=r"score\.weight"):
        load_reward_model(tmp_path / "final", "fp32", tokenizer)


def test_a_final_folder_reloads_with_equal_weights_and_the_same_tokens(policy, tokenizer, tmp_path):
    checkpoint.save_final(tmp_path / "final", policy, tokenizer, "---\n---\ncard")
    again = load_tokenizer(tmp_path / "final")
    assert again("the cat\n\n sat")["input_ids"] == tokenizer("the cat\n\n sat")["input_ids"]
    assert again.decode(again("\n\nthe Cat é")["input_ids"]) == "\n\nthe Cat é"
    loaded = load_policy(tmp_path / "final", "fp32", again)
    theirs, ours = loaded.state_dict(), policy.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def learned(policy, tokenizer, world, micro_batch, steps=2):
    """Losses and weights after `steps` steps of maximum likelihood on drawn responses."""
    sample = drawn(policy, tokenizer)
    tokens, attention, mask = (t.clone() for t in (sample.tokens, sample.attention, sample.mask))
    learner = Learner(Actor(policy), optim(), steps, launch(micro_batch), world, "fp32")

    counts = denominators(mask.unsqueeze(1))

    def judge(part: Rows) -> Judged:
        logp = learner.engine(part.tokens, part.attention, part.length)["logp"]
        return Judged({"policy": -logp.unsqueeze(1)}, {}, part.mask.unsqueeze(1), counts)

    losses = [
        learner.step(list(in_parts(tokens, attention, mask, micro_batch)), judge)
        for _ in range(steps)
    ]
    return learner, losses


def test_one_micro_batch_of_eight_equals_eight_of_one(model, tokenizer, world):
    _, whole = learned(new_policy(model, tokenizer), tokenizer, world, 8)
    _, split = learned(new_policy(model, tokenizer), tokenizer, world, 1)
    for one, other in zip(whole, split, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert whole[1]["loss"] < whole[0]["loss"]


def test_a_resumed_learner_takes_the_very_step_the_first_would_have_taken(
    model, tokenizer, world, tmp_path
):
    first, _ = learned(new_policy(model, tokenizer), tokenizer, world, 8)
    state = {"beta": torch.tensor(0.25)}
    checkpoint.save(tmp_path, first, world, state, {"wall": 3.5}, keep=2)
    other = Learner(Actor(new_policy(model, tokenizer)), optim(), 2, launch(), world, "fp32")
    found = checkpoint.resume(tmp_path, other)
    assert found is not None
    assert found[0]["beta"] == 0.25
    assert found[1]["wall"] == 3.5
    assert other.step_index == 2
    sample = drawn(new_policy(model, tokenizer), tokenizer)
    tokens, attention, mask = (t.clone() for t in (sample.tokens, sample.attention, sample.mask))

    def step(learner: Learner) -> dict[str, float]:
        counts = denominators(mask.unsqueeze(1))

        def judge(part: Rows) -> Judged:
            logp = learner.engine(part.tokens, part.attention, part.length)["logp"]
            return Judged({"policy": -logp.unsqueeze(1)}, {}, part.mask.unsqueeze(1), counts)

        return learner.step(list(in_parts(tokens, attention, mask, 8)), judge)

    assert step(first) == step(other)
    ours, theirs = first.engine.module.state_dict(), other.engine.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_response_that_does_not_end_scores_what_the_recipe_says(policy, model, tokenizer, world):
    end = tokenizer.eos_token_id
    with torch.no_grad():
        policy.get_output_embeddings().weight[end] *= 20
    scorer = Scorer(new_reward_model(model, None, tokenizer, 1))
    raw, kept = (
        Collector(world, tokenizer, Judges(None, scorer), 8, LONGEST, 1, unended).collect(
            Actor(policy), list(map(Asked, PROMPTS)), Sampling(policy=4), "train", 0
        )[0]
        for unended in (None, -1.0)
    )
    ids = kept.tokens[..., -LONGEST:]
    ended = ((ids == end) & kept.mask.bool()).any(-1)
    assert 0 < ended.sum() < ended.numel()
    assert (kept.score[~ended] == -1.0).all()
    assert torch.equal(kept.score[ended], raw.score[ended])
    assert (raw.score[~ended] != -1.0).all()


def test_only_the_two_newest_checkpoints_stay(model, tokenizer, world, tmp_path):
    learner, _ = learned(new_policy(model, tokenizer), tokenizer, world, 8)
    for step in (2, 4, 6):
        learner.step_index = step
        checkpoint.save(tmp_path, learner, world, {}, {"wall": 0.0}, keep=2)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["000004", "000006"]


def test_the_learning_rate_warms_up_and_decays_as_documented():
    linear = optim(schedule="linear", warmup=0.2)
    assert [round(schedule(linear, s, 10), 6) for s in (0, 1, 2, 9)] == [0.5, 0.9, 0.8, 0.1]
    assert schedule(optim(schedule="cosine"), 5, 10) == pytest.approx(0.5)
    assert schedule(optim(), 9, 10) == 1.0


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    rows = [batch_at(6, 4, step, seed=1).tolist() for step in range(3)]
    flat = list(itertools.chain.from_iterable(rows))
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] != flat[6:]
    assert shuffled(5, 1, 2).tolist() == shuffled(5, 1, 2).tolist()
