"""What reward models are worth: accuracy over training, score gaps, calibration, and accuracy by length.

A reward model is compared with the rule that looks at nothing but length, pair by pair: with d = 1 where
the model alone ranks a pair as labelled, -1 where the rule alone does and 0 where they agree, a tie of
lengths being half right, the mean of d is the difference of their accuracies. Its variance over pairs is
that of McNemar's comparison, which what both know does not enter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval, of_mean
from rlhf_cli.evals.reward_report import Accuracy, Report
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.reward import GREY, TITLE, accuracies, calibration, gaps
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import BLUE, PANEL, RC
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run


@dataclass(frozen=True)
class Model:
    """A reward model."""

    name: str
    """Of its panel, and its key where the panel has several."""
    key: str
    worth: Report
    history: tuple[Mapping[str, float], ...]
    """Rows of its ledger with a measurement on held-out pairs."""


def draw(panels: Mapping[str, Sequence[Run]], spec: Spec) -> Result:
    """A row per reward model. Raises UserError for a run that is none, or has no report."""
    models = [
        _model(f"{panel}, {run.key}" if len(runs) > 1 else panel, run)
        for panel, runs in panels.items()
        for run in runs
    ]
    verdict, reason = judge(list(chain.from_iterable(map(_parts, models))))
    rows = list(chain.from_iterable(map(_rows, models)))
    return Result(_figure(spec.title, models), rows, verdict, reason)


def over_length(worth: Report) -> Interval:
    """Accuracy of the model minus that of the rule of length, on the same pairs."""
    longer = worth.length_rule.prefers == "longer"
    rule = {"chosen longer": float(longer), "chosen shorter": float(not longer), "same length": 0.5}
    return _mean_of(
        [
            (right - rule[name], count)
            for name, part in worth.by_length.items()
            for right, count in _counts(part)
        ]
    )


def over_chance(accuracy: Accuracy) -> Interval:
    """Accuracy minus one half."""
    return _mean_of([(right - 0.5, count) for right, count in _counts(accuracy)])


def _counts(accuracy: Accuracy) -> tuple[tuple[float, int], ...]:
    """How many pairs are ranked as labelled (1) and how many are not (0)."""
    right = round(accuracy.share * accuracy.pairs)
    return (1.0, right), (0.0, accuracy.pairs - right)


def _mean_of(counted: Sequence[tuple[float, int]]) -> Interval:
    """Mean of values that occur so often, with Student's interval over them."""
    return of_mean([value for value, count in counted for _ in range(count)], seeds=1)


def _model(name: str, run: Run) -> Model:
    try:
        told = json.loads(run.report_path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{run.path} has no report.json, which finished reward models have; name runs of stage=reward"
            " and train them again if they are older than reports."
        ) from None
    history = (row for row in read(run.metrics_path) if "eval/accuracy" in row)
    return Model(name, run.key, TypeAdapter(Report).validate_python(told), tuple(history))


def _parts(model: Model) -> Iterator[Part]:
    yield Part(f"{model.name}, accuracy minus chance", over_chance(model.worth.accuracy))
    rule = model.worth.length_rule.prefers
    yield Part(
        f"{model.name}, accuracy minus that of preferring the {rule} answer",
        over_length(model.worth),
    )


def _rows(model: Model) -> Iterator[dict[str, object]]:
    worth = model.worth
    for measured in model.history:
        low, high = measured["eval/accuracy_low"], measured["eval/accuracy_high"]
        yield _row(model, "steps", measured["step"], measured["eval/accuracy"], low, high)
    edges = worth.gaps.edges
    for low, high, pairs in zip(edges, edges[1:], worth.gaps.pairs, strict=False):
        yield _row(model, "gaps", (low + high) / 2, pairs, low, high)
    for each in worth.calibration.bins:
        seen = each.observed
        yield _row(model, "calibration", each.probability, seen.share, seen.low, seen.high)
    for name, part in {"all pairs": worth.accuracy, **worth.subsets, **worth.by_length}.items():
        yield _row(model, "accuracy", name, part.share, part.low, part.high)
    yield _row(model, "accuracy", "length alone", worth.length_rule.heldout, None, None)


def _row(
    model: Model, plot: str, x: float | str, y: float, low: float | None, high: float | None
) -> dict[str, object]:
    """low, high: of the interval, and for gaps of the bar."""
    return {
        "model": model.name, "key": model.key, "plot": plot, "x": x, "y": y, "low": low, "high": high
    }  # fmt: skip


def _figure(title: str, models: Sequence[Model]) -> Figure:
    with rc_context(RC):
        size = (3.4 * PANEL[0], PANEL[1] * len(models) + 0.3)
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
        for part, model in zip(rows, models, strict=True):
            part.suptitle(f"{model.name}: {model.worth.accuracy.pairs:,} held-out pairs")
            first, second, third, fourth = part.subplots(1, 4)
            _steps(first, model)
            gaps(second, model.worth.gaps)
            calibration(third, model.worth.calibration)
            accuracies(fourth, model.worth)
            rule = model.worth.length_rule
            fourth.set_title(f"dashed: the {rule.prefers} one, {rule.heldout:.2f}", **TITLE)
        figure.suptitle(title)
    return figure


def _steps(axes: Axes, model: Model) -> None:
    """Accuracy over training, with its interval of 95%."""
    steps = [row["step"] for row in model.history]
    low, high = ([row[f"eval/accuracy_{end}"] for row in model.history] for end in ("low", "high"))
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(steps, [row["eval/accuracy"] for row in model.history], color=BLUE, marker="o")
    axes.axhline(0.5, color=GREY, linewidth=0.8)
    axes.set_title("grey: chance · band: 95%", **TITLE)
    axes.set(xlabel="steps", ylabel="pairs ranked as labelled (share)", xlim=(0, None))
