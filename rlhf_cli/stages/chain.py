"""The models that the earlier stages of a chain have left, as its RL stage and its evaluations want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.config import Recipe
from rlhf_cli.data.corpus import Corpus
from rlhf_cli.engine import vllm
from rlhf_cli.engine.placement import in_step, placed
from rlhf_cli.engine.rollout import Collector, Judges
from rlhf_cli.engine.sampler import Sampler
from rlhf_cli.engine.world import World
from rlhf_cli.models.checks import check_scores
from rlhf_cli.models.heads import Scorer
from rlhf_cli.models.load import load_policy, load_reward_model, new_reward_model
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.models.tuning import Policy
from rlhf_cli.rewards.written import opened


@dataclass(frozen=True)
class Chain:
    """What is left, by role: sft, reward, guide."""

    recipe: Recipe
    corpus: Corpus
    world: World
    finals: Mapping[str, Path]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The SFT policy's, which all share."""
        return load_tokenizer(self.finals["sft"])

    def policy(self, role: str = "sft") -> PreTrainedModel:
        """A policy, on the CPU."""
        return self.policy_in(self.finals[role])

    def policy_in(self, folder: Path) -> PreTrainedModel:
        """The policy in a folder, loaded as those of the chain are."""
        recipe = self.recipe
        precision, attention = recipe.model.precision, recipe.launch.attention
        return load_policy(folder, precision, self.tokenizer, attention)

    def scorer(self) -> PreTrainedModel:
        """The reward model, which a critic starts from too; without one, a new head on the SFT policy."""
        recipe, attention = self.recipe, self.recipe.launch.attention
        if "reward" not in self.finals:
            # A task pays, or others score: nothing to start a critic from but the policy.
            sft = self.finals["sft"]
            return new_reward_model(recipe.model, sft, self.tokenizer, recipe.seed, attention)
        own = recipe.reward.model.precision
        return load_reward_model(self.finals["reward"], own, self.tokenizer, attention)

    def judges(self, ref: Policy, guide: PreTrainedModel | None = None) -> Judges:
        """Everybody who scores, checked. Raises UserError if a score depends on more than its text."""
        recipe, corpus, device = self.recipe, self.corpus, self.world.device
        reward = Scorer(self.scorer()).to(device) if "reward" in self.finals else None
        if reward is not None:
            texts = (demo.prompt + demo.response for demo in corpus.heldout.demos)
            check_scores(reward, self.tokenizer, texts)
            reward = placed(reward, recipe.launch, self.world)
        written = None
        if corpus.task is None:
            written = opened(recipe.reward.parts, corpus.gold, str(device))
        return Judges(ref, reward, guide, recipe.reward.learned, written)

    def sampler(self) -> Sampler | None:
        """Who draws from the policy as it learns; None is the policy itself."""
        chosen, data = self.recipe.sampler, self.recipe.data
        if chosen.kind == "native":
            return None
        longest = data.max_prompt_tokens + data.max_response_tokens
        return vllm.sampler(chosen, self.world, self.finals["sft"], self.tokenizer, longest)

    def collector(self, judges: Judges, **more: Any) -> Collector:
        """Draws and scores as the recipe says; more: fields of the collector that it does not."""
        recipe = self.recipe
        return Collector(
            world=self.world,
            tokenizer=self.tokenizer,
            judges=judges,
            micro_batch=recipe.launch.micro_batch,
            max_response_tokens=recipe.data.max_response_tokens,
            seed=recipe.seed,
            unended=recipe.reward.unended,
            unended_adds=recipe.reward.unended_adds,
            missing=recipe.reward.missing,
            drawing=recipe.rollout,
            partner=self.corpus.task,
            together=self.world.size > 1 and in_step(recipe.launch),
            **more,
        )
