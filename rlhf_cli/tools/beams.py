"""Beams of several widths from finished policies, for the figure that compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_cli.data.tokens import Encoder
from rlhf_cli.errors import UserError
from rlhf_cli.figures.kinds.beam import Options
from rlhf_cli.figures.spec import Spec
from rlhf_cli.store.files import atomic_write
from rlhf_cli.store.run import Run
from rlhf_cli.tools.checkpoints import trained
from rlhf_cli.tools.decode import Decoder, Decoding, Response, corpus_of


def prepare(panels: Mapping[str, Sequence[Run]], spec: Spec) -> None:
    """Decode from every run that was not decoded for this figure. Raises UserError."""
    options = spec.typed(Options)
    for run in (run for runs in panels.values() for run in runs):
        file = spec.made_of(run)
        if not file.is_file():
            decoded = beams(run, options)
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, json.dumps(decoded) + "\n")


def beams(run: Run, options: Options) -> dict[str, Any]:
    """{prompts, answers, widths}: scores of the preferred answers, and the responses of each width.

    Scores are gold where the data have it, else those of the reward model; raises UserError if the run has
    neither.
    """
    policy = trained(run.path.parents[1], str(run.path))
    corpus = corpus_of(policy)
    decoder = Decoder.of(policy, corpus)
    preferred = {pair.prompt: pair.chosen for pair in reversed(corpus.heldout.pairs)}
    prompts = [each for each in corpus.heldout.prompts if each in preferred][: options.prompts]
    return {
        "prompts": prompts,
        "answers": [_score_of(decoder, prompt, preferred[prompt]) for prompt in prompts],
        "widths": {
            width: [
                {"tokens": one.tokens, "score": _score(run, one), "response": one.response}
                for one in decoder.decode(prompts, Decoding("beam", width, 1.0, None))
            ]
            for width in options.widths
        },
    }


def _score(run: Run, response: Response) -> float:
    found = response.score if response.gold is None else response.gold
    if found is None:
        raise UserError(
            f"{run.path} has neither a gold reward nor a reward model that its responses could be judged"
            " by; train it with eval.proxy=true."
        )
    return found


def _score_of(decoder: Decoder, prompt: str, answer: str) -> float | None:
    """Of an answer of the data; None where responses have none either."""
    if decoder.corpus.gold is not None:
        return decoder.corpus.gold([prompt], [answer])[0]
    if decoder.reward is None:
        return None
    encoder = Encoder.of(decoder.tokenizer, decoder.recipe.data)
    ids = encoder.response(answer)
    ended = ids[-1] == decoder.tokenizer.eos_token_id
    return decoder.reward.score(encoder.prompt(prompt), ids, ended)
