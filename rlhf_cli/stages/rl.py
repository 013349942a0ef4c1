"""The one loop: draw, prepare, step, log.

for each rollout:  responses of the current policy, scored by every model the algorithm needs
                   targets from the whole rollout
                   epochs x minibatches optimiser steps on the algorithm's loss
                   now and then the measurement every frontier is made of
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.core.algorithm import Algorithm, Defaults, Model, Targets, Terms
from rlhf_cli.core.masked import denominators
from rlhf_cli.core.rollout import GIVEN, Forward, Rollout, sequence_sum
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.agreement import check_drawing
from rlhf_cli.engine.forward import Rows, in_parts, longest
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.order import shuffled
from rlhf_cli.engine.placement import placed
from rlhf_cli.engine.rollout import Collector
from rlhf_cli.evals.health import alarms
from rlhf_cli.models.heads import Actor, next_logits
from rlhf_cli.models.load import zero_head
from rlhf_cli.models.tuning import WithoutAdapters, tuned
from rlhf_cli.stages.card import model_card
from rlhf_cli.stages.context import Context
from rlhf_cli.stages.evaluate import Evaluator, check_start
from rlhf_cli.stages.feed import Feed
from rlhf_cli.stages.meter import Meter
from rlhf_cli.stages.replay import Replay


def main(ctx: Context) -> None:
    """Fine-tunes the SFT policy with `algo` and leaves it in `checkpoints/final`."""
    algo, update = ctx.recipe.algo, ctx.recipe.algo.update
    sampling, side = algo.sampling(), algo.side()
    prompts_each = update.batch // sampling.responses
    rollouts = max(1, update.episodes // update.batch)
    per_rollout = update.epochs * update.minibatches
    collector, learner = _models(ctx, rollouts * per_rollout)
    evaluator = Evaluator.of(ctx.recipe, ctx.corpus, collector)
    # Evaluations ask everybody; a training step only those whose word counts in it.
    unscored = replace(collector, judges=replace(collector.judges, reward=None, texts=None))
    if Model.REWARD not in algo.needs:
        collector = unscored
    beside = replace(unscored, learned_reward=False)
    # In half precision, rounding of a token by token and of a whole pass are too far apart.
    collector = replace(collector, reuse=ctx.recipe.model.precision == "fp32", old=not waits(algo))
    encoder = Encoder.of(collector.tokenizer, ctx.recipe.data)
    main_feed, side_feed = (
        Feed(ctx.corpus, encoder, stream, ctx.recipe.seed, relative)
        for stream, relative in ((sampling, ctx.recipe.reward.relative), (side, False))
    )
    replay = Replay(algo.replayed(), ctx.recipe.seed)
    meter = Meter(ctx.recipe, "reward" in ctx.parents)
    points = min(ctx.recipe.eval.points, rollouts)
    due = {round(rollouts * (i + 1) / points) for i in range(points)}

    found = ctx.resume(learner)
    _rehearse(ctx, learner)
    if found is None:
        _evaluate(ctx, evaluator, learner, 0, meter.row())
        with learner.whole() as actor:
            tried = replace(collector, old=True)
            check_drawing(tried, actor, main_feed.batch(prompts_each, 0))  # type: ignore[arg-type]
    state = meter.restore(replay.restore(found or {}, sampling.sources))

    def kept() -> dict[str, Tensor]:
        return {**state, **replay.state(), **meter.state()}

    ctx.progress.start(rollouts * per_rollout, learner.step_index)
    for index in range(learner.step_index // per_rollout, rollouts):
        ctx.between_steps(learner, kept)
        began = time.perf_counter()
        asked = main_feed.batch(prompts_each, index)
        extra: list[Stream] = []
        with learner.whole() as actor:
            drawn, told = collector.collect(actor, asked, sampling, "train", index)  # type: ignore[arg-type]
            if side.responses:
                rows = side_feed.batch(prompts_each, index)
                read, _ = beside.collect(actor, rows, side, "side", index)  # type: ignore[arg-type]
                extra = [Stream(read, Targets(), second=True)]
        ctx.between_steps(learner, kept)  # whoever goes on from here draws the same again
        rollout = replay.exchange(drawn, index)
        with torch.no_grad():
            targets, state = algo.prepare(rollout, state)
        ready = time.perf_counter()
        streams = [Stream(rollout, targets), *extra]
        only = "critic" if index < algo.critic_only() else None
        steps = [
            _step(ctx, learner, collector, streams, torch.from_numpy(part), only)
            for epoch in range(update.epochs)
            for part in shuffled(prompts_each, ctx.recipe.seed, index, epoch).reshape(
                update.minibatches, -1
            )
        ]
        learned = time.perf_counter()
        meter.add(drawn, extra[0].rollout if extra else None, learned - began)
        row = {**_row(collector, drawn, steps), **meter.row()}
        ctx.guard.kl(row["train/kl"], learner)
        row |= ctx.guard.row(learner)
        row |= {
            "episodes": (index + 1) * update.batch,
            "perf/step_seconds": learned - began,
            **told,
            "perf/learn_seconds": learned - ready,
        }
        tokens = float(drawn.mask.sum())
        row["perf/generated_tokens_per_second"] = tokens / row["perf/generate_seconds"]
        if index + 1 in due:
            _evaluate(ctx, evaluator, learner, learner.step_index, row)
            ctx.save(learner, kept())
        else:
            ctx.report(learner.step_index, row, _note("train", row))
    with learner.whole(to_save=True) as actor:
        if ctx.world.is_main:
            checkpoint.save_final(ctx.run.final, actor.policy, collector.tokenizer, model_card(ctx))


def waits(algo: Algorithm) -> bool:
    """Whether log pi_old can wait for the first pass of learning, which then need not be made twice.

    So it is where nothing looks at it before, and where no step moves the policy between the two.
    """
    update = algo.update
    prepares = type(algo).prepare is not Defaults.prepare
    once = update.epochs * update.minibatches == 1 and algo.replayed() == 1
    return once and not prepares and set(algo.sampling().sources) <= set(GIVEN)


@dataclass(frozen=True)
class Stream:
    """What one of an algorithm's two losses is computed on."""

    rollout: Rollout
    targets: Targets
    second: bool = False


