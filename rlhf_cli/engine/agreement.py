"""Whether responses are drawn from the very distribution that is trained.

What is drawn and what is learned from pass through different code: one token after the other out of a cache
of keys and values, and all tokens of a text at once. Let them differ (in temperature, by a cut such as
top-p, in a kernel, in where positions are counted from), and every algorithm is off-policy without knowing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.engine.forward import in_parts
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.sampler import uniforms
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor, next_logits, taken

PROMPTS = 8
"""Of each process: some hundred tokens, a second or two of a large model."""
MISSED = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""How far, in probability and on average, the random number of a token may lie outside the token's interval.
Measured of a trained nano model: 0 and 2.5e-6; drawn at a temperature of 0.9 for 1, 1.3e-3 and 2e-3."""
APART = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}
"""How far the two log-probabilities of a token may be apart on average, nats. Measured: 7e-8 and 9e-4; at a
temperature of 0.9 for 1, 0.05."""


@torch.no_grad()
def check_drawing(collector: Collector, actor: Actor, asked: Sequence[Asked]) -> None:
    """UserError unless the policy that learns is the one that is drawn from; the first of `asked` are tried.

    A token is the inverse of its cumulative distribution at a random number that is known: so the number
    must lie in the interval that the whole text, read at once at the temperature of what is trained, gives
    the token. And the log-probability that is kept with a response must be the one it has when it is learned
    from. All processes must call it together. A sampler that draws by other random numbers is held to
    sampler.max_gap instead, here as in every rollout.
    """
    alone = replace(
        collector, judges=Judges(None, None), learned_reward=False, partner=None, soft_beta=None
    )
    some = asked[: PROMPTS * collector.world.size]
    rollout, _ = alone.collect(actor, some, Sampling(policy=1), "check", 0)
    longest = collector.max_response_tokens
    uniform = uniforms(collector.seed, "check", 0, range(len(some)), longest + 2)[:, :longest]
    missed = apart = 0.0
    rows = (rollout.tokens[:, 0], rollout.attention[:, 0], rollout.mask[:, 0])
    for part in in_parts(*rows, collector.micro_batch):
        real, at = part.mask.bool(), uniform[part.index.cpu(), : part.length].to(part.mask)
        logits = next_logits(actor.policy, *part.asked) / actor.temperature
        missed += float(_outside(logits, part.tokens[:, -part.length :], at)[real].sum())
        kept, learned = rollout.logp_old[part.index, 0], actor(*part.asked)["logp"]
        apart += float((learned - kept[:, : part.length]).abs()[real].sum())
    if collector.sampler is not None:
        missed = 0.0
    count, dtype = float(rollout.mask.sum()), actor.policy.dtype
    _refuse_unless(missed / count, MISSED[dtype], apart / count, APART[dtype])


def _outside(logits: Tensor, tokens: Tensor, uniform: Tensor) -> Tensor:
    """[N,T] how far a random number lies outside the interval of the token that was drawn with it."""
    chances = logits.float().softmax(-1)
    high = chances.cumsum(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    low = high - taken(logits, tokens).exp()
    return (low - uniform).clamp_min(0) + (uniform - high).clamp_min(0)


def _refuse_unless(missed: float, most: float, apart: float, most_apart: float) -> None:
    way = (
        "look for another temperature, a cut such as top-p, or another kernel in one of the two; set"
        " launch.attention=eager, or model.precision=fp32."
    )
    if not missed <= most:  # nan is not
        raise UserError(
            "responses are not drawn from the policy that is trained: the random numbers behind their tokens"
            f" miss the tokens' shares by {missed:.2g} on average, and rounding explains at most {most:g};"
            f" {way}"
        )
    if not apart <= most_apart:
        raise UserError(
            "responses are not learned from as they were drawn: the log-probabilities of their tokens differ"
            f" by {apart:.2g} nats on average, and rounding explains at most {most_apart:g}; {way}"
        )
