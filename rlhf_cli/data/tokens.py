"""Text to token ids: the one rendering used for training, sampling and scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> list[int]:
    """Ids of a prompt, with exactly one start token if the tokenizer uses one.

    A prompt of more than `longest` tokens keeps its end: the last turn is what is to be answered.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [tokenizer.bos_token_id] if uses_bos(tokenizer) else []
    return start + ids[-(longest - len(start)) :]


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str, longest: int) -> list[int]:
    """Ids of a response and the end token.

    A response of more than `longest` tokens is cut and then has no end token: a cut must not teach the
    policy that the answer was over.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:longest]


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself opens a text with its start token."""
    probe = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
