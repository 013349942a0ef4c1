"""Several ways to get responses out of a finished policy, and what each response is worth.

    sample   y_t ~ pi(.|s_t) at a temperature
    greedy   y_t = argmax pi(.|s_t)
    beam     the likeliest response that a search of some width finds: by summed log-probability, no
             length penalty, as in "From r to Q*" (Rafailov et al. 2024, arXiv:2404.12358), whose
             figure 2 finds that a few beams help and many make responses longer and worse

Sampling and greedy decoding also work on a product of policies (`tools.credit.product`): a base, a tuned
proxy and the proxy's reference, with weights 1, B and -B. Beam search takes one policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.config import Recipe, read, recipe
from rlhf_cli.data.corpus import Corpus, Dataset
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.sampler import Expert, draw, uniforms
from rlhf_cli.errors import UserError
from rlhf_cli.models.checks import check_scores
from rlhf_cli.models.heads import Scorer, next_logits
from rlhf_cli.models.load import load_reward_model
from rlhf_cli.recipes import Reward
from rlhf_cli.store.run import Run
from rlhf_cli.tools.checkpoints import Policy, check_fits, device, load, tokenizer_of
from rlhf_cli.tools.credit import product

Kind = Literal["sample", "greedy", "beam"]
WIDTH = 5
"""Of a beam unless told: the best of those in the paper's figure 2."""


@dataclass(frozen=True)
class Decoding:
    """How to decode."""

    kind: Kind
    width: int
    """Of the beam."""
    temperature: float
    """Of samples."""
    seed: int | None
    """Of samples; None for that of the run's evaluations, whose random numbers these then are."""

    @classmethod
    def of(
        cls, kind: str, width: int | None, temperature: float | None, seed: int | None, proxy: bool
    ) -> Decoding:
        """What was asked for, None where nothing was. Raises UserError for what has no effect."""
        if kind not in get_args(Kind):
            raise UserError(
                f"--decode={kind} is not allowed: choose one of {', '.join(get_args(Kind))}."
            )
        asked = {"width": width, "temperature": temperature, "seed": seed}
        read = {"sample": ("temperature", "seed"), "greedy": (), "beam": ("width",)}[kind]
        for name, value in asked.items():
            if value is not None and name not in read:
                raise UserError(
                    f"--{name}={value} has no effect with --decode={kind}; leave it out."
                )
        if temperature is not None and not 0 < temperature < math.inf:
            raise UserError(
                f"--temperature={temperature:g} is not allowed: it must be above 0 (--decode=greedy is"
                " the limit)."
            )
        if proxy and kind == "beam":
            raise UserError(
                "--decode=beam searches one policy; leave --proxy out, or decode otherwise."
            )
        return cls(cast(Kind, kind), width or WIDTH, temperature or 1.0, seed)


@dataclass(frozen=True)
class Response:
    """One response and what is known about it; None where nobody can tell."""

    prompt: str
    response: str
    tokens: int
    ended: bool
    """Whether it closes with the end token; otherwise it was cut."""
    logp: float
    """Log-probability in nats, at temperature 1, of the distribution that was decoded."""
    kl: float
    """Log-ratio to the SFT policy in nats; over samples its mean estimates the KL."""
    score: float | None
    """By the reward model that the run learned from, or else the proxy."""
    gold: float | None


