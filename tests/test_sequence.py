"""Responses that share their prompt in one sequence say what each would say alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_cli.models.heads import Critic, Scorer, log_probs, next_logits
from rlhf_cli.models.sequence import SHARING, sequences, together

PROMPTS, GROUP, LONGEST, WIDTH = 3, 4, 6, 9
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}
COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": None,
}  # fmt: skip


def model(kind: str, head: Any = AutoModelForCausalLM, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SIZES.get(kind, COMMON)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=50, num_labels=1, **ids, **sizes)
    if kind == "gpt_neox":
        config.hidden_dropout = config.attention_dropout = 0.0
    made = head.from_config(config, attn_implementation=attention).eval()
    for parameter in made.parameters():  # far enough from nothing for a wrong position to tell
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def rows() -> tuple[Tensor, Tensor]:
    """[N,L] tokens and attention: prompts of 1 to 9 tokens, responses of 0 to 6."""
    numbers = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 50, (PROMPTS * GROUP, WIDTH + LONGEST), generator=numbers)
    tokens = tokens.unflatten(0, (PROMPTS, GROUP))
    tokens[:, 1:, :WIDTH] = tokens[:, :1, :WIDTH]
    attention = torch.zeros_like(tokens, dtype=torch.bool)
    for prompt, size in enumerate((9, 1, 5)):
        attention[prompt, :, WIDTH - size : WIDTH] = True
        for response, reply in enumerate((6, 3, 0, 1)):
            attention[prompt, response, WIDTH : WIDTH + reply] = True
    return tokens.flatten(0, 1), attention.flatten(0, 1)


def alone(ask: Any, length: int, tokens: Tensor, attention: Tensor) -> list[Tensor]:
    """What is said of each row without padding on its left and without any other row."""
    said = []
    for ids, real in zip(tokens, attention, strict=True):
        first = int(real.long().argmax())
        said.append(ask(ids[None, first:], real[None, first:], length)[0])
    return said


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        (kind, attention)
        for kind in sorted(SHARING)
        for attention in ("eager", "sdpa")
        if (kind, attention) != ("gptj", "sdpa")  # which transformers does not have
    ],
)
def test_a_shared_prompt_changes_no_log_probability_and_no_gradient(kind, attention):
    policy = model(kind, attention=attention)
    tokens, real = rows()
    assert together(policy, WIDTH, LONGEST, GROUP) == GROUP
    seen = real[:, -LONGEST:]

    def grads(logp: Tensor) -> Tensor:
        policy.zero_grad()
        (logp * seen * torch.linspace(0.5, 1.5, LONGEST)).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    shared = log_probs(policy, tokens, real, LONGEST, GROUP)
    single = torch.stack(alone(lambda *a: log_probs(policy, *a), LONGEST, tokens, real))
    assert torch.allclose(shared * seen, single * seen, atol=2e-5)
    ours, theirs = grads(shared), grads(single)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_a_shared_prompt_changes_no_score_and_no_value(kind):
    trunk = model(kind, AutoModelForSequenceClassification)
    tokens, real = rows()
    scores = Scorer(trunk)(tokens, real, LONGEST, GROUP)
    one_by_one = alone(lambda *a: Scorer(trunk)(*a), LONGEST, tokens, real)
    assert torch.allclose(scores, torch.stack(one_by_one), atol=2e-5)
    assert torch.allclose(scores, Scorer(trunk)(tokens, real), atol=2e-5)
    values = Critic(trunk)(tokens, real, LONGEST, GROUP) * real[:, -LONGEST:]
    single = torch.stack(alone(lambda *a: Critic(trunk)(*a), LONGEST, tokens, real))
    assert torch.allclose(values, single * real[:, -LONGEST:], atol=2e-5)


def test_a_prompt_is_fed_once():
    policy = model("llama")
    tokens, real = rows()
    fed = sequences(policy, tokens, real, LONGEST, GROUP)
    assert fed.ids.shape == (PROMPTS, WIDTH + GROUP * (LONGEST - 1))
    assert next_logits(policy, tokens, real, LONGEST, GROUP).shape == (12, LONGEST, 50)


def test_rows_are_fed_one_by_one_where_that_is_less_work():
    policy = model("llama")  # 32 wide: pairs of tokens soon cost more than tokens
    assert together(policy, 100, 10, 8) == 8
    assert together(policy, 10, 500, 8) == 1
    assert 1 < together(policy, 200, 150, 8) < 8


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "bloom"},
        {"_attn_implementation": "flash_attention_2"},
        {"sliding_window": 8},
    ],
)
def test_models_that_would_read_it_otherwise_are_fed_rows(change):
    policy = model("mistral")
    config = type("Config", (), {**policy.config.to_dict(), "_attn_implementation": "sdpa"})()
    config.get_text_config = lambda: config
    holder = type("Model", (), {"config": config})()
    assert together(holder, WIDTH, LONGEST, GROUP) == GROUP
    for name, value in change.items():
        setattr(config, name, value)
    assert together(holder, WIDTH, LONGEST, GROUP) == 1
