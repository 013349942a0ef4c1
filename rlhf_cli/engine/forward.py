"""Runs a model over many rows in memory-sized parts, without the padding a part does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli import packing
from rlhf_cli.engine import pulse


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch, their common padding cut off."""

    index: Tensor
    """[n] which rows of the batch these are."""
    tokens: Tensor
    """[n,L']."""
    attention: Tensor
    """[n,L'] bool."""
    mask: Tensor
    """[n,T'] float; T' is the longest response among them."""
    group: int = 1
    """Consecutive rows that have their prompt in common."""

    @property
    def length(self) -> int:
        """T'."""
        return self.mask.shape[1]

    @property
    def asked(self) -> tuple[Tensor, Tensor, int, int]:
        """What the models of `models.heads` are asked about."""
        return self.tokens, self.attention, self.length, self.group


def cut(index: Tensor, tokens: Tensor, attention: Tensor, mask: Tensor, group: int = 1) -> Rows:
    """The rows `index` of a batch, tokens [N,L], attention [N,L], mask [N,T], trimmed on both sides."""
    attention, mask = attention[index], mask[index]
    width, longest = attention.shape[1], mask.shape[1]
    any_response = mask.any(0).nonzero()
    used = int(any_response[-1]) + 1 if len(any_response) else 1
    end = width - longest + used
    start = int(attention.any(0).float().argmax())
    return Rows(index, tokens[index, start:end], attention[:, start:end], mask[:, :used], group)


def in_parts(
    tokens: Tensor, attention: Tensor, mask: Tensor, most: int, group: int = 1
) -> Iterator[Rows]:
    """Splits a batch into parts of at most `most` rows, alike in length so that little is padding.

    Every `group` consecutive rows, which have their prompt in common, stay together and in order (a part has
    at least one group). How many parts there are is said by `packing.parts`.
    """
    groups = attention.sum(-1).view(-1, group).amax(-1).argsort(stable=True)
    offsets = torch.arange(group, device=groups.device)
    count = packing.parts(len(groups), max(1, most // group), groups.device.type == "cpu")
    for some in groups.chunk(count):
        pulse.beat()
        yield cut((some.unsqueeze(-1) * group + offsets).flatten(), tokens, attention, mask, group)


def longest(
    rows: int, most: int, prompt: int, response: int, device: torch.device, group: int = 1
) -> Rows:
    """The largest part that so many rows are split into, of the longest texts there may be.

    What a rehearsal of memory is made of.
    """
    rows = packing.largest(rows, most, group, device.type == "cpu")
    tokens = torch.zeros(rows, prompt + response, dtype=torch.long, device=device)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    mask = torch.ones(rows, response, device=device)
    return Rows(torch.arange(rows, device=device), tokens, attention, mask, group)


@torch.no_grad()
def per_token(
    ask: Callable[[Rows], Tensor],
    tokens: Tensor,
    attention: Tensor,
    mask: Tensor,
    most: int,
    group: int = 1,
) -> Tensor:
    """[N,T] of what `ask` says of each part ([n,T']), 0 where mask is 0."""
    answer = torch.zeros_like(mask)
    for rows in in_parts(tokens, attention, mask, most, group):
        answer[rows.index, : rows.length] = ask(rows) * rows.mask
    return answer


@torch.no_grad()
def per_row(
    ask: Callable[[Rows], Tensor],
    tokens: Tensor,
    attention: Tensor,
    mask: Tensor,
    most: int,
    group: int = 1,
) -> Tensor:
    """[N] of what `ask` says of each part ([n])."""
    answer = torch.zeros(tokens.shape[0], device=tokens.device)
    for rows in in_parts(tokens, attention, mask, most, group):
        answer[rows.index] = ask(rows)
    return answer
