"""What is said of a reward model: numbers worked out by hand, and checks that catch a broken one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_cli.config import compose, recipe
from rlhf_cli.data.tokens import Encoder, encoded
from rlhf_cli.errors import UserError
from rlhf_cli.evals.reward_report import Scored, report
from rlhf_cli.evals.statistics import proportion_interval
from rlhf_cli.figures import reward as figure
from rlhf_cli.models.checks import PADDING, check_scores
from rlhf_cli.models.heads import Scorer
from rlhf_cli.models.load import SCORE_SCALE, load_reward_model, new_reward_model
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.recipes import Model, Scratch, Tuning

# Gaps 2, -1, 1, 0, 3.
SCORES = np.array([[2.0, 0.0], [0.0, 1.0], [1.5, 0.5], [0.25, 0.25], [2.0, -1.0]])
LENGTHS = np.array([[5, 3], [2, 4], [3, 6], [4, 4], [9, 2]])
FIVE = Scored(SCORES, LENGTHS, ["a", "b", "a", "b", "a"], 1.0, SCORES.ravel()[:3])


def gaps(*each: float, scale: float = 1.0) -> Scored:
    """Pairs with these gaps, all answers of one length."""
    scores = np.array([[gap, 0.0] for gap in each])
    lengths = np.ones((len(each), 2), dtype=np.int64)
    return Scored(scores, lengths, [""] * len(each), scale, scores.ravel()[:0])


def test_accuracy_is_counted_in_all_by_part_and_by_which_answer_is_longer():
    told = report(FIVE, LENGTHS)
    assert (told.accuracy.share, told.accuracy.pairs) == (0.6, 5)  # a tie is not ranked right
    assert (told.accuracy.low, told.accuracy.high) == proportion_interval(3, 5)
    assert {name: (part.share, part.pairs) for name, part in told.subsets.items()} == {
        "a": (1.0, 3),
        "b": (0.0, 2),
    }
    assert {name: (part.share, part.pairs) for name, part in told.by_length.items()} == {
        "chosen longer": (1.0, 2),
        "chosen shorter": (0.5, 2),
        "same length": (0.0, 1),
    }


def test_data_without_parts_and_lengths_that_never_differ_are_not_reported_on():
    told = report(gaps(1.0, -1.0), LENGTHS)
    assert told.subsets == {}
    assert list(told.by_length) == ["same length"]


@pytest.mark.parametrize(
    ("train", "prefers", "of_train", "of_heldout"),
    [
        ([[1, 2], [1, 2], [1, 2], [2, 1]], "shorter", 0.75, 0.5),
        ([[2, 1], [2, 1], [3, 3]], "longer", 2.5 / 3, 0.5),
        ([[4, 4]], "longer", 0.5, 0.5),
    ],
)
def test_the_rule_of_length_is_chosen_on_training_pairs(train, prefers, of_train, of_heldout):
    """Of the five held-out pairs the longer answer is chosen in two, the shorter in two, one is a tie."""
    rule = report(FIVE, np.array(train)).length_rule
    assert rule.prefers == prefers
    assert (rule.train, rule.heldout) == pytest.approx((of_train, of_heldout))


def test_the_rule_of_length_may_be_worse_than_chance_on_held_out_pairs():
    held = replace(FIVE, lengths=np.array([[5, 3], [6, 4], [7, 6], [4, 4], [1, 2]]))
    rule = report(held, np.array([[1, 9]])).length_rule
    assert (rule.prefers, rule.train, rule.heldout) == ("shorter", 1.0, pytest.approx(1.5 / 5))


def test_three_of_four_right_at_a_probability_of_three_quarters_is_calibrated():
    logit = math.log(3)
    told = report(gaps(logit, logit, logit, -logit), LENGTHS).calibration
    assert told.error == pytest.approx(0, abs=1e-12)
    (only,) = told.bins
    assert only.probability == pytest.approx(0.75)
    assert (only.observed.share, only.observed.pairs) == (0.75, 4)
    assert only.low - 1e-12 <= 0.75 <= only.high + 1e-12


def test_the_calibration_error_weighs_bins_by_their_pairs():
    sure, unsure = math.log(9), math.log(3)  # probabilities 0.9 and 0.75
    told = report(gaps(sure, -sure, unsure, unsure, unsure, unsure), LENGTHS).calibration
    assert [one.observed.share for one in told.bins] == [1.0, 0.5]
    assert told.error == pytest.approx((4 * 0.25 + 2 * 0.4) / 6)


def test_probabilities_are_those_of_gaps_in_logits_not_in_calibrated_units():
    told = report(gaps(1.0, 1.0, 1.0, -1.0, scale=math.log(3)), LENGTHS).calibration
    assert told.error == pytest.approx(0, abs=1e-12)


def test_labels_drawn_from_the_models_own_probabilities_show_next_to_no_error():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 20_000)
    labelled = np.where(rng.random(20_000) < 1 / (1 + np.exp(-logits)), logits, -logits)
    right = report(gaps(*labelled), LENGTHS).calibration
    assert len(right.bins) == 10
    assert right.error < 0.01  # ten bins of 2,000 pairs have a standard error of about 0.01 each
    assert report(gaps(*labelled, scale=3.0), LENGTHS).calibration.error > 0.1


def test_the_histogram_has_every_pair_once():
    told = report(FIVE, LENGTHS).gaps
    assert sum(told.pairs) == 5
    assert (told.edges[0], told.edges[-1]) == (-1.0, 3.0)
    assert len(told.edges) == len(told.pairs) + 1


def test_tenths_of_a_hundred_answers_have_ten_each():
    lengths = np.arange(1, 101).reshape(50, 2)
    scores = lengths / 10.0
    told = report(Scored(scores, lengths, [""] * 50, 1.0, scores.ravel()[:0]), lengths)
    found = told.score_by_length
    assert [(t.shortest, t.longest) for t in found] == [
        (10 * i + 1, 10 * i + 10) for i in range(10)
    ]
    assert [t.answers for t in found] == [10] * 10
    assert [t.score for t in found] == pytest.approx([i + 0.55 for i in range(10)])
    # sd of 0.1 ... 1.0 is sqrt(110/12) / 10 with n - 1
    assert found[0].score_se == pytest.approx(math.sqrt(110 / 12) / 10 / math.sqrt(10))


def test_answers_of_equal_length_stay_together():
    (only,) = report(gaps(1.0, 2.0, 3.0), LENGTHS).score_by_length
    assert (only.shortest, only.longest, only.answers, only.score) == (1, 1, 6, 1.0)


def test_agreement_is_the_largest_difference_between_the_two_scores_of_an_answer():
    told = report(replace(FIVE, alone=np.array([2.0, 0.5, -0.25])), LENGTHS).agreement
    assert (told.answers, told.largest) == (3, 0.5)


def test_a_report_is_json_without_nan_even_where_a_length_occurs_once():
    told = asdict(report(FIVE, LENGTHS))
    assert None in [each["score_se"] for each in told["score_by_length"]]
    assert json.loads(json.dumps(told, allow_nan=False))["accuracy"]["share"] == 0.6


def test_the_picture_has_a_line_per_part_and_is_the_same_bytes_twice(tmp_path: Path):
    told = report(FIVE, LENGTHS)
    drawn = figure.draw(told, "hh_embedded-nano-s1-0000000000")
    ticks = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert ticks == [
        "all pairs (5)", "a (3)", "b (2)",
        "chosen longer (2)", "chosen shorter (2)", "same length (1)",
    ]  # fmt: skip
    assert "hh_embedded-nano-s1-0000000000 · 5 held-out pairs" in drawn.get_suptitle()
    first, again = (figure.write(told, "$t", tmp_path / name) for name in ("first", "again"))
    assert list(first) == ["png", "pdf"]
    for kind in first:
        assert first[kind].stat().st_size > 5000
        assert first[kind].read_bytes() == again[kind].read_bytes()


# --- where a pair is from, and how long its answers are


def test_a_pair_of_hh_knows_its_subset_and_the_digest_does_not(tmp_path: Path):
    both = ("helpful-base", "harmless-base")
    for place, subset in enumerate(both):
        (tmp_path / subset).mkdir()
        for split, questions in {
            "train": (f"a{place}", f"b{place}"),
            "test": (f"c{place}",),
        }.items():
            sides = [
                {
                    side: f"\n\nHuman: {asked}\n\nAssistant: {side}"
                    for side in ("chosen", "rejected")
                }
                for asked in questions
            ]
            lines = "".join(json.dumps(row) + "\n" for row in sides)
            (tmp_path / subset / f"{split}.jsonl").write_text(lines)
    words = [
        "data=hh",
        "data.source=path",
        f"data.path={tmp_path}",
        f"data.subsets=[{','.join(both)}]",
    ]
    corpus = recipe(compose(words)).data.load()
    assert [pair.subset for pair in corpus.train.pairs] == ["helpful-base"] * 2 + [
        "harmless-base"
    ] * 2
    assert [pair.subset for pair in corpus.heldout.pairs] == list(both)
    bare = replace(
        corpus.train, pairs=tuple(replace(pair, subset="") for pair in corpus.train.pairs)
    )
    assert bare == corpus.train
    assert replace(corpus, train=bare).digest == corpus.digest


def test_encoded_rows_know_the_length_of_every_list(tmp_path: Path, tokenizer):
    encoder = Encoder(tokenizer, 50, 50, lambda _: None)
    texts = [
        ("the cat", " sat", " lay by the door"),
        ("a", " mat", ""),
        ("the dog and", " on", " on"),
    ]
    rows = encoded(encoder, texts, tmp_path, lambda done, total: None)
    assert rows.lengths.tolist() == [[len(ids) for ids in row] for row in rows]


# --- checks at load

TEXTS = [
    "the cat sat on the mat and the dog lay by the door. " * 4,
    "the dog lay. ",
    "and the mat",
] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog lay by the door"], 300, 256)


def reward_model(tokenizer, precision: str = "fp32"):
    scratch = Scratch(layers=2, width=64, heads=2, vocab=300, context=256, seed=3)
    tuning = Tuning(None, None)
    return new_reward_model(
        Model("tiny", "nano", scratch, None, None, precision, tuning), None, tokenizer, 1
    )  # fmt: skip


class ReadsPadding(Scorer):
    def forward(self, tokens: Tensor, attention: Tensor, *more: Any) -> Tensor:
        return super().forward(tokens, torch.ones_like(attention), *more)


class CountsPadding(Scorer):
    """Right padding is never seen, but left padding moves all positions: an embedding's, not a rotation's."""

    def states(self, tokens: Tensor, attention: Tensor, *more: Any) -> Tensor:
        first = attention.long().argmax(-1)
        return super().states(tokens, attention, *more) + first.view(-1, 1, 1)


class ReadsTheLastColumn(Scorer):
    def forward(self, tokens: Tensor, attention: Tensor, *more: Any) -> Tensor:
        wider = [torch.nn.functional.pad(x, (0, 1)) for x in (tokens, attention)]
        last = self.states(*wider, tokens.shape[1])[:, -1]
        return self.calibrated(self.model.score(last).squeeze(-1))


class SeesItsNeighbours(Scorer):
    def forward(self, tokens: Tensor, attention: Tensor, *more: Any) -> Tensor:
        scores = super().forward(tokens, attention, *more)
        return scores - scores.mean()


class IsNoNumber(Scorer):
    def forward(self, tokens: Tensor, attention: Tensor, length: int | None = None) -> Tensor:
        return super().forward(tokens, attention, length) * math.nan


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_reward_model_passes(tokenizer, precision):
    check_scores(Scorer(reward_model(tokenizer, precision)), tokenizer, TEXTS)
    check_scores(Scorer(reward_model(tokenizer, precision)), tokenizer, TEXTS[:1])


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (CountsPadding, "padding on its left"),
        (ReadsTheLastColumn, "padding on its right"),
        (ReadsPadding, "padding on its left"),
        (SeesItsNeighbours, "other texts in its batch"),
        (IsNoNumber, r"changes by nan with other texts"),
    ],
)
def test_a_score_that_is_not_its_texts_own_is_refused_with_the_difference(tokenizer, kind, what):
    with pytest.raises(UserError, match=what) as refused:
        check_scores(kind(reward_model(tokenizer)), tokenizer, TEXTS)
    assert "rounding explains at most 0.001" in str(refused.value)


def test_the_difference_told_is_the_one_measured_in_calibrated_units(tokenizer):
    """A column of padding adds 1 to each part of the state: to the score, the sum of the head's weights."""
    model = reward_model(tokenizer)
    model.config.update({SCORE_SCALE: 0.5})
    moved = PADDING * abs(model.score.weight.detach().sum().item()) / 0.5
    with pytest.raises(UserError, match="changes by") as refused:
        check_scores(CountsPadding(model), tokenizer, TEXTS[:1])
    told = float(str(refused.value).partition("changes by ")[2].split()[0])
    assert told == pytest.approx(moved, rel=0.05)  # two digits


def test_a_reward_model_that_starts_from_another_one_is_calibrated_anew(tokenizer, tmp_path: Path):
    old = reward_model(tokenizer)
    old.config.update({SCORE_SCALE: 7.0})
    old.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert getattr(load_reward_model(tmp_path, "fp32", tokenizer).config, SCORE_SCALE) == 7.0
    shape = Model("old", "nano", None, str(tmp_path), None, "fp32", Tuning(None, None))
    new = new_reward_model(shape, None, tokenizer, 1)
    assert getattr(new.config, SCORE_SCALE) == 1.0
