"""How rows are fed to a model: each by itself, or a prompt once with several responses behind it.

Rows that share a prompt need it once. In one sequence

    prompt | response 1 | response 2 | ...

a mask keeps each response from seeing the others, and its positions go on from the prompt's, so that every
state is what it is where the response stands alone behind its prompt. What is saved is the prompt of all but
the first; what is paid are the scores of attention between responses, which are formed and masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_cli import packing

SHARING = frozenset({"gpt2", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3"})
"""Kinds of model that do with a mask of their caller's, [S,1,W,W], and with positions; tests try each."""
KERNELS = frozenset({"eager", "sdpa"})
"""Attention that adds such a mask to its scores."""


def positions(attention: Tensor) -> Tensor:
    """[N,L] position of each real token; padding gets 0."""
    return (attention.long().cumsum(-1) - 1).clamp_min(0)


@dataclass(frozen=True)
class Sequences:
    """S sequences of W tokens that stand for N rows."""

    ids: Tensor
    """[S,W]."""
    attention: Tensor
    """[S,W] bool, true on real tokens; or [S,1,W,W] float, added to the scores of attention."""
    places: Tensor
    """[S,W] positions."""
    before: Tensor | int
    """Which columns say something of a response column; a number is so many of the last ones."""
    rows: int
    """N."""

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of a model of transformers."""
        plain = self.attention.dim() == 2
        return {
            "input_ids": self.ids,
            "attention_mask": self.attention.long() if plain else self.attention,
            "position_ids": self.places,
            "use_cache": False,
        }

    def taken(self, states: Tensor) -> Tensor:
        """[N,length,...] of states [S,W,...]: those before each response column."""
        last = isinstance(self.before, int)
        return self.by_row(states[:, -self.before :] if last else states[:, self.before])

    def by_row(self, said: Tensor) -> Tensor:
        """[N,length,...] of what is said of each sequence's response columns."""
        return said.reshape(self.rows, -1, *said.shape[2:])


def sequences(
    model: Any, tokens: Tensor, attention: Tensor, length: int, group: int = 1
) -> Sequences:
    """What to feed a model for the states before each of the last `length` columns.

    tokens, attention: [N,L]; every `group` consecutive rows have their first L - length columns in common.
    What says something of column i stands at column i-1, so the last column is not fed at all.
    """
    width = tokens.shape[1] - length
    each = together(model, width, length, group)
    if each == 1:
        seen = attention[:, :-1]
        return Sequences(tokens[:, :-1], seen, positions(seen), length, len(tokens))
    fed = length - 1
    first = torch.arange(0, len(tokens), each, device=tokens.device)

    def packed(x: Tensor) -> Tensor:
        return torch.cat([x[first, :width], x[:, width:-1].reshape(len(first), each * fed)], 1)

    real = packed(attention)
    mask = _mask(real, width, fed, each, model.dtype)
    start = torch.arange(each, device=tokens.device).unsqueeze(-1) * fed + width - 1
    before = start + torch.arange(length, device=tokens.device)
    before[:, 0] = width - 1
    places = packed(positions(attention))
    return Sequences(packed(tokens), mask, places, before.flatten(), len(tokens))


def _mask(real: Tensor, width: int, fed: int, each: int, dtype: torch.dtype) -> Tensor:
    """[S,1,W,W] 0 where a column sees another: an earlier one of the prompt or of its own response.

    A column that nothing is before, as in the padding, sees itself: no row of scores is without one.
    """
    column = torch.arange(real.shape[1], device=real.device)
    part = (column - width).div(fed, rounding_mode="floor").clamp_min(-1)
    own = (part == part.unsqueeze(-1)) | (part == -1)
    sees = own & (column <= column.unsqueeze(-1)) & real.unsqueeze(1)
    sees |= torch.eye(len(column), dtype=torch.bool, device=real.device)
    nothing = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=real.device)
    return torch.where(sees, nothing.new_zeros(()), nothing).unsqueeze(1)


def together(model: Any, width: int, length: int, group: int) -> int:
    """How many of `group` responses to a prompt go into one sequence; 1 where the model has no way to."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    known = config.model_type in SHARING and config._attn_implementation in KERNELS
    if length < 2 or windowed or not known:
        return 1
    return packing.together(config.hidden_size, width, length - 1, group)
