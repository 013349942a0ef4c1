"""Somebody else's reward model: any sequence classifier with one label, read with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_cli.errors import UserError
from rlhf_cli.models.load import load
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.recipes import Classifier
from rlhf_cli.rewards.written import Scorer, numbers


def classifier(source: Classifier, device: str) -> Scorer:
    """Loads the model and its tokenizer. Raises UserError if it has no trained head of one label."""
    tokenizer = load_tokenizer(source.name, source.revision)
    model, report = load(
        AutoModelForSequenceClassification,
        source.name,
        source.revision,
        source.precision,
        output_loading_info=True,
    )
    where = f"reward.source.name={source.name}"
    if model.config.num_labels != 1:
        raise UserError(
            f"{where} has {model.config.num_labels} labels; a reward model has one: choose another."
        )
    if report["missing_keys"]:
        raise UserError(
            f"{where} lacks {sorted(report['missing_keys'])[0]}, so it would score at random; choose a"
            " trained reward model."
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    model = model.to(device).eval()

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        batch = _encoded(tokenizer, source, prompts, responses).to(device)
        return numbers(model(**batch).logits.squeeze(-1).float(), len(prompts), where)

    return score


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    source: Classifier,
    prompts: Sequence[str],
    responses: Sequence[str],
) -> Any:
    how: dict[str, Any] = {
        "return_tensors": "pt",
        "padding": True,
        "truncation": True,
        "max_length": source.max_tokens,
    }
    if source.form == "pair":
        return tokenizer(list(prompts), list(responses), **how)
    if source.form == "plain":
        return tokenizer([p + r for p, r in zip(prompts, responses, strict=True)], **how)
    chats = [
        [{"role": "user", "content": p.strip()}, {"role": "assistant", "content": r.strip()}]
        for p, r in zip(prompts, responses, strict=True)
    ]
    texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    # The template has written the start token itself.
    return tokenizer(texts, add_special_tokens=False, **how)
