"""What is known before an update (`Rollout`) and what the current weights say (`Forward`).

Axes, named once and used everywhere: P prompts, G responses per prompt, T response tokens (padded on
the right), L tokens of prompt and response together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from rlhf_cli.core.later import torch

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["policy", "ref", "greedy", "mixture", "dataset", "mismatch", "demo"]
"""policy, ref: drawn from it; greedy: the policy's most likely tokens; mixture: drawn from a geometric
mixture of policy and reference; dataset: a preference pair's two responses, the preferred one first;
mismatch: the preferred response to another prompt; demo: a demonstration."""

GIVEN: tuple[Source, ...] = ("dataset", "mismatch", "demo")
"""Those that nobody draws."""

PER_TOKEN = ("mask", "logp_old", "logp_ref", "logp_guide", "value_old", "reward")
"""Fields of a rollout that end in the axis T."""


@dataclass(frozen=True)
class Rollout:
    """Responses with everything an algorithm may look at; None where it did not ask.

    All log-probabilities are of the sampled tokens, in nats, and 0 where `mask` is 0.
    """

    tokens: Tensor
    """[P,G,L] ids of prompt (padded on the left) and response; read by the engine only."""
    attention: Tensor
    """[P,G,L] bool, true on real tokens; read by the engine only."""
    mask: Tensor
    """[P,G,T] float, 1 on response tokens, the end token included."""
    logp_old: Tensor
    """[P,G,T] log pi_old, the sampling policy, recomputed by the trainer's own forward pass."""
    logp_ref: Tensor | None
    """[P,G,T] log pi_ref, the SFT policy."""
    score: Tensor | None
    """[P,G] r(x, y)."""
    value_old: Tensor | None
    """[P,G,T] V_old of the state before each token."""
    coin: Tensor
    """[P,G] uniform draws in [0,1) for algorithms that toss coins: they stay pure and process-blind."""
    source: tuple[Source, ...]
    """[G] where each response came from."""
    logp_guide: Tensor | None = None
    """[P,G,T] log pi_guide, a second frozen policy."""
    reward: Tensor | None = None
    """[P,G,T] what a task pays after each token; None where the score of the whole is all there is."""

    def where(self, *sources: Source) -> list[int]:
        """The places along G of responses that came from any of `sources`."""
        return [g for g, source in enumerate(self.source) if source in sources]

    def take(self, prompts: Tensor) -> Rollout:
        """The same rollout for some prompts only (index along P); groups are never split."""
        picked = {
            f.name: value[prompts]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **picked)  # type: ignore[arg-type]

    @staticmethod
    def join(rollouts: Sequence[Rollout]) -> Rollout:
        """The prompts of several rollouts with equal sources, their prompt columns padded alike."""
        width = max(each.tokens.shape[-1] for each in rollouts)

        def wide(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (width - x.shape[-1], 0))

        rollouts = [
            replace(each, tokens=wide(each.tokens), attention=wide(each.attention))
            for each in rollouts
        ]
        joined = {
            f.name: torch.cat([getattr(each, f.name) for each in rollouts])
            for f in fields(rollouts[0])
            if isinstance(getattr(rollouts[0], f.name), torch.Tensor)
        }
        return replace(rollouts[0], **joined)  # type: ignore[arg-type]

    def trim(self, length: int) -> Rollout:
        """The same rollout without the response columns past `length`; they must be padding."""
        cut = {
            name: value[..., :length]
            for name in PER_TOKEN
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **cut)


@dataclass(frozen=True)
class Forward:
    """The same tokens under the current weights, with gradient."""

    logp: Tensor
    """[P,G,T] log pi."""
    value: Tensor | None = None
    """[P,G,T] V of the state before each token."""
    entropy: Tensor | None = None
    """[P,G,T] of the distribution each token was drawn from, nats."""
    score: Tensor | None = None
    """[P,G] r(x, y) of a reward model that learns during the run."""
    logps: Tensor | None = None
    """[P,G,T,V] log pi of every token there is, in each state."""
    logps_ref: Tensor | None = None
    """[P,G,T,V] log pi_ref likewise, without gradient."""
    q: Tensor | None = None
    """[P,G,T,V] Q(s, a)."""
    q_taken: Tensor | None = None
    """[P,G,T] Q of the token that was chosen."""


def sequence_sum(per_token: Tensor, mask: Tensor) -> Tensor:
    """[P,G,T] -> [P,G]: sum over response tokens, in the precision of the mask (fp32 or better)."""
    return per_token.to(mask.dtype).mul(mask).sum(-1)


def ended(tokens: Tensor, mask: Tensor, end: int) -> Tensor:
    """[...] whether the last T columns of tokens [...,L], where mask [...,T] is 1, hold the end token."""
    return ((tokens[..., -mask.shape[-1] :] == end) & mask.bool()).any(-1)
