"""The measurement contract, in one place: every point of every frontier is made here.

Responses to one pinned set of held-out prompts, temperature 1, fixed seed; the KL to the SFT policy is
summed over each response; proxy reward from the learned model, gold where the dataset has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.forward import in_parts
from rlhf_cli.engine.rollout import PLAIN, Asked, Collector
from rlhf_cli.errors import UserError
from rlhf_cli.evals.health import distinct, repetition, rouge_l
from rlhf_cli.evals.kl import exact_kl, kl_estimates
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.models.heads import Actor, next_logits
from rlhf_cli.stages.context import Context

START_TOLERANCE = 1e-4
"""Nats: the most KL an untrained policy may show against itself."""


@dataclass(frozen=True)
class Evaluator:
    """Measures a policy against the SFT policy on the pinned prompts."""

    ctx: Context
    collector: Collector

    @classmethod
    def of(cls, ctx: Context, collector: Collector) -> Evaluator:
        """Measures with the collector's frozen judges, at temperature 1, with the evaluation's seed."""
        pinned = replace(
            collector,
            seed=ctx.recipe.eval.seed,
            drawing=PLAIN,
            learned_reward=False,
            soft_beta=None,
            missing="stop" if collector.missing == "stop" else "keep",
        )
        return cls(ctx, pinned)

    @property
    def prompts(self) -> Sequence[str]:
        """Those that every run on the data is measured on."""
        return self.ctx.corpus.pinned(self.ctx.recipe.eval.prompts)

    def measure(self, actor: Actor) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The `eval/` metrics of a policy, and one row per prompt with the response behind them."""
        texts, world = self.prompts, self.ctx.world
        encoder = Encoder.of(self.collector.tokenizer, self.ctx.recipe.data)
        ids = [
            Asked(ids, text=text) for ids, text in zip(encoder.prompts(texts), texts, strict=True)
        ]
        # Processes share prompts evenly: the last one is repeated as often as that takes.
        padded = ids + ids[-1:] * (-len(ids) % world.size)
        rollout, _ = self.collector.collect(actor, padded, Sampling(policy=1), "eval", 0)
        rollout = rollout.take(torch.arange(len(ids), device=rollout.mask.device))
        assert rollout.logp_ref is not None
        flat = (rollout.logp_old[:, 0], rollout.logp_ref[:, 0], rollout.mask[:, 0])
        kl = kl_estimates(*flat)
        columns: dict[str, Tensor] = {
            "kl": kl.k1,
            "logp": rollout.logp_old[:, 0].double().sum(-1),
            "logp_ref": rollout.logp_ref[:, 0].double().sum(-1),
            "length": rollout.mask[:, 0].sum(-1),
            "ended": self.collector.ended(rollout)[:, 0],
        }
        if rollout.score is not None:
            columns["score"] = rollout.score[:, 0]
        if self.ctx.recipe.eval.exact_kl:
            columns["kl_exact"] = self._exact(actor, rollout)
        responses = self.collector.texts(rollout)
        if rollout.reward is not None:
            columns["gold"] = columns["score"]  # what a task pays is no proxy of anything
        elif self.ctx.corpus.gold is not None:
            columns["gold"] = torch.tensor(self.ctx.corpus.gold(texts, responses))
        rows = [
            {"prompt": text, "response": response, **{k: _known(v[i]) for k, v in columns.items()}}
            for i, (text, response) in enumerate(zip(texts, responses, strict=True))
        ]
        health = self._health(texts, responses)
        return {**_summary(columns), **health, "eval/kl_k3": float(kl.k3.mean())}, rows

    def _health(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
        """Whether the responses are still texts, going by their words."""
        repeated = sum(map(repetition, responses)) / len(responses)
        found = {"eval/repetition": repeated, "eval/distinct_2": distinct(responses)}
        if self.ctx.recipe.data.has_references:
            answers = self.ctx.corpus.heldout.answers()
            both = zip(prompts, responses, strict=True)
            alike = [rouge_l(response, answers[p]) for p, response in both if p in answers]
            found["eval/rouge_l"] = sum(alike) / len(alike) if alike else math.nan
        return found

    def _exact(self, actor: Actor, rollout: Rollout) -> Tensor:
        """[P] KL over the full vocabulary, summed over the states of each response."""
        ref = self.collector.judges.ref
        assert ref is not None
        tokens, attention, mask = rollout.tokens[:, 0], rollout.attention[:, 0], rollout.mask[:, 0]
        total = torch.zeros(len(tokens))
        with torch.no_grad():
            for part in in_parts(tokens, attention, mask, self.collector.micro_batch):
                ask = (part.tokens, part.attention, part.length)
                per_state = exact_kl(next_logits(actor.policy, *ask), next_logits(ref, *ask))
                total[part.index] = (per_state * part.mask).sum(-1).float().cpu()
        return total


def _known(value: Tensor) -> float | None:
    """A number, or None for a score that is missing."""
    return float(value) if value.isfinite() else None


def _summary(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Means and standard errors under their published names."""
    summary = {"eval/prompts": float(len(columns["kl"]))}
    for name, column in {"kl": "kl", "reward": "score", "gold": "gold"}.items():
        if column in columns:
            known = columns[column][columns[column].isfinite()]
            mean, se = mean_and_se(known.double().tolist())
            summary |= {f"eval/{name}": mean, f"eval/{name}_se": se}
    if "score" in columns and (unscored := int((~columns["score"].isfinite()).sum())):
        summary["eval/unscored"] = float(unscored)
    if "kl_exact" in columns:
        summary["eval/kl_exact"] = float(columns["kl_exact"].double().mean())
    tokens = float(columns["length"].sum())
    summary["eval/entropy"] = -float(columns["logp"].sum()) / tokens
    summary["eval/perplexity_ref"] = math.exp(min(-float(columns["logp_ref"].sum()) / tokens, 700))
    summary["eval/length"] = float(columns["length"].mean())
    summary["eval/eos_rate"] = float(columns["ended"].mean())
    return summary


def check_start(metrics: Mapping[str, float]) -> None:
    """UserError unless the policy that RL starts from shows no KL to its reference."""
    kl, k3 = metrics["eval/kl"], metrics["eval/kl_k3"]
    if abs(kl) > START_TOLERANCE or abs(k3) > START_TOLERANCE:
        raise UserError(
            f"the KL to the SFT policy is {kl:.2e} nats (k3 {k3:.2e}) before the first update, but must "
            f"be 0 (to {START_TOLERANCE:g}): look for a reference that is not the SFT checkpoint the "
            "policy started from, another precision or attention kernel for one of the two, dropout "
            "left on, or padding that is counted"
        )
