"""Credit per token of answers, and of the same answers with one sentence of another answer in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.corpus import Pair
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.errors import UserError
from rlhf_cli.figures.kinds.credit import Options
from rlhf_cli.figures.spec import Spec
from rlhf_cli.store.files import atomic_write
from rlhf_cli.store.run import Run
from rlhf_cli.tools.checkpoints import load, tokenizer_of, trained
from rlhf_cli.tools.credit import token_credit
from rlhf_cli.tools.decode import corpus_of
from rlhf_cli.tools.explain import pieces, score

SENTENCE = re.compile(r"[^.?!]+[.?!]+")


@dataclass(frozen=True)
class Cut:
    """An answer around one of its sentences."""

    before: str
    sentence: str
    after: str

    @property
    def text(self) -> str:
        """All of it."""
        return self.before + self.sentence + self.after


def prepare(panels: Mapping[str, Sequence[Run]], spec: Spec) -> None:
    """Compute the credit of every run that has none for this figure yet. Raises UserError."""
    options = spec.typed(Options)
    for run in (run for runs in panels.values() for run in runs):
        file = spec.made_of(run)
        if not file.is_file():
            found = {"pairs": credits(run, options.answers)}
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, json.dumps(found) + "\n")


def credits(run: Run, answers: int) -> list[dict[str, Any]]:
    """{prompt, beta, original, corrupted} of so many answers, each of the two {tokens, credit, span}.

    span: the first token of the sentence and the first after it. Raises UserError if the run started from
    no policy, or if its data have too few answers of two sentences that need not be cut.
    """
    policy = trained(run.path.parents[1], str(run.path))
    ref = policy.reference()
    if ref is None:
        raise UserError(f"{policy.name} started from no policy; name runs of stage rl.")
    tokenizer = tokenizer_of(policy, ref)
    encoder = Encoder.of(tokenizer, policy.recipe.data)

    def whole(answer: Cut) -> bool:
        return encoder.response(answer.text)[-1] == tokenizer.eos_token_id

    pairs = corpus_of(policy).heldout.pairs
    cuts = [cut for cut in corruptions(pairs) if whole(cut[1]) and whole(cut[2])]
    if len(cuts) < answers:
        raise UserError(
            f"options.answers={answers} is more than the {len(cuts)} held-out answers of {policy.name}"
            " that have two sentences and are not too long for it; lower it."
        )
    models = load([policy, ref], policy.recipe.model.precision, tokenizer)
    beta = policy.manifest["beta"] or 1.0
    return [
        {
            "prompt": prompt,
            "beta": beta,
            "original": _credited(encoder, models, prompt, original, beta),
            "corrupted": _credited(encoder, models, prompt, corrupted, beta),
        }
        for prompt, original, corrupted in cuts[:answers]
    ]


def corruptions(pairs: Sequence[Pair]) -> Iterator[tuple[str, Cut, Cut]]:
    """Prompts with their preferred answer, cut around its middle sentence, and with another one there.

    The other is the first sentence of the next preferred answer that this one does not have. Answers of one
    sentence are left out, and those whose next answer has nothing new.
    """
    for pair, following in pairwise(pairs):
        own = SENTENCE.findall(pair.chosen)
        new = [each for each in SENTENCE.findall(following.chosen) if each not in own]
        if len(own) < 2 or not new:
            continue
        place = len(own) // 2
        before, after = "".join(own[:place]), "".join(own[place + 1 :])
        yield pair.prompt, Cut(before, own[place], after), Cut(before, new[0], after)


def _credited(
    encoder: Encoder, models: Sequence[PreTrainedModel], prompt: str, answer: Cut, beta: float
) -> dict[str, Any]:
    asked, ids = encoder.prompt(prompt), encoder.response(answer.text)
    logp, logp_ref = (score(model, asked, ids) for model in models)
    return {
        "tokens": pieces(encoder.tokenizer, ids),
        "credit": token_credit(logp, logp_ref, torch.ones(len(ids)), beta).tolist(),
        "span": _span(encoder.tokenizer, ids, answer),
    }


def _span(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer: Cut) -> tuple[int, int]:
    """Which tokens the sentence is in, a token that it shares included."""
    begin = len(answer.before)
    end = begin + len(answer.sentence)
    inside, reached = [], 0
    for place, piece in enumerate(pieces(tokenizer, ids)):
        if reached < end and reached + len(piece) > begin:
            inside.append(place)
        reached += len(piece)
    return inside[0], inside[-1] + 1
