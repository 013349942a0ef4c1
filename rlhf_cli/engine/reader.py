"""Reads prompts once for all responses to them, and then these token by token.

Keys and values go into buffers in place. On a CPU those of a prompt are not copied for its responses either
(`SharedReader`): to read them is most of the work of a token there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rlhf_cli.models.sequence import KERNELS, positions
from rlhf_cli.models.tuning import Policy

SPLIT = 0.75
"""Prompts are read in two blocks, the long and the short, where that leaves this share of the columns."""
INTERFACED = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"})
"""Kinds of model that take their attention from the `AttentionInterface`; tests try each."""
SHARED = "shared-prompts"
"""The name that `SharedReader` has in that interface."""


def split(lengths: Sequence[int]) -> int:
    """How many of the prompts, long to short, are a block of their own when they are read; 0 is one block."""

    def columns(cut: int) -> int:
        return cut * lengths[0] + (len(lengths) - cut) * lengths[cut]

    cut = min(range(len(lengths)), key=columns)
    return cut if columns(cut) <= SPLIT * columns(0) else 0


def reader(
    model: Policy, ids: Tensor, real: Tensor, cut: int, responses: int, longest: int
) -> Reader:
    """Whoever reads for a model: `SharedReader` where that is known to be right and faster."""
    config = model.config.get_text_config()
    shared = (
        model.device.type == "cpu"
        and config.model_type in INTERFACED
        and config._attn_implementation in KERNELS
        and getattr(config, "sliding_window", None) is None
    )
    return (SharedReader if shared else Reader)(model, ids, real, cut, responses, longest)


class Reader:
    """A model that reads prompts, and then responses token by token; this one takes any causal model.

    Each response has the keys and values of its whole text, which the model's own kernel attends to.
    """

    def __init__(
        self,
        model: Policy,
        ids: Tensor,
        real: Tensor,
        cut: int,
        responses: int,
        longest: int,
    ) -> None:
        """ids, real: [P,W] prompts padded on the left, from long to short; the first `cut` are one block.

        longest: most tokens of a response.
        """
        self.model, self.ids, self.real, self.cut = model, ids, real, cut
        self.responses, self.longest, self.told = responses, longest, 0
        self.lengths = real.sum(-1, keepdim=True).repeat_interleave(responses, 0)

    def read(self) -> Tensor:
        """[P,V] logits of the token after each prompt."""
        said, caches = [], []
        blocks = [slice(self.cut), slice(self.cut, None)] if self.cut else [slice(None)]
        for block in blocks:
            widest = int(self.real[block].sum(-1).max())
            real, cache = self.real[block, -widest:], DynamicCache()
            asked = {"attention_mask": real.long(), "position_ids": positions(real)}
            said.append(self._ask(self.ids[block, -widest:], cache, **asked))
            caches.append(cache)
        self.begin(caches)
        return torch.cat(said)

    def begin(self, caches: Sequence[Cache]) -> None:
        """Takes over what was read of the prompts, one cache per block."""
        shown = self.real.new_ones(len(self.real), self.longest)
        self.attention = torch.cat([self.real, shown], 1).repeat_interleave(self.responses, 0)
        rows, columns = self.attention.shape

        def repeated(parts: Sequence[Tensor]) -> Tensor:
            first, start = parts[0], 0
            made = first.new_empty(rows, first.shape[1], columns, first.shape[3])
            for part in parts:
                stop = start + len(part) * self.responses
                left = self.real.shape[1] - part.shape[2]
                made[start:stop, :, :left] = 0  # what is masked must be a number all the same
                made[start:stop, :, left : left + part.shape[2]] = part.repeat_interleave(
                    self.responses, 0
                )
                start = stop
            return made

        layers = zip(*(cache.layers for cache in caches), strict=True)
        self.buffers = [
            BufferLayer(
                repeated([each.keys for each in parts]),
                repeated([each.values for each in parts]),
                self.real.shape[1],
            )
            for parts in layers
        ]
        self.cache = Cache(layers=list(self.buffers))

    def step(self, ids: Tensor) -> Tensor:
        """[N,V] logits of the token after `ids` [N,1], which follow what was read so far."""
        seen = self.attention[:, : self.real.shape[1] + self.told + 1]
        said = self._ask(
            ids, self.cache, attention_mask=seen.long(), position_ids=self.lengths + self.told
        )
        self.told += 1
        return said

    def select(self, rows: Tensor) -> None:
        """Reads on for some of the responses only."""
        self.lengths, self.attention = self.lengths[rows], self.attention[rows]
        for layer in self.buffers:
            layer.select(rows)

    def _ask(self, ids: Tensor, cache: Cache, **asked: Tensor) -> Tensor:
        said = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **asked
        )
        return said.logits[:, -1]


class SharedReader(Reader):
    """Attends to the keys and values of a prompt once for all responses to it, not once for each.

    To read these is most of the work of a token on a CPU. A layer's scores against the prompt and those
    against the response stand side by side in one softmax, as they do in attention over the whole text.
    Slot p*responses + g is that of response g to prompt p, whether or not it is still read.
    """

    def begin(self, caches: Sequence[Cache]) -> None:
        """As above; here responses have only their own tokens in buffers."""
        counts = [len(cache.layers[0].keys) for cache in caches]
        reals = self.real.split(counts)
        self.blocks = [Block.of(cache, real) for cache, real in zip(caches, reals, strict=True)]
        rows = len(self.lengths)
        self.slots = torch.arange(rows, device=self.real.device)

        def empty(like: Tensor) -> Tensor:
            return like.new_empty(rows, like.shape[1], self.longest, like.shape[3])

        layers = caches[0].layers
        self.buffers = [BufferLayer(empty(x.keys), empty(x.values), 0) for x in layers]
        self.cache = Cache(layers=list(self.buffers))

    def step(self, ids: Tensor) -> Tensor:
        """As above."""
        config = self.model.config.get_text_config()
        kernel = config._attn_implementation
        AttentionInterface.register(SHARED, self._attend)
        config._attn_implementation = SHARED
        try:
            said = self._ask(ids, self.cache, position_ids=self.lengths + self.told)
        finally:
            config._attn_implementation = kernel
            AttentionInterface.register(SHARED, _nobody)  # or what was read would be kept
        self.told += 1
        return said

    def select(self, rows: Tensor) -> None:
        """As above; a prompt goes with the last of its responses."""
        self.lengths, slots = self.lengths[rows], self.slots[rows]
        for layer in self.buffers:
            layer.select(rows)
        left = slots.div(self.responses, rounding_mode="floor").unique()
        mine = left.new_zeros(sum(block.prompts for block in self.blocks), dtype=torch.bool)
        mine[left] = True
        stay = mine.split([block.prompts for block in self.blocks])
        blocks = [block.taken(some) for block, some in zip(self.blocks, stay, strict=True)]
        self.blocks = [block for block in blocks if block.prompts]
        prompt = torch.searchsorted(left, slots.div(self.responses, rounding_mode="floor"))
        self.slots = prompt * self.responses + slots % self.responses

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: object,
    ) -> tuple[Tensor, None]:
        """[N,1,heads,d] for a layer's query [N,heads,1,d]; key, value: [N,shared heads,n,d] of responses."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        rows, heads, _one, size = query.shape
        own = (query * scaling).view(rows, key.shape[1], -1, size)
        slots = self._spread(own).split([block.prompts * self.responses for block in self.blocks])
        columns = max(block.columns for block in self.blocks)
        parts = [b.scores(layer, q, columns) for b, q in zip(self.blocks, slots, strict=True)]
        scores = torch.cat([self._gathered(_joined(parts)), own @ key.mT], -1)
        chance = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        weights = self._spread(chance[..., :columns]).split([len(part) for part in parts])
        said = [b.said(layer, w) for b, w in zip(self.blocks, weights, strict=True)]
        out = chance[..., columns:] @ value + self._gathered(_joined(said))
        return out.reshape(rows, 1, heads, -1), None

    def _spread(self, x: Tensor) -> Tensor:
        """From [N,...] to [slots,...], zero where a response is read no more."""
        slots = sum(block.prompts for block in self.blocks) * self.responses
        if slots == len(x):
            return x
        return x.new_zeros(slots, *x.shape[1:]).index_copy_(0, self.slots, x)

    def _gathered(self, x: Tensor) -> Tensor:
        """From [slots,...] to [N,...]."""
        return x if len(x) == len(self.slots) else x.index_select(0, self.slots)


