"""What a reward model is worth, as a picture: calibration, gaps, accuracy by part, score by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_cli.evals.reward_report import Accuracy, Calibration, Histogram, Report, Tenth
from rlhf_cli.figures.style import BLUE, ORANGE, PANEL, RC, SKY, pictures
from rlhf_cli.store.files import atomic_write

GREY = "#888888"
TITLE: dict[str, Any] = {"fontsize": 7, "loc": "left"}
"""Of a panel."""


def write(report: Report, title: str, out: Path) -> dict[str, Path]:
    """Write `out`.png and `out`.pdf; the same report gives the same bytes. Raises UserError."""
    files = {}
    for kind, data in pictures(draw(report, title)).items():
        files[kind] = Path(f"{out}.{kind}")
        atomic_write(files[kind], data)
    return files


def draw(report: Report, title: str) -> Figure:
    """The figure itself."""
    with rc_context(RC):
        figure = Figure(figsize=(2 * PANEL[0], 2 * PANEL[1] + 0.4), layout="constrained")
        (first, second), (third, fourth) = figure.subplots(2, 2)
        accuracies(first, report)
        calibration(second, report.calibration)
        gaps(third, report.gaps)
        lengths(fourth, report.score_by_length)
        figure.suptitle(
            f"{title} · {report.accuracy.pairs:,} held-out pairs\n"
            "bars: 95% of shares, standard error of scores · unit of scores: their standard deviation"
            " under SFT",
            parse_math=False,
        )
    return figure


def accuracies(axes: Axes, report: Report) -> None:
    """Accuracy of everything, of each part, and of pairs by which answer is longer."""
    parts = {"all pairs": report.accuracy, **report.subsets, **report.by_length}
    places = range(len(parts))
    shares = [part.share for part in parts.values()]
    axes.errorbar(shares, places, xerr=_around(list(parts.values())), fmt="o", color=BLUE)
    rule = report.length_rule
    axes.axvline(0.5, color=GREY, linewidth=0.8)
    axes.axvline(rule.heldout, color=ORANGE, linestyle="--")
    axes.set_title(f"dashed: preferring the {rule.prefers} answer, {rule.heldout:.2f}", **TITLE)
    axes.set_yticks(places, [f"{name} ({part.pairs:,})" for name, part in parts.items()])
    axes.set(xlim=(0, 1), ylim=(len(parts) - 0.4, -0.6), xlabel="pairs ranked as labelled (share)")


def calibration(axes: Axes, curve: Calibration) -> None:
    """Shares against probabilities; on the diagonal the two are the same."""
    bins = curve.bins
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8)
    axes.errorbar(
        [each.probability for each in bins],
        [each.observed.share for each in bins],
        yerr=_around([each.observed for each in bins]),
        fmt="o",
        color=BLUE,
    )
    axes.set_title(f"expected calibration error {curve.error:.3f}", **TITLE)
    axes.set(
        xlim=(0.49, 1.01),
        ylim=(0, 1.02),
        xlabel="probability by the model, sigma(|gap|)",
        ylabel="pairs ranked as labelled (share)",
    )


def gaps(axes: Axes, histogram: Histogram) -> None:
    """How far apart the two answers of a pair are; left of 0 they are ranked the wrong way."""
    widths = [high - low for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)]
    axes.bar(histogram.edges[:-1], histogram.pairs, widths, align="edge", color=SKY)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="score of chosen - score of rejected", ylabel="pairs")


def lengths(axes: Axes, tenths: tuple[Tenth, ...]) -> None:
    """Mean score of answers of similar length; the bar across shows which lengths."""
    middle = [(each.shortest + each.longest) / 2 for each in tenths]
    axes.errorbar(
        middle,
        [each.score for each in tenths],
        xerr=[(each.longest - each.shortest) / 2 for each in tenths],
        yerr=[each.score_se or 0.0 for each in tenths],
        fmt="o",
        color=BLUE,
    )
    axes.set(xlabel="tokens of the answer", ylabel="mean score")


def _around(parts: list[Accuracy]) -> list[list[float]]:
    """How far each interval reaches below and above its share."""
    # An interval's end may lie beyond a share of 0 or 1 by rounding.
    return [
        [max(0.0, part.share - part.low) for part in parts],
        [max(0.0, part.high - part.share) for part in parts],
    ]
