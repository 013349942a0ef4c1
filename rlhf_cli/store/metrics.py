"""The ledger of a run, `metrics.jsonl`, and the one vocabulary its names come from.

Every figure and table is made from these files; a tracking service only mirrors them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import UserError
from rlhf_cli.store.files import atomic_write, disk


@dataclass(frozen=True)
class Metric:
    """What a name in the ledger stands for."""

    unit: str
    meaning: str


VOCABULARY: dict[str, Metric] = {
    "step": Metric("count", "optimiser steps taken"),
    "episodes": Metric("count", "responses drawn for learning (rl) or rows learned from"),
    "wall": Metric("seconds", "time spent in the run so far, over all segments"),
    "segment": Metric("count", "which start of the run wrote the row; 2 is after the first resume"),
    "eval/kl": Metric("nats", "KL to the SFT policy, summed over a response: mean of k1"),
    "eval/kl_se": Metric("nats", "standard error of eval/kl over prompts"),
    "eval/kl_k3": Metric("nats", "the same KL by the estimator k3, never negative"),
    "eval/kl_exact": Metric(
        "nats", "the same KL, summed over the vocabulary at each visited state"
    ),
    "eval/reward": Metric("reward", "score of the reward that `reward` names, learned or not"),
    "eval/reward_se": Metric("reward", "standard error of eval/reward over prompts"),
    "eval/gold": Metric("gold", "score of the corpus's own gold reward"),
    "eval/gold_se": Metric("gold", "standard error of eval/gold over prompts"),
    "eval/length": Metric("tokens", "length of a response, end token included"),
    "eval/eos_rate": Metric("share", "responses that ended by themselves"),
    "eval/perplexity_ref": Metric(
        "1", "perplexity of the responses under the SFT policy, per token"
    ),
    "eval/entropy": Metric("nats", "of the policy, per token: surprise at its own responses"),
    "eval/repetition": Metric("share", "4-grams of a response that it had before"),
    "eval/distinct_2": Metric("share", "distinct bigrams among those of all responses"),
    "eval/rouge_l": Metric(
        "F1", "ROUGE-L against the data's own answers, where these are references"
    ),
    "eval/unscored": Metric("count", "answers without a score, where there are any"),
    "eval/prompts": Metric("count", "held-out prompts answered"),
    "eval/loss": Metric("nats", "held-out loss: per token (sft) or per pair (reward)"),
    "eval/accuracy": Metric("share", "held-out pairs ranked as labelled"),
    "eval/accuracy_low": Metric("share", "lower end of the 95% interval of eval/accuracy"),
    "eval/accuracy_high": Metric("share", "upper end of the 95% interval of eval/accuracy"),
    "train/loss": Metric("loss", "what was minimised, averaged over the updates of the step"),
    "train/policy": Metric("loss", "the policy's part of train/loss"),
    "train/value": Metric("loss", "the critic's part of train/loss"),
    "train/entropy_loss": Metric("loss", "the entropy's part of train/loss"),
    "train/demo": Metric("loss", "the demonstrations' part of train/loss"),
    "train/preference": Metric("loss", "the preference pairs' part of train/loss"),
    "train/demo_accuracy": Metric("share", "samples scored below the prompt's demonstration"),
    "train/demo_gap": Metric("reward", "score of a demonstration over that of a sample"),
    "train/penalty": Metric("loss", "the KL penalty's part of train/loss"),
    "train/kl": Metric(
        "nats", "sequence KL of the sampling policy to the SFT policy on the rollout"
    ),
    "train/reward": Metric("reward", "score of the rollout's responses"),
    "train/length": Metric("tokens", "length of the rollout's responses"),
    "train/eos_rate": Metric("share", "responses of the rollout that ended by themselves"),
    "train/clip_fraction": Metric("share", "policy terms whose gradient the clipping cut"),
    "train/value_clip_fraction": Metric("share", "critic terms beyond their clip range"),
    "train/value_error": Metric("reward^2", "squared error of the critic"),
    "train/guide_reward": Metric("reward", "what the guide policy pays for a token"),
    "train/selected": Metric("share", "responses of the rollout that are learned from"),
    "train/accuracy": Metric("share", "pairs ranked as labelled"),
    "train/margin": Metric("nats", "gap between the log-ratios of the responses of a pair"),
    "train/implicit_chosen": Metric("reward", "beta log(pi / pi_ref) of preferred responses"),
    "train/implicit_rejected": Metric("reward", "the same of the responses they are preferred to"),
    "train/regularised_variance": Metric(
        "reward^2", "r - beta h over the responses to a prompt: 0 where the policy is optimal"
    ),
    "train/baseline": Metric("nats", "log-ratio above which a response counts as a gain"),
    "train/nll": Metric("nats", "surprise at the preferred response, per token"),
    "train/win_rate": Metric("share", "chance that the policy's response beats its opponent's"),
    "train/bonus": Metric("loss", "the exploration bonus's part of train/loss"),
    "train/unheld": Metric("share", "pairs whose preference cannot hold the exploration bonus"),
    "train/log_ratio": Metric("nats", "|log pi - log pi_old| of a response: how stale it is"),
    "train/grad_norm": Metric("norm", "L2 norm of the whole gradient before clipping"),
    "train/lr": Metric("rate", "learning rate of the step's last update"),
    "sampler/gap": Metric(
        "nats", "|log pi of the sampler - the trainer's| of a token, where another program draws"
    ),
    "guard/skipped": Metric("count", "updates left out so far, their gradient being no number"),
    "guard/rate": Metric("share", "of the learning rates' schedule, after backing off"),
    "budget/prompts": Metric("count", "prompts asked for learning so far"),
    "budget/responses": Metric("count", "responses drawn for learning so far"),
    "budget/given": Metric("count", "responses read from the dataset so far"),
    "budget/tokens": Metric("tokens", "drawn for learning so far"),
    "budget/scored": Metric("count", "responses scored for learning so far"),
    "budget/flops": Metric("FLOP", "needed for drawing, scoring and learning so far; estimate"),
    "budget/seconds": Metric("seconds", "drawing, scoring and learning so far, no evaluations"),
    "perf/step_seconds": Metric("seconds", "one step, evaluation not counted"),
    "perf/generate_seconds": Metric("seconds", "drawing the responses"),
    "perf/score_seconds": Metric("seconds", "forward passes of the frozen models"),
    "perf/learn_seconds": Metric("seconds", "the updates"),
    "perf/generated_tokens_per_second": Metric("tokens/s", "drawn over all processes"),
    "perf/tokens_per_second": Metric("tokens/s", "learned from over all processes"),
}
"""Every name the project itself writes."""

_WATCHED = re.compile(r"train/[a-z][a-z0-9_]*")


def describe(name: str) -> Metric:
    """Look a name up.

    The words under `train/` belong to the algorithms: one from outside may watch a quantity that
    is not listed here. Any other unlisted name is a defect. Raises ValueError.
    """
    if name not in VOCABULARY and not _WATCHED.fullmatch(name):
        raise ValueError(f"{name!r} is not in the vocabulary of metrics (store/metrics.py)")
    return VOCABULARY.get(name, Metric("", "watched by the algorithm"))


@dataclass(frozen=True)
class Ledger:
    """Appends rows to a `metrics.jsonl`.

    Call `rewind` once before the first row of a segment: it also clears what a crash tore.
    """

    path: Path

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row, on disk when this returns.

        nan and inf are written as null, since JSON has no word for them, and read back as nan.
        Raises ValueError for a name outside the vocabulary or a row without `step`.
        """
        for name in row:
            describe(name)
        if "step" not in row:
            raise ValueError(f"a row of metrics needs a step, got {sorted(row)}")
        line = json.dumps({name: _number(value) for name, value in row.items()})
        with disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())  # before a checkpoint, from which nobody would write it again

    def rewind(self, step: int) -> None:
        """Drop, all at once, the rows of later steps and a torn last line; -1 drops all rows."""
        if self.path.exists():
            kept = (row for row in read(self.path) if row["step"] <= step)
            lines = (json.dumps({n: _number(v) for n, v in row.items()}) + "\n" for row in kept)
            atomic_write(self.path, "".join(lines))

    def check_reaches(self, step: int) -> None:
        """UserError unless the last row is that of the step from which the run goes on."""
        rows = read(self.path)
        last = int(rows[-1]["step"]) if rows else 0
        if last != step:
            raise UserError(
                f"{self.path} ends at step {last}, but the run would go on from step {step} and leave a gap;"
                f" copy the file back, or delete {self.path.parent} and run the same command again."
            )


def read(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ledger; [] if there is none.

    A torn last line is what a crash leaves behind and is passed over; one further up is damage.
    Raises UserError, naming file and line.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if (row := _row(line)) is None:
            raise UserError(
                f"{path}:{number} is not a row of metrics; remove the line, or delete the run's"
                " folder and run the same command again."
            )
        rows.append(row)
    # Whole but for its end: a row that a hand has added.
    return [*rows, row] if (row := _row(torn)) else rows


def _row(line: bytes) -> dict[str, float] | None:
    """The numbers of a line, None if it is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or "step" not in row:
        return None
    if any(isinstance(value, bool | str | list | dict) for value in row.values()):
        return None
    return {name: math.nan if value is None else value for name, value in row.items()}


def _number(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
