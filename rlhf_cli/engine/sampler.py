"""Draws responses from a policy, or from a product of policies.

The loop is our own for one reason: a response must depend on the policy, the prompt and its own random
numbers, and on nothing else. Each row brings its uniforms (keyed by seed, step and row), and a token is
the inverse of the cumulative distribution at its uniform. So neither the number of processes nor what
else is in the batch changes what is drawn, and a resumed run draws what the uninterrupted one would
have. Prompts are prefilled once for all their responses; keys and values go into buffers in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from rlhf_cli.engine import pulse
from rlhf_cli.models.heads import positions
from rlhf_cli.models.tuning import Policy

DROP_SHARE = 0.25
"""Rows that have ended draw on, unseen, until they are this share of the batch; then they are dropped."""


@dataclass(frozen=True)
class Expert:
    """A factor of the distribution that is drawn from: prod_i pi_i^weight_i, normalised per token."""

    model: Policy
    weight: float = 1.0


@dataclass(frozen=True)
class Draw:
    """Responses to N rows of prompts."""

    tokens: Tensor
    """[N,L] prompt (left-padded) and response (right-padded)."""
    attention: Tensor
    """[N,L] bool, true on real tokens."""
    mask: Tensor
    """[N,T] float, 1 up to and including the end token."""
    logp: Tensor | None = None
    """[N,T] log-probabilities as whoever drew has them, nats, inf where nothing was drawn; None if it is the
    trained model itself."""


class Sampler(Protocol):
    """Whoever draws from the policy in the trained model's place."""

    @property
    def max_gap(self) -> float:
        """Largest mean difference between its log-probabilities and the trainer's, nats per token."""
        ...

    def holding(self, policy: PreTrainedModel) -> AbstractContextManager[None]:
        """Has the policy's weights as they are now while it is entered; all processes enter together."""
        ...

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        responses: int,
        uniform: Tensor,
        width: int,
        end: int,
        pad: int,
        temperature: float = 1.0,
    ) -> Draw:
        """As `draw` below, from the weights it holds; `uniform` may only seed it."""
        ...


def uniforms(seed: int, stream: str, step: int, rows: Sequence[int], count: int) -> Tensor:
    """[len(rows), count] draws in [0,1), a pure function of (seed, stream, step, row)."""
    key = [seed, *stream.encode(), step]
    return torch.from_numpy(
        np.stack(
            [np.random.default_rng([*key, row]).random(count, dtype=np.float32) for row in rows]
        )
    )


def left_pad(prompts: Sequence[Sequence[int]], width: int, pad: int) -> tuple[Tensor, Tensor]:
    """[P,width] ids padded on the left, and [P,width] bool, true on real tokens."""
    tokens = torch.full((len(prompts), width), pad)
    attention = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        attention[row, width - len(ids) :] = True
    return tokens, attention


def draw(
    experts: Sequence[Expert],
    prompts: Sequence[Sequence[int]],
    responses: int,
    uniform: Tensor,
    width: int,
    end: int,
    pad: int,
    temperature: float = 1.0,
    all_ended: Callable[[bool], bool] | None = None,
) -> Draw:
    """Draws `responses` continuations of each prompt; row p*responses + g is response g to prompt p.

    uniform: [P*responses, T], T the most tokens of a response; width: columns given to prompts.
    temperature 0 takes the likeliest token each time. all_ended: from whether all is drawn here to whether
    it is everywhere, for models whose layers are gathered from all processes, none of which may stop before
    the others.
    """
    # What is gathered layer by layer is needed by autograd afterwards.
    with torch.inference_mode() if all_ended is None else torch.no_grad():
        asked = (experts, prompts, responses, uniform, width, end, pad, temperature)
        return _drawn(*asked, all_ended or bool)