def _models(ctx: Context, steps: int) -> tuple[Collector, Learner]:
    """Loads what the algorithm needs: policy, reference, reward model, critic, guide, Q network."""
    recipe, algo, chain = ctx.recipe, ctx.recipe.algo, ctx.chain

    def learning() -> PreTrainedModel:
        return tuned(chain.scorer(), recipe.reward.model.tuning, "reward.model", recipe.seed)

    has_q = Model.Q in algo.needs
    actor = Actor(
        tuned(chain.policy(), recipe.model.tuning, "model", recipe.seed),
        critic=learning() if Model.CRITIC in algo.needs else None,
        reward=learning() if algo.trains_reward else None,
        q=zero_head(chain.policy()) if has_q else None,
        temperature=recipe.rollout.temperature,
        entropy=algo.wants_entropy(),
    )
    learns = {"critic": actor.critic, "reward": actor.reward, "q": actor.q}
    rates = {name: getattr(algo, f"{name}_lr") for name, model in learns.items() if model}
    # Every algorithm has a reference: the KL of the evaluation is measured against it. Shards of
    # ZeRO 3 cannot serve as one.
    shared = recipe.model.tuning.lora is not None and recipe.launch.zero < 3
    launch, world = recipe.launch, ctx.world
    ref = WithoutAdapters(actor.policy) if shared else placed(chain.policy(), launch, world)
    guide = placed(chain.policy("guide"), launch, world) if Model.GUIDE in algo.needs else None
    collector = chain.collector(
        chain.judges(ref, guide),
        sampler=chain.sampler(),
        learned_reward=algo.trains_reward,
        soft_beta=algo.beta if has_q else None,  # type: ignore[attr-defined]
    )
    precision = recipe.model.precision
    learner = Learner(actor, algo.optim, steps, recipe.launch, ctx.world, precision, rates)
    return collector, learner


def _rehearse(ctx: Context, learner: Learner) -> None:
    """Makes sure that the largest micro-batch there may be fits into memory."""
    algo, data = ctx.recipe.algo, ctx.recipe.data
    group, share = algo.sampling().responses, algo.update.batch // algo.update.minibatches
    sizes = (data.max_prompt_tokens, data.max_response_tokens)
    mine, most = share // ctx.world.size, ctx.recipe.launch.micro_batch
    learner.rehearse(*longest(mine, most, *sizes, ctx.world.device, group).asked)


def _step(
    ctx: Context,
    learner: Learner,
    collector: Collector,
    streams: list[Stream],
    prompts: Tensor,
    only: str | None,
) -> dict[str, float]:
    """One optimiser step on some prompts of each stream, shared out over the processes."""
    algo = ctx.recipe.algo
    parts = [
        partial(_judge, ctx, learner, collector, only, *cut)
        for stream in streams
        for cut in _cuts(ctx, stream, prompts.to(stream.rollout.mask.device))
    ]
    metrics = learner.step(parts, lambda judge: judge(), only)
    if ctx.guard.after(metrics, learner) and Model.Q in algo.needs:
        learner.follow("q", "q_target", algo.tau)  # type: ignore[attr-defined]
    return metrics


