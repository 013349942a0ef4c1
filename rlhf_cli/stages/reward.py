"""The Bradley-Terry reward model.

    L = - mean log sigma( r(x, y_w) - r(x, y_l) )

A scalar head on the trunk of the SFT policy (or of `reward.model` if that is another model), read at the
last token of the response. Afterwards, unless `reward.normalise` says otherwise, its scores are moved and
scaled so that responses of the SFT policy have mean 0 and standard deviation 1 (Ziegler et al. 2019): 0 is
the SFT level, and a beta means the same on every dataset.

What it is worth on the held-out pairs is told in `report.json` and drawn in `report.png` and
`report.pdf`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_cli.data.tokens import Encoded, Encoder
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.forward import Rows, per_row
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.order import shuffled
from rlhf_cli.engine.placement import placed, present
from rlhf_cli.engine.rollout import Judges
from rlhf_cli.evals.reward_report import Report, Scored, report
from rlhf_cli.evals.statistics import proportion_interval
from rlhf_cli.figures import reward as figure
from rlhf_cli.models.heads import Actor, Scorer
from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE, load_policy, new_reward_model
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.models.tuning import tuned
from rlhf_cli.stages.card import model_card
from rlhf_cli.stages.context import Context
from rlhf_cli.stages.supervised import Batch, after_prompts, fit, rehearsal, require, responses
from rlhf_cli.store.files import atomic_write

T = TypeVar("T")

SCORED_ALONE = 64
"""Answers that are scored a second time, each without others: enough to see whether batches matter."""


def main(ctx: Context) -> None:
    """Trains the reward model and leaves it, calibrated, in `checkpoints/final`."""
    recipe, data = ctx.recipe.reward, ctx.recipe.data
    tokenizer = load_tokenizer(ctx.final("sft"))
    pad = int(tokenizer.pad_token_id)
    precision = recipe.model.precision

    encoder = Encoder.of(tokenizer, data)
    rows, heldout = (
        ctx.encoded(encoder, [(pair.prompt, pair.chosen, pair.rejected) for pair in split.pairs])
        for split in (ctx.corpus.train, ctx.corpus.heldout)
    )
    require(rows, "preference pairs", recipe.batch, data.name)
    require(heldout, "held-out preference pairs", 1, data.name)
    steps = max(1, int(recipe.epochs * len(rows) / recipe.batch))
    sft = ctx.final("sft") if recipe.model.starts_like(ctx.recipe.model) else None
    model = new_reward_model(recipe.model, sft, tokenizer, recipe.seed, ctx.recipe.launch.attention)
    scorer = Scorer(tuned(model, recipe.model.tuning, "reward.model", recipe.seed))
    learner = Learner(scorer, recipe.optim, steps, ctx.recipe.launch, ctx.world, precision)

    def collate(index) -> Batch:  # type: ignore[no-untyped-def]
        return after_prompts([rows[i] for i in index], pad)

    def judge(part: Rows, counts: Mapping[int, float]) -> Judged:
        chosen, rejected = learner.engine(*part.asked).view(-1, 2).unbind(1)
        gap = chosen - rejected
        return Judged(
            {"policy": -logsigmoid(gap)}, {"accuracy": (gap > 0).float()}, part.mask, counts
        )

    def evaluate(last: bool) -> dict[str, float]:
        pairs = heldout if last else heldout[: ctx.recipe.eval.prompts]
        with learner.whole() as whole:
            scores = _scores(ctx, whole, pairs, pad)
        gap = scores[0::2] - scores[1::2]
        low, high = proportion_interval(int((gap > 0).sum()), len(gap))
        return {
            "eval/loss": float(-logsigmoid(gap).mean()),
            "eval/accuracy": float((gap > 0).float().mean()),
            "eval/accuracy_low": low,
            "eval/accuracy_high": high,
        }

    learner.rehearse(*rehearsal(ctx, 2 * recipe.batch, data.max_prompt_tokens, 2).asked)
    fit(
        ctx, learner, len(rows), recipe.batch, recipe.seed, collate, judge,
        lambda mask: {1: float(recipe.batch)}, evaluate, group=2,
    )  # fmt: skip
    with learner.whole() as whole:
        trained = cast(Scorer, whole)
        mean, scale = _calibration(ctx, trained, tokenizer)
        calibrated = {SCORE_OFFSET: mean, SCORE_SCALE: scale}
        trained.model.config.update(calibrated)
        worth = _report(ctx, trained, rows, heldout, pad, scale)
    with learner.whole(to_save=True) as whole:
        model = cast(Scorer, whole).model
        model.config.update(calibrated)
        if ctx.world.is_main:
            atomic_write(ctx.run.report_path, json.dumps(asdict(worth), indent=2) + "\n")
            checkpoint.save_final(ctx.run.final, model, tokenizer, model_card(ctx))
            figure.write(worth, ctx.run.path.name, ctx.run.report_path.with_suffix(""))


def _scores(ctx: Context, scorer: torch.nn.Module, rows: Sequence, pad: int) -> Tensor:
    """[N] scores of the responses of (prompt ids, response ids, ...) rows."""
    tokens, attention, mask = (t.to(ctx.world.device) for t in after_prompts(rows, pad))
    most, group = ctx.recipe.launch.micro_batch, len(rows[0]) - 1
    return per_row(lambda part: scorer(*part.asked), tokens, attention, mask, most, group)


def _report(
    ctx: Context, scorer: Scorer, train: Encoded, heldout: Encoded, pad: int, scale: float
) -> Report:
    """What the calibrated model is worth; scale: logits in a unit of its score."""
    some = [(prompt, side) for prompt, *both in heldout[: SCORED_ALONE // 2] for side in both]
    alone = [_scores(ctx, scorer, [row], pad) for row in some]
    held = Scored(
        scores=_scores(ctx, scorer, heldout, pad).view(-1, 2).double().cpu().numpy(),
        lengths=heldout.lengths[:, 1:],
        subsets=[pair.subset for pair in ctx.corpus.heldout.pairs],
        scale=scale,
        alone=torch.cat(alone).double().cpu().numpy(),
    )
    return report(held, train.lengths[:, 1:])


def _calibration(ctx: Context, scorer: Scorer, tokenizer) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """What raw scores lose and are then divided by, as `reward.normalise` has it."""
    recipe = ctx.recipe.reward
    if recipe.normalise == "none":
        return 0.0, 1.0
    if recipe.normalise == "references":
        demos = _some(ctx.corpus.train.demos, recipe.calibration, recipe.seed)
        encoder, pad = Encoder.of(tokenizer, ctx.recipe.data), int(tokenizer.pad_token_id)
        sides = [(encoder.prompt(demo.prompt), encoder.response(demo.response)) for demo in demos]
        return float(_scores(ctx, scorer, sides, pad).mean()), 1.0
    policy = load_policy(ctx.final("sft"), ctx.recipe.model.precision, tokenizer)
    policy = placed(policy, ctx.recipe.launch, ctx.world)
    chosen = _some(ctx.corpus.train.prompts, recipe.calibration, recipe.seed)
    with present([policy], ctx.world.device):
        judges, actor = Judges(None, scorer), Actor(policy)
        rollout = responses(ctx, actor, tokenizer, chosen, judges, recipe.seed, "calibration")
    assert rollout.score is not None
    return float(rollout.score.mean()), max(float(rollout.score.std()), 1e-6)


def _some(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """So many of them, at random."""
    return [rows[i] for i in shuffled(len(rows), seed)[:count]]
