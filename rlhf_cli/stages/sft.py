"""Supervised fine-tuning: next-token cross-entropy on demonstrations.

    L = - mean_t log pi(y_t | x, y_<t)

over response tokens, and over prompt tokens too where `sft.loss_on_prompt` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from transformers import PreTrainedTokenizerBase

from rlhf_cli.core.masked import denominators
from rlhf_cli.core.rollout import ended
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.forward import Rows, per_token
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.rollout import Judges
from rlhf_cli.models.heads import Actor
from rlhf_cli.models.load import new_policy
from rlhf_cli.models.tokenizer import tokenizer_of
from rlhf_cli.models.tuning import tuned
from rlhf_cli.stages.card import model_card
from rlhf_cli.stages.context import Context
from rlhf_cli.stages.supervised import (
    Batch,
    after_prompts,
    fit,
    rehearsal,
    require,
    responses,
    whole_texts,
)


def main(ctx: Context) -> None:
    """Trains the SFT policy and leaves it in `checkpoints/final`."""
    recipe, data = ctx.recipe.sft, ctx.recipe.data
    texts = (demo.prompt + demo.response for demo in ctx.corpus.train.demos)
    tokenizer = tokenizer_of(ctx.recipe.model, texts)
    pad = int(tokenizer.pad_token_id)

    encoder = Encoder.of(tokenizer, data)
    rows, heldout = (
        ctx.encoded(encoder, [(demo.prompt, demo.response) for demo in split.demos])
        for split in (ctx.corpus.train, ctx.corpus.heldout)
    )
    require(rows, "demonstrations", recipe.batch, data.name)
    steps = max(int(recipe.epochs > 0), int(recipe.epochs * len(rows) / recipe.batch))
    model = ctx.recipe.model
    policy = new_policy(model, tokenizer, ctx.recipe.launch.attention)
    policy = tuned(policy, model.tuning, "model", recipe.seed)
    learner = Learner(
        Actor(policy), recipe.optim, steps, ctx.recipe.launch, ctx.world, ctx.recipe.model.precision
    )

    def collate(index) -> Batch:  # type: ignore[no-untyped-def]
        some = [rows[i] for i in index]
        return whole_texts(some, pad) if recipe.loss_on_prompt else after_prompts(some, pad)

    def judge(part: Rows, counts: Mapping[int, float]) -> Judged:
        logp = learner.engine(*part.asked)["logp"]
        return Judged({"policy": -logp.unsqueeze(1)}, {}, part.mask.unsqueeze(1), counts)

    def evaluate(last: bool) -> dict[str, float]:
        some = heldout if last else heldout[: ctx.recipe.eval.prompts]
        tokens, attention, mask = (t.to(ctx.world.device) for t in after_prompts(some, pad))
        with learner.whole() as actor:
            logp = per_token(
                lambda part: actor(*part.asked)["logp"],
                tokens, attention, mask, ctx.recipe.launch.micro_batch,
            )  # fmt: skip
            ending = _ending(ctx, cast(Actor, actor), tokenizer) if last else {}
        return {"eval/loss": float(-logp.sum() / mask.sum()), **ending}

    prompt = 1 if recipe.loss_on_prompt else data.max_prompt_tokens
    learner.rehearse(*rehearsal(ctx, recipe.batch, prompt).asked)
    fit(
        ctx, learner, len(rows), recipe.batch, recipe.seed, collate, judge,
        lambda mask: denominators(mask.unsqueeze(1)), evaluate,
    )  # fmt: skip
    with learner.whole(to_save=True) as actor:
        if ctx.world.is_main:
            card = model_card(ctx)
            checkpoint.save_final(ctx.run.final, actor.policy, tokenizer, card)


def _ending(ctx: Context, actor: Actor, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Whether the policy has learned to stop; says so if it has not, for nothing later would teach it."""
    prompts, recipe = ctx.corpus.pinned(ctx.recipe.eval.prompts), ctx.recipe
    rollout = responses(
        ctx, actor, tokenizer, prompts, Judges(None, None), recipe.eval.seed, "eval"
    )
    end = int(tokenizer.eos_token_id)
    share = float(ended(rollout.tokens, rollout.mask, end).float().mean())
    if share == 0:
        ctx.progress.warn(
            f"none of {rollout.mask.shape[0]} responses of the SFT policy ended within"
            f" data.max_response_tokens={recipe.data.max_response_tokens}: it may not have learned to stop;"
            " raise sft.epochs, or data.max_response_tokens."
        )
    return {"eval/eos_rate": share, "eval/length": float(rollout.mask.sum(-1).mean())}
