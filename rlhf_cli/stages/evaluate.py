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

from rlhf_cli.config import Recipe
from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.data.corpus import Corpus
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.forward import in_parts
from rlhf_cli.engine.rollout import PLAIN, Asked, Collector
from rlhf_cli.errors import UserError
from rlhf_cli.evals.health import distinct, repetition, rouge_l
from rlhf_cli.evals.kl import exact_kl, kl_estimates
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.models.heads import Actor, next_logits

START_TOLERANCE = 1e-4
"""Nats: the most KL an untrained policy may show against itself."""


@dataclass(frozen=True)
class Evaluator:
    """Measures a policy against the SFT policy on the pinned prompts."""

    recipe: Recipe
    corpus: Corpus
    collector: Collector

    @classmethod
    def of(cls, recipe: Recipe, corpus: Corpus, collector: Collector) -> Evaluator:
        """Measures with the collector's frozen judges, at temperature 1, with the evaluation's seed."""
        pinned = replace(
            collector,
            seed=recipe.eval.seed,
            drawing=PLAIN,
            learned_reward=False,
            soft_beta=None,
            missing="stop" if collector.missing == "stop" else "keep",
        )
        return cls(recipe, corpus, pinned)

    def measure(
        self, actor: Actor, draws: int = 1
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The `eval/` metrics of a policy, and a row per response behind them, prompt by prompt.

        draws: responses to each prompt; the first of each is the one that every evaluation draws.
        """
        prompts = self.corpus.pinned(self.recipe.eval.prompts)
        encoder = Encoder.of(self.collector.tokenizer, self.recipe.data)
        both = zip(encoder.prompts(prompts), prompts, strict=True)
        asked = [Asked(ids, text=text) for ids, text in both]
        drawn = [self._drawn(actor, asked, place) for place in range(draws)]
        texts = [response for _, responses in drawn for response in responses]
        columns = {name: torch.stack([each[name] for each, _ in drawn], 1) for name in drawn[0][0]}
        kl_k3 = columns.pop("kl_k3")
        rows = [
            {
                "prompt": prompt,
                "response": drawn[place][1][at],
                **{name: _known(column[at, place]) for name, column in columns.items()},
            }
            for at, prompt in enumerate(prompts)
            for place in range(draws)
        ]
        summary = {**_summary(columns), **self._health([*prompts] * draws, texts)}
        return {**summary, "eval/kl_k3": float(kl_k3.mean())}, rows

    def _drawn(
        self, actor: Actor, asked: list[Asked], place: int
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What is known of one response to each prompt, [P] each, and the responses."""
        # Processes share prompts evenly: the last one is repeated as often as that takes.
        padded = asked + asked[-1:] * (-len(asked) % self.collector.world.size)
        rollout, _ = self.collector.collect(actor, padded, Sampling(policy=1), "eval", place)
        rollout = rollout.take(torch.arange(len(asked), device=rollout.mask.device))
        assert rollout.logp_ref is not None
        flat = (rollout.logp_old[:, 0], rollout.logp_ref[:, 0], rollout.mask[:, 0])
        kl = kl_estimates(*flat)
        columns: dict[str, Tensor] = {
            "kl": kl.k1,
            "kl_k3": kl.k3,
            "logp": rollout.logp_old[:, 0].double().sum(-1),
            "logp_ref": rollout.logp_ref[:, 0].double().sum(-1),
            "length": rollout.mask[:, 0].sum(-1),
            "ended": self.collector.ended(rollout)[:, 0],
        }
        if rollout.score is not None:
            columns["score"] = rollout.score[:, 0]
        if self.recipe.eval.exact_kl:
            columns["kl_exact"] = self._exact(actor, rollout)
        responses = self.collector.texts(rollout)
        if rollout.reward is not None:
            columns["gold"] = columns["score"]  # what a task pays is no proxy of anything
        elif self.corpus.gold is not None:
            columns["gold"] = torch.tensor(self.corpus.gold([a.text for a in asked], responses))
        return columns, responses

    def _health(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, float]:
        """Whether the responses are still texts, going by their words."""
        repeated = sum(map(repetition, responses)) / len(responses)
        found = {"eval/repetition": repeated, "eval/distinct_2": distinct(responses)}
        if self.recipe.data.has_references:
            answers = self.corpus.heldout.answers()
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
                said = (next_logits(model, *part.asked) for model in (actor.policy, ref))
                per_state = exact_kl(*said)
                total[part.index] = (per_state * part.mask).sum(-1).float().cpu()
        return total


def _known(value: Tensor) -> float | None:
    """A number, or None for a score that is missing."""
    return float(value) if value.isfinite() else None


def _summary(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over prompts and responses [P,M], errors over prompts, under their published names."""
    summary = {"eval/prompts": float(len(columns["kl"]))}
    for name, column in {"kl": "kl", "reward": "score", "gold": "gold"}.items():
        if column in columns:
            each = columns[column].double().nanmean(1)
            mean, se = mean_and_se(each[each.isfinite()].tolist())
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
