"""The least code that does the work of an online step: the yardstick of what the rest of ours costs.

Nothing is kept, logged, checked or saved, no response ends early, and only GPT-NeoX is understood. What it
does about speed:

1. a token is drawn by inverse CDF: softmax, cumulative sum, one uniform per row;
2. keys and values are written in place, and a prompt is prefilled once for all its responses;
3. the output layer sees response positions only;
4. one forward pass of the policy serves the loss and the KL: the policy has not moved since it drew;
5. reference, reward model and policy read a prompt once for all its responses, which follow it in one row
   and do not see each other; prompts are taken in two groups by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    cross_entropy,
    embedding,
    gelu,
    layer_norm,
    linear,
    logsigmoid,
    scaled_dot_product_attention,
)

from benchmarks.turns import Turns

GROUPS = 2
"""Of prompts alike in length, each padded to its own longest."""
EPSILON = 0.2
"""P3O's clip, nats of log-ratio difference."""

Memory = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [N,heads,capacity,d]."""


class Decoder:
    """The trunk of a transformers GPT-NeoX, by plain tensor calls on its weights."""

    def __init__(self, trunk: Any) -> None:
        config = trunk.config
        assert config.model_type == "gpt_neox" and config.use_parallel_residual
        self.heads: int = config.num_attention_heads
        self.size: int = config.hidden_size // self.heads
        self.epsilon: float = config.layer_norm_eps
        self.embedding: Tensor = trunk.embed_in.weight
        self.last: tuple[Tensor, Tensor] = _both(trunk.final_layer_norm)
        self.layers = [
            tuple(
                map(
                    _both,
                    (
                        each.input_layernorm, each.attention.query_key_value, each.attention.dense,
                        each.post_attention_layernorm, each.mlp.dense_h_to_4h, each.mlp.dense_4h_to_h,
                    ),
                )
            )
            for each in trunk.layers
        ]  # fmt: skip
        places = torch.arange(config.max_position_embeddings).unsqueeze(0)
        self.cos, self.sin = (
            t[0][:, None, None] for t in trunk.rotary_emb(self.embedding.detach(), places)
        )

    def __call__(
        self, ids: Tensor, places: Tensor, seen: Tensor, memory: Memory | None = None, at: int = 0
    ) -> Tensor:
        """[N,n,width] last hidden states of ids [N,n] at positions `places` [N,n].

        seen: [N,1,n,m] bool, the m columns that each attends to, the first `at` of them from memory, to which
        the n new ones are then added.
        """
        x = embedding(ids, self.embedding)
        cos, sin = self.cos[places], self.sin[places]
        rows, count, width = x.shape
        for place, (first, joint, dense, second, wide, narrow) in enumerate(self.layers):
            normal = layer_norm(x, (width,), *first, self.epsilon)
            heads = linear(normal, *joint).view(rows, count, self.heads, 3, self.size)
            turned = _rotated(heads[..., :2, :], cos, sin).transpose(1, 2)
            query, key = turned[..., 0, :], turned[..., 1, :]
            value = heads[..., 2, :].transpose(1, 2)
            if memory is not None:
                keys, values = memory[place]
                keys[:, :, at : at + count], values[:, :, at : at + count] = key, value
                key, value = keys[:, :, : at + count], values[:, :, : at + count]
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen)
            mixed = mixed.transpose(1, 2).reshape(rows, count, width)
            normal = layer_norm(x, (width,), *second, self.epsilon)
            x = x + linear(mixed, *dense) + linear(gelu(linear(normal, *wide)), *narrow)
        return layer_norm(x, (width,), *self.last, self.epsilon)

    def memory(self, rows: int, capacity: int) -> Memory:
        """Room for so many columns."""
        shape = (rows, self.heads, capacity, self.size)
        return [(torch.empty(shape), torch.empty(shape)) for _ in self.layers]


def _both(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first dimensions of each head."""
    some = cos.shape[-1]
    turning, half = x[..., :some], some // 2
    across = torch.cat((-turning[..., half:], turning[..., :half]), -1)
    return torch.cat((turning * cos + across * sin, x[..., some:]), -1)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """[P,W] ids padded on the left and [P,W] bool, true on real ones."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts])
    return ids, torch.arange(width) >= width - lengths[:, None]


@torch.inference_mode()
def draw(
    decoder: Decoder, head: Tensor, prompts: Sequence[Sequence[int]], uniform: Tensor
) -> Tensor:
    """[P,G,T] tokens at the uniforms [P,G,T] of their distributions."""
    ids, real = padded(prompts)
    each, reply = uniform.shape[1:]
    width, rows = ids.shape[1], len(prompts) * each
    places = (real.long().cumsum(-1) - 1).clamp_min(0)
    memory = decoder.memory(len(prompts), width)
    seen = _seen_by_prompt(real).unsqueeze(1)
    hidden = decoder(ids, places, seen, memory)[:, -1].repeat_interleave(each, 0)
    grown = decoder.memory(rows, width + reply)
    for small, large in zip(memory, grown, strict=True):
        for some, all_columns in zip(small, large, strict=True):
            all_columns[:, :, :width] = some.repeat_interleave(each, 0)
    columns = torch.ones(rows, 1, 1, width + reply, dtype=torch.bool)
    columns[..., :width] = real.repeat_interleave(each, 0)[:, None, None]
    place = real.sum(-1).repeat_interleave(each)
    uniform = uniform.flatten(0, 1)
    tokens = torch.empty(rows, reply, dtype=torch.long)
    for t in range(reply):
        cumulative = linear(hidden, head).softmax(-1).cumsum(-1)
        point = uniform[:, t : t + 1] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, point, right=True).clamp_max(head.shape[0] - 1)
        tokens[:, t] = chosen[:, 0]
        if t + 1 < reply:
            seen = columns[..., : width + t + 1]
            hidden = decoder(chosen, (place + t)[:, None], seen, grown, width + t)[:, -1]
    return tokens.view(len(prompts), each, reply)


def _seen_by_prompt(real: Tensor) -> Tensor:
    """[P,W,W] whether a column attends to another; padding sees itself, for a softmax needs something."""
    width = real.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    return (causal & real.unsqueeze(1)) | torch.eye(width, dtype=torch.bool)


@dataclass(frozen=True)
class Packed:
    """Prompts with their responses behind them, each prompt once."""

    tokens: Tensor
    """[P,W+G*T]."""
    places: Tensor
    """[P,W+G*T]; every response goes on where its prompt ends."""
    seen: Tensor
    """[P,1,W+G*T,W+G*T] bool."""
    responses: Tensor
    """[P,G,T]."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Tensor) -> Packed:
        """Of some prompts and [P,G,T] responses."""
        ids, real = padded(prompts)
        count, each, reply = responses.shape
        width, whole = ids.shape[1], ids.shape[1] + each * reply
        own = torch.ones(reply, reply, dtype=torch.bool).tril()
        seen = torch.zeros(count, whole, whole, dtype=torch.bool)
        seen[:, :width, :width] = _seen_by_prompt(real)
        seen[:, width:, :width] = real.unsqueeze(1)
        seen[:, width:, width:] = torch.block_diag(*[own] * each)
        start = (real.long().cumsum(-1) - 1).clamp_min(0)
        after = real.sum(-1, keepdim=True) + torch.arange(reply).repeat(each)
        tokens = torch.cat((ids, responses.flatten(1)), 1)
        return cls(tokens, torch.cat((start, after), 1), seen.unsqueeze(1), responses)

    def hidden(self, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """[P,width] at the end of the prompt and [P,G,T,width] at each response token."""
        states = decoder(self.tokens, self.places, self.seen)
        each, reply = self.responses.shape[1:]
        split = self.tokens.shape[1] - each * reply
        return states[:, split - 1], states[:, split:].unflatten(1, (each, reply))

    def log_probs(self, decoder: Decoder, head: Tensor) -> Tensor:
        """[P,G,T] of the responses, nats."""
        first, later = self.hidden(decoder)
        each = self.responses.shape[1]
        before = first[:, None, None].expand(-1, each, 1, -1)
        logits = linear(torch.cat((before, later[:, :, :-1]), 2), head)
        flat = cross_entropy(logits.flatten(0, 2), self.responses.flatten(), reduction="none")
        return -flat.view_as(self.responses)

    def scores(self, decoder: Decoder, head: Tensor) -> Tensor:
        """[P,G] what the reward model says at the end of each response."""
        return linear(self.hidden(decoder)[1][:, :, -1], head).squeeze(-1)


def rloo(logp: Tensor, ref: Tensor, score: Tensor, beta: float) -> Tensor:
    """Each response [P,G,T] against the mean of its siblings."""
    whole = logp.sum(-1)
    reward = score - beta * (whole.detach() - ref.sum(-1))
    others = (reward.sum(-1, keepdim=True) - reward) / (reward.shape[1] - 1)
    return -((reward - others) * whole).mean()


def p3o(logp: Tensor, ref: Tensor, score: Tensor, beta: float) -> Tensor:
    """P3O-V2 of pairs, before the policy has moved: no ratio differs from 1."""
    h = logp.sum(-1) - ref.sum(-1)
    q = (score - beta * h.detach()).diff(dim=1)
    d = h.diff(dim=1)
    clipped = d.clamp(min=d.detach() - EPSILON, max=d.detach() + EPSILON)
    return 0.5 * torch.maximum(-q * d, -q * clipped).mean()


def dpo_online(logp: Tensor, ref: Tensor, score: Tensor, beta: float) -> Tensor:
    """DPO with the reward model's probability that the first of a pair is preferred."""
    first = (score[:, 0] - score[:, 1]).sigmoid()
    h = logp.sum(-1) - ref.sum(-1)
    gap = beta * (h[:, 0] - h[:, 1])
    return -(first * logsigmoid(gap) + (1 - first) * logsigmoid(-gap)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "rloo": rloo,
    "p3o_v2": p3o,
    "dpo_online": dpo_online,
}


@dataclass(frozen=True)
class Models:
    """What a step asks; heads are [outputs,width]."""

    policy: Decoder
    policy_head: Tensor
    ref: Decoder
    ref_head: Tensor
    reward: Decoder
    reward_head: Tensor
    calibration: tuple[float, float] = (0.0, 1.0)
    """What raw scores lose and are then divided by."""


def gradient(
    models: Models,
    loss: str,
    prompts: Sequence[Sequence[int]],
    responses: Tensor,
    beta: float,
) -> Tensor:
    """Adds the loss's gradient to the policy's weights; returns the loss."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    total = torch.zeros(())
    size = -(-len(order) // GROUPS)
    for some in (order[i : i + size] for i in range(0, len(order), size)):
        packed = Packed.of([prompts[i] for i in some], responses[some])
        with torch.no_grad():
            ref = packed.log_probs(models.ref, models.ref_head)
            raw = packed.scores(models.reward, models.reward_head)
        offset, scale = models.calibration
        logp = packed.log_probs(models.policy, models.policy_head)
        part = LOSSES[loss](logp, ref, (raw - offset) / scale, beta) * (len(some) / len(order))
        part.backward()
        total += part.detach()
    return total


def models(policy: str, reward: str) -> tuple[Any, Models]:
    """The policy that learns, and all decoders, from folders in transformers' layout."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    learning, ref = (
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval() for _ in range(2)
    )
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    config = scorer.config
    offset, scale = (
        getattr(config, f"rlhf_score_{name}", neutral)
        for name, neutral in (("offset", 0.0), ("scale", 1.0))
    )
    return learning, Models(
        Decoder(learning.gpt_neox), learning.get_output_embeddings().weight,
        Decoder(ref.gpt_neox), ref.get_output_embeddings().weight,
        Decoder(scorer.gpt_neox), scorer.score.weight, (offset, scale),
    )  # fmt: skip


def online(
    turns: Turns,
    loss: str,
    policy: str,
    reward: str,
    prompts: list[str],
    rows: int,
    each: int,
    reply: int,
) -> None:
    """Steps of `rows` responses, `each` to a prompt, of `reply` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    learning, asked = models(policy, reward)
    optimiser = torch.optim.AdamW(learning.parameters(), lr=1e-4)
    count, step = rows // each, 0
    turns.loaded()
    while True:
        with turns.turn():
            start = step * count % (len(prompts) - count + 1)
            ids = tokenizer(prompts[start : start + count], add_special_tokens=False)["input_ids"]
            with turns.part("drawing"):
                uniform = torch.rand(count, each, reply)
                responses = draw(asked.policy, asked.policy_head, ids, uniform).clone()
            gradient(asked, loss, ids, responses, beta=0.1)
            torch.nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            step += 1