def _drawn(
    experts: Sequence[Expert],
    prompts: Sequence[Sequence[int]],
    responses: int,
    uniform: Tensor,
    width: int,
    end: int,
    pad: int,
    temperature: float,
    all_ended: Callable[[bool], bool],
) -> Draw:
    device = experts[0].model.device
    rows, longest = uniform.shape
    tokens = torch.full((rows, width + longest), pad, device=device)
    attention = torch.zeros((rows, width + longest), dtype=torch.bool, device=device)
    ids, real = (t.to(device) for t in left_pad(prompts, width, pad))
    tokens[:, :width] = ids.repeat_interleave(responses, 0)
    attention[:, :width] = real.repeat_interleave(responses, 0)
    uniform = uniform.to(device)

    cache = [
        BufferCache(e.model.config.get_text_config().num_hidden_layers, width + longest)
        for e in experts
    ]
    logits = _step(experts, ids, real, cache)
    for each in cache:
        each.repeat(responses)
    logits = logits.repeat_interleave(responses, 0)
    alive = torch.arange(rows, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(longest):
        pulse.beat()
        column = width + t
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            chosen = inverse_cdf(logits / temperature, uniform[alive, t])
        tokens[alive, column] = chosen
        attention[alive, column] = True
        ended = ended | (chosen == end)
        if t + 1 == longest or all_ended(bool(ended.all())):
            break
        if ended.float().mean() >= DROP_SHARE:
            keep = (~ended).nonzero().squeeze(-1)
            if len(keep) == 0:  # others draw on, and this process with them
                keep = alive.new_zeros(1)
            for each in cache:
                each.select(keep)
            alive, chosen, ended = alive[keep], chosen[keep], ended[keep]
        logits = _step(experts, chosen.unsqueeze(-1), attention[alive, : column + 1], cache)
    return _cut_after_end(tokens, attention, width, end, pad)


def inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """[N] the first token whose cumulative probability exceeds uniform [N]; logits [N,V].

    Softmax and cumulative sum are fp32; the draw is scaled by the sum, so rounding cannot fall off the
    end of the vocabulary.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    point = (uniform * cumulative[:, -1]).unsqueeze(-1)
    picked = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    return picked.clamp_max(logits.shape[-1] - 1)


def _step(
    experts: Sequence[Expert], ids: Tensor, attention: Tensor, caches: Sequence[Cache]
) -> Tensor:
    """[N,V] logits of the next token after feeding `ids` [N,n]; attention covers all seen so far."""
    place = positions(attention)[:, -ids.shape[1] :]
    said = [
        expert.model(
            input_ids=ids,
            attention_mask=attention.long(),
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for expert, cache in zip(experts, caches, strict=True)
    ]
    if len(said) == 1 and experts[0].weight == 1.0:
        return said[0]
    weighted = [e.weight * x.float().log_softmax(-1) for e, x in zip(experts, said, strict=True)]
    return torch.stack(weighted).sum(0)


def _cut_after_end(tokens: Tensor, attention: Tensor, width: int, end: int, pad: int) -> Draw:
    """Wipes what follows the first end token of each row."""
    response = tokens[:, width:]
    ended = (response == end) & attention[:, width:]
    after = ended.long().cumsum(-1) - ended.long() > 0
    mask = attention[:, width:] & ~after
    tokens[:, width:] = torch.where(mask, response, pad)
    attention[:, width:] = mask
    return Draw(tokens, attention, mask.float())


class BufferLayer(DynamicLayer):
    """Keys and values of one layer in buffers of fixed capacity: no concatenation per token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers once the first states tell their shape."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (*key_states.shape[:2], self.capacity)
        self.keys = key_states.new_empty((*shape, key_states.shape[-1]))
        self.values = value_states.new_empty((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends [N,heads,n,d] states and returns all that are filled, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self, *args: object) -> int:
        """Columns filled so far."""
        return self.filled


class BufferCache(Cache):
    """One `BufferLayer` per layer of the model."""

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[BufferLayer(capacity) for _ in range(layers)])

    def repeat(self, times: int) -> None:
        """Gives each row `times` copies of its keys and values."""
        if times > 1:
            self._map(lambda x: x.repeat_interleave(times, 0))

    def select(self, rows: Tensor) -> None:
        """Keeps some rows only."""
        self._map(lambda x: x.index_select(0, rows))

    def _map(self, change):  # type: ignore[no-untyped-def]
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