@dataclass(frozen=True)
class Judge:
    """A reward model, and what its run made of responses that were cut."""

    model: Scorer
    made: Reward

    @classmethod
    def of(cls, run: Run, tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Judge:
        """The reward model of a finished run. Raises UserError unless scores on the corpus are sound."""
        made = recipe(read(run.config_path)).reward
        scorer = Scorer(load_reward_model(run.final, made.model.precision, tokenizer)).to(device())
        check_scores(scorer, tokenizer, (d.prompt + d.response for d in corpus.heldout.demos))
        return cls(scorer, made)

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], response: Sequence[int], ended: bool) -> float:
        """Of one response, as evaluations score."""
        tokens = torch.tensor([[*prompt, *response]], device=device())
        score = float(self.model(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        if ended or self.made.unended is None:
            return score
        return score + self.made.unended if self.made.unended_adds else self.made.unended


@dataclass(frozen=True)
class Decoder:
    """A distribution over responses, and its judges."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    experts: Sequence[Expert]
    ref: PreTrainedModel
    reward: Judge | None
    corpus: Corpus

    @classmethod
    def of(
        cls, policy: Policy, corpus: Corpus, proxy: tuple[Policy, Policy, float] | None = None
    ) -> Decoder:
        """The policy of a run, or its product with (proxy / proxy's reference)^weight."""
        ref = policy.reference() or policy
        named = [policy, ref, *(proxy[:2] if proxy else ())]
        tokenizer = tokenizer_of(*named)
        made = policy.recipe
        base, anchor, *pair = load(named, made.model.precision, tokenizer)
        experts = [Expert(base)]
        if proxy is not None:
            experts += [Expert(pair[0], proxy[2]), Expert(pair[1], -proxy[2])]
        reward, judge = None, policy.parent("reward")
        if judge is None and proxy is not None:
            judge = proxy[0].parent("reward")
        if judge is not None:
            reward = Judge.of(judge, tokenizer, corpus)
        return cls(made, tokenizer, experts, anchor, reward, corpus)

    def decode(self, prompts: Sequence[str], how: Decoding) -> list[Response]:
        """One response to each prompt."""
        ids = Encoder.of(self.tokenizer, self.recipe.data).prompts(prompts)
        if how.kind == "beam":
            found = [self._search(each, how.width) for each in ids]
        else:
            found = self._draw(ids, how)
        rows = zip(prompts, ids, found, strict=True)
        return [self._judged(text, prompt, response) for text, prompt, response in rows]

    def _draw(self, prompts: Sequence[Sequence[int]], how: Decoding) -> list[list[int]]:
        made = self.recipe
        seed = made.eval.seed if how.seed is None else how.seed
        rows = range(len(prompts))
        uniform = uniforms(seed, "eval", 0, rows, made.data.max_response_tokens)
        drawn = draw(
            self.experts,
            prompts,
            1,
            uniform,
            max(map(len, prompts)),
            self._end,
            self._pad,
            0.0 if how.kind == "greedy" else how.temperature,
        )
        responses = drawn.tokens[:, -drawn.mask.shape[1] :]
        return [r[m.bool()].tolist() for r, m in zip(responses, drawn.mask, strict=True)]

    def _search(self, prompt: Sequence[int], width: int) -> list[int]:
        (only,) = self.experts
        longest = self.recipe.data.max_response_tokens
        return beam(only.model, prompt, width, longest, self._end, self._pad)

    def _judged(self, text: str, prompt: Sequence[int], response: Sequence[int]) -> Response:
        logp = float(log_law(self.experts, prompt, response).sum())
        logp_ref = float(log_law([Expert(self.ref)], prompt, response).sum())
        ended = response[-1] == self._end
        said = self.tokenizer.decode(response, skip_special_tokens=True)
        return Response(
            prompt=text,
            response=said,
            tokens=len(response),
            ended=ended,
            logp=logp,
            kl=logp - logp_ref,
            score=self.reward.score(prompt, response, ended) if self.reward else None,
            gold=self._gold(text, said),
        )

    def _gold(self, prompt: str, response: str) -> float | None:
        """None for a prompt that is not of the corpus, too."""
        if self.corpus.gold is None:
            return None
        try:
            return self.corpus.gold([prompt], [response])[0]
        except ValueError:
            return None

    @property
    def _end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)


def corpus_of(policy: Policy) -> Corpus:
    """The rows that the run of a policy was trained on and held out."""
    data: Dataset = policy.recipe.data
    return data.load()


def prompts_of(policy: Policy, corpus: Corpus, typed: str | None, count: int) -> list[str]:
    """The prompt that was typed, or the first of the held-out ones. Raises UserError."""
    if typed is None:
        return list(corpus.heldout.prompts[:count])
    if not typed.strip():
        raise UserError("--prompt is empty; give a text, or `-` to read it from stdin.")
    data, tokenizer = policy.recipe.data, tokenizer_of(policy)
    tokens = len(tokenizer(typed)["input_ids"])
    if tokens > data.max_prompt_tokens:
        raise UserError(
            f"--prompt has {tokens} tokens, more than the data.max_prompt_tokens"
            f"={data.max_prompt_tokens} of {policy.name}; shorten it."
        )
    check_fits(policy, tokens + data.max_response_tokens, "--prompt with a response")
    return [typed]


@torch.inference_mode()
def log_law(experts: Sequence[Expert], prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """[T] log-probability of each token of a response under a product of policies."""
    said = []
    for expert in experts:
        tokens = torch.tensor([[*prompt, *response]], device=expert.model.device)
        seen = torch.ones_like(tokens, dtype=torch.bool)
        logits = next_logits(expert.model, tokens, seen, len(response))
        said.append(logits[0].float().log_softmax(-1))
    log_probs = product(said, [expert.weight for expert in experts])
    taken = torch.tensor(response, device=log_probs.device).unsqueeze(-1)
    return log_probs.gather(-1, taken).squeeze(-1)


@torch.inference_mode()
def beam(
    policy: PreTrainedModel, prompt: Sequence[int], width: int, longest: int, end: int, pad: int
) -> list[int]:
    """The response of largest summed log-probability among those that a beam of `width` comes by.

    At each length the `width` likeliest extensions are looked at: those that end are set aside, and
    the `width` likeliest that do not end go on. The search is over when none of them can still overtake
    the worst of `width` responses set aside, as a log-probability only falls; responses of `longest`
    tokens count as set aside. Width 1 is greedy decoding; a width that loses nothing is exact.

    `transformers` searches so without a length penalty and with early_stopping="never"; with its
    defaults it divides by the length, which favours long responses.
    """
    settings = {"eos_token_id": end, "pad_token_id": pad}
    # What a checkpoint recommends for chatting (penalties, bans) would be no likelihood.
    policy.generation_config = GenerationConfig(**settings)
    ids = torch.tensor([list(prompt)], device=policy.device)
    whole = policy.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            num_beams=width,
            do_sample=False,
            max_new_tokens=longest,
            length_penalty=0.0,
            early_stopping="never",
            **settings,
        ),
    )
    response: list[int] = whole[0, len(prompt) :].tolist()
    return response