def _cuts(
    ctx: Context, stream: Stream, prompts: Tensor
) -> list[tuple[Stream, Rows, Mapping[int, float]]]:
    """This process's share of some prompts in micro-batches, each with the minibatch's denominators."""
    mask = stream.rollout.mask
    counts = denominators(mask[prompts])
    mine = prompts[ctx.world.share(len(prompts))]
    batch, group = stream.rollout.take(mine), mask.shape[1]
    own = replace(stream, rollout=batch, targets=stream.targets.take(mine))
    flat = (batch.tokens.flatten(0, 1), batch.attention.flatten(0, 1), batch.mask.flatten(0, 1))
    parts = in_parts(*flat, ctx.recipe.launch.micro_batch, group)
    return [(own, part, counts) for part in parts]


def _judge(
    ctx: Context,
    learner: Learner,
    collector: Collector,
    only: str | None,
    stream: Stream,
    part: Rows,
    counts: Mapping[int, float],
) -> Judged:
    """What the algorithm says of one micro-batch under the current weights."""
    algo, group = ctx.recipe.algo, stream.rollout.mask.shape[1]
    some = part.index[::group] // group
    view = stream.rollout.take(some).trim(part.length)
    now = _now(learner, collector, part, view, ctx.recipe.rollout.temperature)
    if not collector.old:
        view = replace(view, logp_old=now.logp.detach())
    if stream.second:
        return Judged(_kept(algo.side_loss(now, view), only), {}, view.mask, counts)
    aim = stream.targets.take(some).trim(part.length)
    loss = _kept(algo.loss(now, view, aim), only)
    with torch.no_grad():
        watch = {**algo.watch(now, view, aim), "log_ratio": _log_ratio(now, view), "kl": _kl(view)}
    return Judged(loss, watch, view.mask, counts)


def _now(
    learner: Learner, collector: Collector, part: Rows, view: Rollout, temperature: float
) -> Forward:
    """The forward pass of a micro-batch, laid out as [P,G,...]."""
    said: dict[str, Tensor] = learner.engine(*part.asked)
    if "q" in said:
        ref = collector.judges.ref
        assert ref is not None
        with torch.no_grad():
            logits = next_logits(ref, *part.asked)
        said["logps_ref"] = (logits / temperature).float().log_softmax(-1)
    laid = {name: x.unflatten(0, view.mask.shape[:2]) for name, x in said.items()}
    masked = {name: x * view.mask if x.dim() == 3 else x for name, x in laid.items()}
    return Forward(**masked)


def _kept(terms: Terms, only: str | None) -> Terms:
    """All terms, or all but the critic's multiplied by 0: they keep their place in the graph."""
    if only is None:
        return terms
    return {name: term if name == "value" else term * 0.0 for name, term in terms.items()}


def _log_ratio(now: Forward, view: Rollout) -> Tensor:
    """[P,G] |log pi - log pi_old| of each response: how stale the rollout has become."""
    return sequence_sum(now.logp - view.logp_old, view.mask).abs()


def _kl(rollout: Rollout) -> Tensor:
    """[P,G] log pi_old - log pi_ref of each response."""
    assert rollout.logp_ref is not None
    return sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)


def _row(collector: Collector, rollout: Rollout, steps: list[dict[str, float]]) -> dict[str, float]:
    """What a rollout and its optimiser steps looked like on average; those left out do not count."""
    steps = [each for each in steps if math.isfinite(each["grad_norm"])] or steps
    row = {f"train/{k}": sum(s[k] for s in steps) / len(steps) for k in steps[0]}
    if collector.old:  # of what was drawn, whatever was learned from
        row["train/kl"] = float(_kl(rollout).mean())
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
    alarm = "; ".join(alarms(ctx.first(), whole))
    # Only the main process knows the first row; what is done about it all must do alike.
    if ctx.world.sum({"alarm": float(bool(alarm))})["alarm"]:
        ctx.guard.alarm(f"{alarm} (read samples/{step:06d}.jsonl)", learner)


def _note(kind: str, row: Mapping[str, float]) -> str:
    """KL and reward in a few words."""
    reward = f" reward {row[f'{kind}/reward']:+.2f}" if f"{kind}/reward" in row else ""
    return f"{kind} KL {row[f'{kind}/kl']:.2f}{reward}"
