"""Dialogues: what is drawn, what is replied, what is learned from, and what is paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.returns import at_last_token, gae
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.data.corpus import Reply
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.world import start
from rlhf_cli.models.heads import Actor, log_probs
from rlhf_cli.models.load import new_policy
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.recipes import Model, Scratch, Tuning
from tests.algos.toys import close, tensor

LONGEST = 30
TEXTS = ["the cat", "a dog sat", "mat"]


@dataclass(frozen=True)
class Echo:
    """Says "and the dog" to every turn, pays by its place, and has had enough after three."""

    max_turns: int = 3

    def reply(self, prompt: str, turns: Sequence[str]) -> Reply:
        assert prompt in TEXTS and turns
        done = len(turns) == self.max_turns
        return Reply("" if done else " and the dog", 0.25 * len(turns), done)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat and the dog lay by the door"], 300, 96)


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    made = new_policy(
        Model(
            "tiny", "nano", Scratch(2, 32, 2, 300, 96, 3), None, None, "fp32", Tuning(None, None)
        ),
        tokenizer,
    )
    with torch.no_grad():  # one token in five ends the turn
        made.get_output_embeddings().weight[tokenizer.eos_token_id] *= 30
    return made


@pytest.fixture(scope="module")
def rollout(tokenizer: Any, policy: Any) -> Rollout:
    collector = Collector(
        start(60), tokenizer, Judges(policy, None), 4, LONGEST, seed=1, partner=Echo()
    )
    asked = [Asked(tokenizer(t)["input_ids"], text=t) for t in TEXTS * 4]
    return collector.collect(Actor(policy), asked, Sampling(policy=2), "train", 0)[0]


def streams(rollout: Rollout) -> list[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt ids, stream ids, mask, attention) of each dialogue."""
    rows = zip(
        rollout.tokens.flatten(0, 1),
        rollout.attention.flatten(0, 1),
        rollout.mask.flatten(0, 1),
        strict=True,
    )
    return [
        (ids[:-LONGEST][real[:-LONGEST]].tolist(), ids[-LONGEST:], mask, real[-LONGEST:])
        for ids, real, mask in rows
    ]


def test_dialogues_have_one_to_three_turns_with_replies_between_them(
    rollout: Rollout, tokenizer: Any
) -> None:
    reply = tokenizer(" and the dog")["input_ids"]
    turns = []
    for _, ids, mask, real in streams(rollout):
        own = mask.bool()
        starts = (own & ~torch.cat([torch.tensor([False]), own[:-1]])).nonzero().flatten()
        turns.append(len(starts))
        for start_ in starts[1:].tolist():
            assert ids[start_ - len(reply) : start_].tolist() == reply
            assert ids[start_ - len(reply) - 1] == tokenizer.eos_token_id
            assert not real[start_ - len(reply) - 1]  # the end of a turn is not attended to
    assert {1, 3} <= set(turns) <= {1, 2, 3}


def test_a_turn_is_as_likely_as_after_a_transcript_without_end_tokens(
    rollout: Rollout, policy: Any, tokenizer: Any
) -> None:
    end, checked = tokenizer.eos_token_id, 0
    said = rollout.logp_old.flatten(0, 1)
    for (prompt, ids, mask, _), logp in zip(streams(rollout), said, strict=True):
        context = list(prompt)
        for at in range(LONGEST):
            if mask[at]:
                row = torch.tensor([[*context, int(ids[at])]])
                alone = log_probs(policy, row, torch.ones_like(row).bool(), 1)[0, 0]
                torch.testing.assert_close(logp[at], alone, atol=2e-5, rtol=2e-5)
                checked += 1
            elif ids[at] == tokenizer.pad_token_id and not mask[at:].any():
                break
            if ids[at] != end:
                context.append(int(ids[at]))
    assert checked > 60


def test_what_is_paid_stands_on_the_last_token_of_each_turn(rollout: Rollout) -> None:
    assert rollout.reward is not None and rollout.score is not None
    close(rollout.score, rollout.reward.sum(-1))
    for mask, reward in zip(rollout.mask.flatten(0, 1), rollout.reward.flatten(0, 1), strict=True):
        last = mask.bool() & ~torch.cat([mask[1:].bool(), torch.tensor([False])])
        assert reward[~last].abs().max() == 0
        paid = reward[last].tolist()
        assert paid == [0.25 * (i + 1) for i in range(len(paid))]


def test_the_next_token_of_a_dialogue_is_the_next_of_the_policys_own() -> None:
    """A stream with a reply in the middle has the advantages of the stream without it."""
    reward, value = tensor([0.5, 0.0, 9.0, 9.0, 1.0]), tensor([0.1, 0.2, 7.0, 7.0, 0.3])
    mask = tensor([1, 1, 0, 0, 1])
    own = mask.bool()
    whole = gae(reward, value, mask, gamma=0.9, lam=0.8)
    close(whole[own], gae(reward[own], value[own], mask[own], gamma=0.9, lam=0.8), 1e-12)
    assert whole[~own].abs().max() == 0
    score = tensor([[2.0]])
    close(at_last_token(score, mask.view(1, 1, -1)), [[[0, 0, 0, 0, 2.0]]])
