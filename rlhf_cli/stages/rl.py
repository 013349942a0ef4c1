"""The one loop: draw, prepare, step, log.

for each rollout:  responses of the current policy, scored by every model the algorithm needs
                   targets from the whole rollout
                   epochs x minibatches optimiser steps on the algorithm's loss
                   now and then the measurement every frontier is made of
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Model, Targets
from rlhf_cli.core.masked import denominators
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.data.tokens import prompt_ids
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.forward import Rows, in_parts
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.order import batch_at, shuffled
from rlhf_cli.engine.rollout import Collector, Judges
from rlhf_cli.models.heads import Actor, Scorer
from rlhf_cli.models.load import load_policy, load_reward_model
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.stages.card import model_card
from rlhf_cli.stages.context import Context, check_finite
from rlhf_cli.stages.evaluate import Evaluator, check_start


def main(ctx: Context) -> None:
    """Fine-tunes the SFT policy with `algo` and leaves it in `checkpoints/final`."""
    algo, update = ctx.recipe.algo, ctx.recipe.algo.update
    sampling = algo.sampling()
    prompts_each = update.batch // sampling.responses
    rollouts = max(1, update.episodes // update.batch)
    per_rollout = update.epochs * update.minibatches
    collector, learner = _models(ctx, rollouts * per_rollout)
    evaluator = Evaluator(ctx, replace(collector, seed=ctx.recipe.eval.seed))
    prompts = ctx.corpus.train.prompts
    points = min(ctx.recipe.eval.points, rollouts)
    due = {round(rollouts * (i + 1) / points) for i in range(points)}

    state = ctx.resume(learner)
    if state is None:
        state = {}
        _evaluate(ctx, evaluator, learner, 0, {})
    ctx.progress.start(rollouts * per_rollout, learner.step_index)
    for index in range(learner.step_index // per_rollout, rollouts):
        began = time.perf_counter()
        chosen = batch_at(len(prompts), prompts_each, index, ctx.recipe.seed)
        ids = [
            prompt_ids(collector.tokenizer, prompts[i], collector.max_prompt_tokens) for i in chosen
        ]
        with learner.whole() as actor:
            rollout, seconds = collector.collect(actor, ids, sampling, "train", index)  # type: ignore[arg-type]
        with torch.no_grad():
            targets, state = algo.prepare(rollout, state)
        drawn = time.perf_counter()
        steps = [
            _step(ctx, learner, rollout, targets, torch.from_numpy(part))
            for epoch in range(update.epochs)
            for part in shuffled(prompts_each, ctx.recipe.seed, index, epoch).reshape(
                update.minibatches, -1
            )
        ]
        learned = time.perf_counter()
        row = _row(ctx, collector, rollout, steps)
        row |= {
            "episodes": (index + 1) * update.batch,
            "perf/step_seconds": learned - began,
            "perf/generate_seconds": seconds["generate"],
            "perf/score_seconds": seconds["score"],
            "perf/learn_seconds": learned - drawn,
            "perf/generated_tokens_per_second": float(rollout.mask.sum()) / seconds["generate"],
        }
        if index + 1 in due:
            _evaluate(ctx, evaluator, learner, learner.step_index, row)
            ctx.save(learner, state)
        else:
            ctx.report(learner.step_index, row, _note("train", row))
    with learner.whole() as actor:
        if ctx.world.is_main:
            checkpoint.save_final(ctx.run.final, actor.policy, collector.tokenizer, model_card(ctx))


def _models(ctx: Context, steps: int) -> tuple[Collector, Learner]:
    """Loads what the algorithm needs: policy, reference, reward model, critic."""
    recipe, needs = ctx.recipe, ctx.recipe.algo.needs
    precision, device = recipe.model.precision, ctx.world.device
    tokenizer = load_tokenizer(ctx.final("sft"))

    def policy():  # type: ignore[no-untyped-def]
        return load_policy(ctx.final("sft"), precision, tokenizer)

    def scorer():  # type: ignore[no-untyped-def]
        return load_reward_model(ctx.final("reward"), recipe.reward.model.precision, tokenizer)

    actor = Actor(policy(), scorer() if Model.CRITIC in needs else None)
    rates = {"critic": recipe.algo.critic_lr} if Model.CRITIC in needs else {}  # type: ignore[attr-defined]
    # The reference is loaded for every algorithm: the KL of the evaluation is measured against it.
    reward = Scorer(scorer()).to(device) if "reward" in ctx.parents else None
    collector = Collector(
        ctx.world, tokenizer, Judges(policy().to(device), reward), recipe.launch.micro_batch,
        recipe.data.max_prompt_tokens, recipe.data.max_response_tokens, recipe.seed,
        recipe.reward.unended,
    )  # fmt: skip
    learner = Learner(actor, recipe.algo.optim, steps, recipe.launch, ctx.world, precision, rates)
    return collector, learner


def _step(
    ctx: Context, learner: Learner, rollout: Rollout, targets: Targets, prompts: Tensor
) -> dict[str, float]:
    """One optimiser step on some prompts of the rollout, shared out over the processes."""
    algo = ctx.recipe.algo
    prompts = prompts.to(rollout.mask.device)
    counts = denominators(rollout.mask[prompts])
    mine = prompts[ctx.world.share(len(prompts))]
    batch, aims, group = rollout.take(mine), targets.take(mine), rollout.mask.shape[1]

    def judge(part: Rows) -> Judged:
        some = part.index[::group] // group
        view = batch.take(some).trim(part.length)
        logp, value = learner.engine(part.tokens, part.attention, part.length)
        now = Forward(
            logp.view_as(view.mask) * view.mask,
            None if value is None else value.view_as(view.mask) * view.mask,
        )
        aim = aims.take(some).trim(part.length)
        loss = algo.loss(now, view, aim)
        with torch.no_grad():
            watch = {**algo.watch(now, view, aim), "log_ratio": _log_ratio(now, view)}
        return Judged(loss, watch, view.mask)

    flat = (batch.tokens.flatten(0, 1), batch.attention.flatten(0, 1), batch.mask.flatten(0, 1))
    parts = list(in_parts(*flat, ctx.recipe.launch.micro_batch, group))
    metrics = learner.step(parts, judge, counts)
    check_finite(metrics, learner.step_index)
    return metrics


def _log_ratio(now: Forward, view: Rollout) -> Tensor:
    """[P,G] |log pi - log pi_old| of each response: how stale the rollout has become."""
    return sequence_sum(now.logp - view.logp_old, view.mask).abs()


def _row(
    ctx: Context, collector: Collector, rollout: Rollout, steps: list[dict[str, float]]
) -> dict[str, float]:
    """What a rollout and its optimiser steps looked like on average."""
    row = {f"train/{k}": sum(s[k] for s in steps) / len(steps) for k in steps[0]}
    assert rollout.logp_ref is not None
    row["train/kl"] = float(sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask).mean())
    if rollout.score is not None:
        row["train/reward"] = float(rollout.score.mean())
    row["train/length"] = float(rollout.mask.sum(-1).mean())
    row["train/eos_rate"] = float(collector.ended(rollout).mean())
    return row


def _evaluate(
    ctx: Context, evaluator: Evaluator, learner: Learner, step: int, row: Mapping[str, float]
) -> None:
    """Measures the policy as it stands and reports it with the step's row."""
    with learner.whole() as actor:
        metrics, samples = evaluator.measure(actor)  # type: ignore[arg-type]
    if step == 0:
        check_start(metrics)
    whole = {"episodes": 0, **row, **metrics}
    ctx.samples(step, samples)
    ctx.report(step, whole, _note("eval", whole))


def _note(kind: str, row: Mapping[str, float]) -> str:
    """KL and reward in a few words."""
    reward = f" reward {row[f'{kind}/reward']:+.2f}" if f"{kind}/reward" in row else ""
    return f"{kind} KL {row[f'{kind}/kl']:.2f}{reward}"
