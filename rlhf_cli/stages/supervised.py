"""The loop of the two stages that learn from given rows: SFT and the reward model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.forward import Rows, in_parts, longest
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.order import batch_at
from rlhf_cli.engine.placement import in_step
from rlhf_cli.engine.rollout import Asked, Collector, Judges, laid_out
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor
from rlhf_cli.stages.context import Context

Batch = tuple[Tensor, Tensor, Tensor]
"""tokens [N,L], attention [N,L], mask [N,T] of the last T columns."""


def whole_texts(rows: Sequence[tuple[Sequence[int], ...]], pad: int) -> Batch:
    """Each (prompt ids, response ids) as one text to be learned but for its first token."""
    texts = [[*prompt, *response] for prompt, response in rows]
    longest = max(map(len, texts)) - 1
    return laid_out([text[:1] for text in texts], [text[1:] for text in texts], 1, longest, pad)


def after_prompts(rows: Sequence[tuple[Sequence[int], ...]], pad: int) -> Batch:
    """Each prompt with its first response, its second, and so on in rows beside each other."""
    prompts = [prompt for prompt, *behind in rows for _ in behind]
    replies = [reply for _, *behind in rows for reply in behind]
    width, longest = (max(map(len, texts)) for texts in (prompts, replies))
    return laid_out(prompts, replies, width, longest, pad)


def fit(
    ctx: Context,
    learner: Learner,
    rows: int,
    batch: int,
    seed: int,
    collate: Callable[[Sequence[int]], Batch],
    judge: Callable[..., Judged],
    count: Callable[[Tensor], Mapping[int, float]],
    evaluate: Callable[[bool], Mapping[str, float]],
    group: int = 1,
) -> None:
    """Trains for `learner.steps` steps on batches of row numbers, evaluating as often as RL does.

    With no step to make it evaluates once.

    collate turns row numbers into a batch of `group` sequences each; judge is called with some Rows and
    the denominators, as `counts`; count turns the whole batch's
    mask into denominators; evaluate is told whether it is the last time.
    """
    ctx.resume(learner)
    if not learner.steps:
        ctx.report(0, {"episodes": 0, **evaluate(True)})
        return
    ctx.progress.start(learner.steps, learner.step_index)
    points = min(ctx.recipe.eval.points, learner.steps)
    due = {round(learner.steps * (i + 1) / points) for i in range(points)}
    while (step := learner.step_index) < learner.steps:
        began = time.perf_counter()
        batch_rows = collate(batch_at(rows, batch, step, seed).tolist())
        tokens, attention, mask = (t.to(ctx.world.device) for t in batch_rows)
        counts = count(mask)
        mine = ctx.world.share(len(mask))
        most = ctx.recipe.launch.micro_batch
        parts = list(in_parts(tokens[mine], attention[mine], mask[mine], most, group))
        metrics = learner.step(parts, partial(judge, counts=counts))
        ctx.guard.after(metrics, learner)
        row = {f"train/{name}": value for name, value in metrics.items()}
        row |= ctx.guard.row(learner)
        seconds = time.perf_counter() - began
        row["episodes"] = (step + 1) * batch
        row["perf/step_seconds"] = seconds
        row["perf/tokens_per_second"] = float(attention.sum()) / seconds
        if step + 1 in due:
            row |= evaluate(step + 1 == learner.steps)
        ctx.report(step + 1, row, f"loss {metrics['loss']:.3f}")
        if step + 1 in due:  # after its row, which nobody who goes on from here would write
            ctx.save(learner, {})
        ctx.between_steps(learner, dict)


def rehearsal(ctx: Context, rows: int, prompt: int, group: int = 1) -> Rows:
    """The largest micro-batch there may be when a batch has so many rows, each with such a prompt."""
    data, most = ctx.recipe.data, ctx.recipe.launch.micro_batch
    whole = data.max_prompt_tokens + data.max_response_tokens
    mine = rows // ctx.world.size
    return longest(mine, most, prompt, whole - prompt, ctx.world.device, group)


def responses(
    ctx: Context,
    actor: Actor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    judges: Judges,
    seed: int,
    stream: str,
) -> Rollout:
    """A response to each prompt, but for the last few that cannot be dealt out evenly to processes."""
    data, size = ctx.recipe.data, ctx.world.size
    micro_batch, longest = ctx.recipe.launch.micro_batch, data.max_response_tokens
    together = size > 1 and in_step(ctx.recipe.launch)
    collector = Collector(
        ctx.world, tokenizer, judges, micro_batch, longest, seed, together=together
    )
    even = prompts[: len(prompts) // size * size]
    asked = [Asked(ids) for ids in Encoder.of(tokenizer, data).prompts(even)]
    return collector.collect(actor, asked, Sampling(policy=1), stream, 0)[0]


def require(rows: Sequence[object], what: str, batch: int, title: str) -> None:
    """UserError unless there are enough rows for one batch."""
    if len(rows) < batch:
        raise UserError(
            f"data={title} has {len(rows)} {what} but {batch} are needed; give more data or a smaller"
            " batch."
        )
