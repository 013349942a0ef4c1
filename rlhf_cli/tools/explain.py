"""Credit token by token of one or two answers to a prompt, read off a policy and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.hh import ASSISTANT
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.errors import UserError
from rlhf_cli.figures.credit import Answer, Heatmap
from rlhf_cli.models.heads import log_probs
from rlhf_cli.tools.checkpoints import Policy, check_fits, load, tokenizer_of
from rlhf_cli.tools.credit import token_credit

MARKERS = (ASSISTANT, "TL;DR:")
"""Where a prompt of HH, and one of TL;DR, ends."""
UNCUT = 10**9
"""More tokens than any text has."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character decodes to."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the answers to it by name."""

    prompt: str
    answers: dict[str, str]


def question(text: str, prompt: str | None, other: str | None) -> Question:
    """What is asked about: a transcript, or an answer to `prompt`, and another answer to the same.

    An answer that touches its prompt gets the space that answers begin with in training.
    Raises UserError.
    """
    for name, words in {"text": text, "prompt": prompt, "other": other}.items():
        if words is not None and not words.strip():
            raise UserError(f"--{name} is empty; give a text, or `-` to read it from stdin.")
    if prompt is None:
        prompt, text = _transcript(text)
    answers = {"text": text}
    if other is not None:
        if not other.startswith(prompt) and any(marker in other for marker in MARKERS):
            raise UserError("--other answers another prompt; give two answers to one prompt.")
        answers["other"] = other.removeprefix(prompt)
    for name, words in answers.items():
        if not words.strip():
            raise UserError(f"--{name} ends where its answer should begin; add the answer.")
        if not (prompt[-1].isspace() or words[0].isspace()):
            answers[name] = f" {words}"
    return Question(prompt, answers)


def _transcript(text: str) -> tuple[str, str]:
    """Prompt and answer: cut after the last turn marker of HH or, without one, the last of TL;DR."""
    for marker in MARKERS:
        before, found, after = text.rpartition(marker)
        if found:
            return before + found, after
    raise UserError(
        "--text is no transcript: it has neither an Assistant: turn nor TL;DR:; give what it answers"
        " with --prompt."
    )


def explain(
    policy: Policy, ref: Policy, asked: Question, beta: float | None
) -> tuple[Heatmap, dict[str, list[dict[str, object]]]]:
    """The heatmap, and for each answer its tokens with their log-probabilities.

    beta: None for the policy's own; 1, which leaves credit in nats, where it has none.
    """
    tokenizer = tokenizer_of(policy, ref)
    encoder = Encoder(tokenizer, UNCUT, UNCUT, shorter=lambda _: None)
    prompt = encoder.prompt(asked.prompt)
    given = {name: encoder.response(text) for name, text in asked.answers.items()}
    for name, ids in given.items():
        for each in (policy, ref):
            check_fits(each, len(prompt) + len(ids), f"--{name} with its prompt")
    own = policy.manifest.get("beta") or None
    scale = beta or own or 1.0
    made = policy.recipe
    heat = made.rollout.temperature if policy.manifest.get("stage") == "rl" else 1.0
    models = load([policy, ref], made.model.precision, tokenizer)
    answers, tokens = [], {}
    for name, ids in given.items():
        logp, logp_ref = (score(model, prompt, ids, heat) for model in models)
        credit = token_credit(logp, logp_ref, torch.ones(len(ids)), scale).tolist()
        texts = pieces(tokenizer, ids)
        answers.append(Answer(name, tuple(texts), tuple(credit)))
        columns = zip(ids, texts, logp.tolist(), logp_ref.tolist(), credit, strict=True)
        words = ("id", "text", "logp", "logp_ref", "credit")
        tokens[name] = [dict(zip(words, row, strict=True)) for row in columns]
    whose = "its own" if beta is None and own else "given" if beta else "it has none: nats"
    facts = {"pi": policy.name, "pi_ref": ref.name, "beta": f"{scale:g} ({whose})"}
    if heat != 1.0:
        facts["temperature"] = f"{heat:g} (of its rollouts)"
    return Heatmap(facts, asked.prompt, scale, tuple(answers)), tokens


@torch.inference_mode()
def score(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """[T] log-probability of each token of a response."""
    tokens = torch.tensor([[*prompt, *response]], device=model.device)
    seen = torch.ones_like(tokens, dtype=torch.bool)
    return log_probs(model, tokens, seen, len(response), temperature=temperature)[0].cpu()


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text.

    A character made of several tokens stands with the last of them.
    """
    said, added = "", []
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if whole.endswith(BROKEN):
            added.append(BROKEN)
        else:
            added.append(whole[len(said) :].lstrip(BROKEN))
            said = whole
    return added