def _nobody(*_: object, **__: object) -> tuple[Tensor, None]:
    raise RuntimeError(f"{SHARED} attention outside of a step")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True)
class Block:
    """What a model has read of some prompts: for each layer keys and values [P,heads,columns,d]."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    bias: Tensor
    """[P,heads,1,columns], added to scores: it hides the padding."""

    @classmethod
    def of(cls, cache: Cache, real: Tensor) -> Block:
        """From a cache of all the prompts; real: [P,W], true on their tokens."""
        keys, values = ([getattr(x, name) for x in cache.layers] for name in ("keys", "values"))
        prompts, heads, columns, _ = keys[0].shape
        hidden = torch.finfo(keys[0].dtype).min
        bias = keys[0].new_zeros(prompts, columns).masked_fill(~real[:, -columns:], hidden)
        return cls(keys, values, bias[:, None, None].expand(-1, heads, -1, -1).contiguous())

    @property
    def prompts(self) -> int:
        """P."""
        return len(self.bias)

    @property
    def columns(self) -> int:
        """Tokens of its longest prompt."""
        return self.bias.shape[-1]

    def taken(self, prompts: Tensor) -> Block:
        """Some of the prompts only; prompts: [P] bool."""
        if prompts.all():
            return self
        keys, values = ([x[prompts] for x in xs] for xs in (self.keys, self.values))
        return Block(keys, values, self.bias[prompts])

    def scores(self, layer: int, query: Tensor, columns: int) -> Tensor:
        """[slots,heads,r,columns] for a scaled query [slots,heads,r,d]; what is too many columns is -inf."""
        keys = self.keys[layer].flatten(0, 1)
        found = torch.baddbmm(self.bias.flatten(0, 1), self._by_prompt(query), keys.mT)
        return pad(self._by_slot(found, query), (columns - self.columns, 0), value=-torch.inf)

    def said(self, layer: int, weights: Tensor) -> Tensor:
        """[slots,heads,r,d] the values as weighted [slots,heads,r,columns]."""
        values = self.values[layer].flatten(0, 1)
        part = weights[..., weights.shape[-1] - self.columns :]
        return self._by_slot(torch.bmm(self._by_prompt(part), values), part)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[P*heads,responses*r,n] of [slots,heads,r,n]."""
        each = x.unflatten(0, (self.prompts, -1)).transpose(1, 2)
        return each.reshape(self.prompts * x.shape[1], -1, x.shape[-1])

    def _by_slot(self, x: Tensor, like: Tensor) -> Tensor:
        """[slots,heads,r,n] of [P*heads,responses*r,n]; like: of the shape [slots,heads,r,any]."""
        _slots, heads, r, _n = like.shape
        each = x.view(self.prompts, heads, -1, r, x.shape[-1]).transpose(1, 2)
        return each.flatten(0, 1)


class BufferLayer(DynamicLayer):
    """Keys and values of one layer in buffers of fixed capacity: no concatenation per token."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        """keys, values: [N,heads,capacity,d], of which the first `filled` columns are there."""
        super().__init__()
        self.keys, self.values, self.filled = keys, values, filled
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Appends [N,heads,n,d] states and returns all that are filled, as views."""
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_seq_length(self, *args: object) -> int:
        """Columns filled so far."""
        return self.filled

    def select(self, rows: Tensor) -> None:
        """Keeps some rows only."""
        self.keys, self.values = self._taken(self.keys, rows), self._taken(self.values, rows)

    def _taken(self, x: Tensor, rows: Tensor) -> Tensor:
        made = x.new_empty(len(rows), *x.shape[1:])
        made[:, :, : self.filled] = x[:, :, : self.filled].index_select(0, rows)
        return made
