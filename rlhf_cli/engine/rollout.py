"""Draws one rollout and asks every model an algorithm needs what it thinks of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.engine.forward import per_row, per_token
from rlhf_cli.engine.sampler import draw, uniforms
from rlhf_cli.engine.world import World
from rlhf_cli.models.heads import Actor, Scorer, log_probs


@dataclass(frozen=True)
class Judges:
    """Frozen models beside the policy; None where nothing asks for them."""

    ref: PreTrainedModel | None
    reward: Scorer | None


@dataclass(frozen=True)
class Collector:
    """Everything about drawing that does not change during a run."""

    world: World
    tokenizer: PreTrainedTokenizerBase
    judges: Judges
    micro_batch: int
    max_prompt_tokens: int
    max_response_tokens: int
    seed: int
    unended: float | None = None
    """Score of a response without end token, in place of the reward model's; None keeps that."""

    def collect(
        self,
        actor: Actor,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stream: str,
        step: int,
    ) -> tuple[Rollout, Mapping[str, float]]:
        """Draws and scores responses to all `prompts` (token ids), shared out over the processes.

        Returns the whole rollout, on every process, and seconds spent drawing and scoring.
        """
        began = time.perf_counter()
        group = sampling.responses
        mine = self.world.share(len(prompts))
        rows = range(mine.start * group, mine.stop * group)
        # The last uniform of each row is its coin.
        uniform = uniforms(self.seed, stream, step, rows, self.max_response_tokens + 1)
        drawn = draw(
            actor.policy,
            prompts[mine],
            group,
            uniform[:, :-1],
            max(map(len, prompts)),
            int(self.tokenizer.eos_token_id),
            int(self.tokenizer.pad_token_id),
        )
        tokens, attention, mask = (t.clone() for t in (drawn.tokens, drawn.attention, drawn.mask))
        drew = time.perf_counter()
        said = self._ask(actor, tokens, attention, mask)
        said["coin"] = uniform[:, -1].to(self.world.device)
        whole = {
            name: self.world.gather(value).unflatten(0, (len(prompts), group))
            for name, value in {
                "tokens": tokens,
                "attention": attention,
                "mask": mask,
                **said,
            }.items()
        }
        rollout = Rollout(
            source=sampling.sources,
            **{name: whole.get(name) for name in _TENSORS},  # type: ignore[arg-type]
        )
        return rollout, {"generate": drew - began, "score": time.perf_counter() - drew}

    def _ask(
        self, actor: Actor, tokens: Tensor, attention: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """[n,T] log-probabilities and values, [n] scores of this process's rows."""
        batch = (tokens, attention, mask, self.micro_batch)
        said = {
            "logp_old": per_token(
                lambda r: log_probs(actor.policy, r.tokens, r.attention, r.length), *batch
            )
        }
        if (ref := self.judges.ref) is not None:
            said["logp_ref"] = per_token(
                lambda r: log_probs(ref, r.tokens, r.attention, r.length), *batch
            )
        if (reward := self.judges.reward) is not None:
            said["score"] = per_row(lambda r: reward(r.tokens, r.attention), *batch)
            if self.unended is not None:
                ended = self._ended(tokens, mask)
                said["score"] = torch.where(ended, said["score"], self.unended)
        if (critic := actor.critic) is not None:
            said["value_old"] = per_token(lambda r: critic(r.tokens, r.attention, r.length), *batch)
        return said

    def texts(self, rollout: Rollout) -> list[str]:
        """Decoded responses, prompt by prompt, without the end token."""
        longest = rollout.mask.shape[-1]
        ids = rollout.tokens.flatten(0, 1)[:, -longest:]
        kept = rollout.mask.flatten(0, 1).bool()
        return self.tokenizer.batch_decode(
            [row[m].tolist() for row, m in zip(ids, kept, strict=True)], skip_special_tokens=True
        )

    def ended(self, rollout: Rollout) -> Tensor:
        """[P,G] 1.0 where the response closes with the end token."""
        return self._ended(rollout.tokens, rollout.mask).float()

    def _ended(self, tokens: Tensor, mask: Tensor) -> Tensor:
        ids = tokens[..., -mask.shape[-1] :]
        return ((ids == self.tokenizer.eos_token_id) & mask.bool()).any(-1)


_TENSORS = (
    "tokens", "attention", "mask", "logp_old", "logp_ref", "score", "value_old", "coin",
)  # fmt: skip
