"""Draws responses from a policy, or from a product of policies.

The loop is our own for one reason: a response must depend on the policy, the prompt and its own random
numbers, and on nothing else. Each row brings its uniforms (keyed by seed, step and row), and a token is
the inverse of the cumulative distribution at its uniform. So neither the number of processes nor what
else is in the batch changes what is drawn, and a resumed run draws what the uninterrupted one would
have. Prompts are read once for all their responses (`engine.reader`).
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

from rlhf_cli.engine import pulse
from rlhf_cli.engine.reader import reader, split
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
    """[N,T] log-probabilities as whoever drew has them, nats, inf where nothing was drawn; None where a draw
    is no sample of one model's distribution."""

    def taken(self, rows: Tensor) -> Draw:
        """The draw of some rows, in their order."""
        logp = None if self.logp is None else self.logp[rows]
        return Draw(self.tokens[rows], self.attention[rows], self.mask[rows], logp)


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
        return _drawn(*asked, all_ended)


def _drawn(
    experts: Sequence[Expert],
    prompts: Sequence[Sequence[int]],
    responses: int,
    uniform: Tensor,
    width: int,
    end: int,
    pad: int,
    temperature: float,
    all_ended: Callable[[bool], bool] | None,
) -> Draw:
    device = experts[0].model.device
    rows, longest = uniform.shape
    order = torch.tensor([len(ids) for ids in prompts]).argsort(descending=True, stable=True)
    place = (order.unsqueeze(-1) * responses + torch.arange(responses)).flatten()
    uniform = uniform[place].to(device)
    ordered = [prompts[i] for i in order.tolist()]
    # Processes that gather layers together must make as many passes as each other.
    cut = split([len(ids) for ids in ordered]) if all_ended is None else 0

    ids, real = (t.to(device) for t in left_pad(ordered, width, pad))
    readers = [reader(e.model, ids, real, cut, responses, longest) for e in experts]
    logits = _product(experts, [each.read() for each in readers])
    logits = logits.repeat_interleave(responses, 0)
    response = torch.full((rows, longest), pad, device=device)
    logp = torch.full((rows, longest), torch.inf, device=device)
    alive = torch.arange(rows, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for t in range(longest):
        pulse.beat()
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            heated = logits if temperature == 1 else logits / temperature
            chosen, logp[alive, t] = inverse_cdf(heated, uniform[alive, t])
        response[alive, t] = chosen
        ended = ended | (chosen == end)
        count = int(ended.sum())
        over = count == len(ended)
        if t + 1 == longest or (over if all_ended is None else all_ended(over)):
            break
        if count >= DROP_SHARE * len(ended):
            keep = (~ended).nonzero().squeeze(-1)
            if over:  # others draw on, and this process with them
                keep = alive.new_zeros(1)
            for each in readers:
                each.select(keep)
            alive, chosen, ended = alive[keep], chosen[keep], ended[keep]
        logits = _product(experts, [each.step(chosen.unsqueeze(-1)) for each in readers])
    sampled = len(experts) == 1 and temperature > 0
    tokens = torch.cat([ids.repeat_interleave(responses, 0), response], 1)
    drawn = _cut_after_end(
        tokens, real.repeat_interleave(responses, 0), logp if sampled else None, width, end, pad
    )
    return drawn.taken(place.argsort().to(device))


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[N] the first token whose cumulative probability exceeds uniform [N], and [N] its log-probability.

    logits: [N,V]. Softmax and cumulative sum are fp32; the draw is scaled by the sum, so rounding cannot fall
    off the end of the vocabulary.
    """
    chance = logits.float().softmax(-1)
    cumulative = chance.cumsum(-1)
    point = (uniform * cumulative[:, -1]).unsqueeze(-1)
    picked = torch.searchsorted(cumulative, point, right=True).clamp_max(logits.shape[-1] - 1)
    likely = chance.gather(-1, picked).clamp_min(torch.finfo(chance.dtype).tiny)
    return picked.squeeze(-1), likely.log().squeeze(-1)


def _product(experts: Sequence[Expert], said: Sequence[Tensor]) -> Tensor:
    """[N,V] logits of the product of what experts say, each [N,V]."""
    if len(said) == 1 and experts[0].weight == 1.0:
        return said[0]
    weighted = [e.weight * x.float().log_softmax(-1) for e, x in zip(experts, said, strict=True)]
    return torch.stack(weighted).sum(0)


def _cut_after_end(
    tokens: Tensor, real: Tensor, logp: Tensor | None, width: int, end: int, pad: int
) -> Draw:
    """Wipes what follows the first end token of each row; real: of the prompts."""
    response = tokens[:, width:]
    ended = response == end
    mask = ended.long().cumsum(-1) - ended.long() == 0
    tokens[:, width:] = torch.where(mask, response, pad)
    said = None if logp is None else torch.where(mask, logp, torch.inf)
    return Draw(tokens, torch.cat([real, mask], 1), mask.float(), said)
