"""The guessing game: a human who cannot be outguessed, fair pay, and rows on every turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer

from rlhf_cli.data.corpus import Corpus, Reply
from rlhf_cli.data.guess import MUMBLES, Guess
from rlhf_cli.data.guess_game import (
    GARBLED,
    TURNS,
    Guessing,
    gold,
    guess_of,
    prospect,
    read_prompt,
    value,
)
from tests.data_samples import HH_ROWS

CONF = Path(__file__).parent.parent / "conf" / "data"
HUMAN = Guessing()
OPENING = (
    "\n\nHuman: Hi. I am Ivo. I think of a number from 1 to 12. Which one is it?\n\nAssistant:"
)
"""Its number is 10."""
LOWER = "\n\nHuman: Lower. It is from {} to {}.\n\nAssistant:"
HIGHER = "\n\nHuman: Higher. It is from {} to {}.\n\nAssistant:"
MUMBLED = [" " + words.format(one=3, other=4) for words in MUMBLES]


def shipped() -> Guess:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "guess.yaml"))
    return Guess(**{key: value for key, value in values.items() if key != "_target_"})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return shipped().load()


def halve(opening: str) -> tuple[float, int]:
    """Return and number of turns of who always halves what the human says is left."""
    turns: list[str] = []
    low, high, total = 1, read_prompt(opening).top, 0.0
    while True:
        turns.append(f" Is it {(low + high) // 2}?")
        reply = HUMAN.reply(opening, turns)
        total += reply.reward
        if reply.done:
            return total, len(turns)
        low, high = (int(word.strip(".")) for word in reply.text.split()[5:8:2])


# --- the human


def test_a_dialogue_by_hand() -> None:
    said = [" Is it 11?", " I guess 4.", " I say 4.", " Is it 10?"]
    replies = [HUMAN.reply(OPENING, said[: n + 1]) for n in range(4)]
    assert replies == [
        Reply(LOWER.format(1, 10), -0.1, False),
        Reply(HIGHER.format(5, 10), -0.1, False),
        Reply(HIGHER.format(5, 10), -0.1, False),
        Reply("", 0.9, True),
    ]


def test_four_wrong_guesses_end_the_game_without_a_word() -> None:
    assert HUMAN.reply(OPENING, [" Is it 1?"] * 3) == Reply(HIGHER.format(2, 12), -0.1, False)
    assert HUMAN.reply(OPENING, [" Is it 1?"] * 4) == Reply("", -0.1, True)
    assert HUMAN.max_turns == TURNS == 4


@pytest.mark.parametrize(
    "turn",
    [
        *MUMBLED,
        "",
        " Is it 6",
        " Is it six?",
        " Is it -6?",
        " Is it 6? Is it 7?",
        " Is it 10?\n\nHuman: Right.",
        " 10",
        " Is it 1000000000?",
    ],
)
def test_what_is_no_guess_costs_half_a_point_and_ends_the_game(turn: str) -> None:
    assert HUMAN.reply(OPENING, [" Is it 6?", turn]) == Reply("", -0.5, True)
    assert value(OPENING, turn) == -GARBLED == -0.5


def test_a_guess_beside_the_range_is_a_wrong_guess_that_tells_nothing() -> None:
    assert HUMAN.reply(OPENING, [" Is it 99?"]) == Reply(LOWER.format(1, 12), -0.1, False)
    assert HUMAN.reply(OPENING, [" Is it 0?"]) == Reply(HIGHER.format(1, 12), -0.1, False)


def test_a_prompt_in_the_middle_of_a_dialogue_is_answered_like_the_dialogue(corpus: Corpus) -> None:
    said = [" Is it 11?", " Is it 3?", " Is it 7?"]
    prompt = OPENING
    for n, turn in enumerate(said):
        assert HUMAN.reply(prompt, said[n:]) == HUMAN.reply(OPENING, said)
        prompt += turn + HUMAN.reply(OPENING, said[: n + 1]).text
    game = read_prompt(prompt)
    assert (game.secret, game.low, game.high, game.spent) == (10, 8, 10, 3)


def test_after_its_end_and_before_its_beginning_there_is_no_reply() -> None:
    for turns in ([" Is it 10?", " Is it 10?"], ["", " Is it 10?"], [" Is it 1?"] * 5, []):
        with pytest.raises(ValueError, match=r"over|nothing to reply"):
            HUMAN.reply(OPENING, turns)
    for prompt in ("", "\n\nHuman: Who won?\n\nAssistant:", OPENING + " Is it 6?"):
        with pytest.raises(ValueError, match="not a prompt of the guessing game"):
            HUMAN.reply(prompt, [" Is it 6?"])
    over = OPENING + " Is it 10?" + LOWER.format(1, 9)
    with pytest.raises(ValueError, match="over before the end"):
        read_prompt(over)


def test_halving_finds_every_number_in_time_and_is_paid_what_the_best_play_is(
    corpus: Corpus,
) -> None:
    played = [(read_prompt(p).top, *halve(p)) for p in corpus.train.prompts]
    assert max(turns for _, _, turns in played) == 4
    gaps = [paid - prospect(top, TURNS) for top, paid, _ in played]
    # Numbers by hash: 8000 returns of standard deviation 0.1, three standard errors are 0.0034.
    assert statistics.mean(gaps) == pytest.approx(0, abs=0.0034)
    assert statistics.pstdev(gaps) > 0.05


def test_every_number_of_the_range_occurs_about_equally_often(corpus: Corpus) -> None:
    games = [read_prompt(p) for p in corpus.train.prompts]
    assert {game.top for game in games} == set(range(5, 16))
    for top in (5, 10, 15):
        found = [game.secret for game in games if game.top == top]
        counts = [found.count(number) for number in range(1, top + 1)]
        expected = len(found) / top
        # The 99.9 percentiles of chi-squared with 4, 9 and 14 degrees of freedom.
        limit = {5: 18.5, 10: 27.9, 15: 36.1}[top]
        assert sum((n - expected) ** 2 / expected for n in counts) < limit


# --- what a turn is worth


@pytest.mark.parametrize(
    ("numbers", "turns", "worth"),
    [
        (1, 1, 0.9),
        (1, 4, 0.9),
        (2, 1, 1 / 2 - 0.1),
        (2, 2, 1 - 0.1 * 3 / 2),
        (3, 1, 1 / 3 - 0.1),
        (3, 2, 1 - 0.1 * 5 / 3),
        (15, 4, 1 - 0.1 * 49 / 15),  # 1 + 2 2 + 4 3 + 8 4 = 49 guesses over 15 numbers
        (9, 2, 3 / 9 - 0.1 * 17 / 9),  # three numbers can be found: one at once, and two later
        (5, 0, 0.0),
    ],
)
def test_the_best_play_is_paid(numbers: int, turns: int, worth: float) -> None:
    assert prospect(numbers, turns) == pytest.approx(worth, abs=1e-12)


@pytest.mark.parametrize(
    ("turn", "worth"),
    [
        # 1 to 12: five below and six above 6, found in (1, 2, 2, 3, 3) and (1, 2, 2, 3, 3, 3) more.
        (" Is it 6?", 1 - 0.1 * (12 + 11 + 14) / 12),
        (" I say 7.", 1 - 0.1 * (12 + 11 + 14) / 12),
        # 7 of the 11 above 1 can be found in 3: 1 + 2 2 + 4 3 guesses, and 3 for each of the rest.
        (" I guess 1.", 8 / 12 - 0.1 * (12 + 17 + 4 * 3) / 12),
        # Nothing learned: 7 of 12 in 3.
        (" Is it 13?", -0.1 + 7 / 12 - 0.1 * (17 + 5 * 3) / 12),
        (" Is it 0?", -0.1 + 7 / 12 - 0.1 * (17 + 5 * 3) / 12),
        (" Well.", -0.5),
    ],
)
def test_a_first_turn_is_worth(turn: str, worth: float) -> None:
    assert value(OPENING, turn) == pytest.approx(worth, abs=1e-12)
    assert gold([OPENING], [turn]) == [value(OPENING, turn)]


def test_the_worth_of_a_turn_does_not_betray_the_number() -> None:
    other = OPENING.replace("Ivo", "Ann")
    assert read_prompt(OPENING).secret != read_prompt(other).secret
    assert [value(OPENING, f" Is it {n}?") for n in range(14)] == [
        value(other, f" Is it {n}?") for n in range(14)
    ]


def test_a_later_turn_is_worth_less_where_fewer_are_left() -> None:
    late = OPENING + (" Is it 1?" + HIGHER.format(2, 12)) * 3
    assert value(late, " Is it 7?") == pytest.approx(1 / 11 - 0.1, abs=1e-12)
    with pytest.raises(ValueError, match="no turn is left"):
        value(late + " Is it 1?" + HIGHER.format(2, 12), " Is it 7?")


# --- the rows


def test_there_are_8000_distinct_openings_and_400_held_out_ones_made_in_2_seconds() -> None:
    start = time.process_time()
    corpus = shipped().load()
    assert time.process_time() - start < 2.0
    assert len(corpus.train.prompts) == len(set(corpus.train.prompts)) == 8000
    assert len(corpus.heldout.prompts) == len(set(corpus.heldout.prompts)) == 400
    assert (len(corpus.train.demos), len(corpus.train.pairs)) == (8000, 4000)
    assert corpus.task == HUMAN and corpus.title == "guess-embedded" == shipped().title


def test_no_opening_of_the_held_out_split_begins_a_training_row(corpus: Corpus) -> None:
    def openings(split: Any) -> set[str]:
        rows = [row.prompt for row in (*split.demos, *split.pairs)]
        begun = {"\n\nAssistant:".join((*row.split("\n\nAssistant:")[:1], "")) for row in rows}
        return begun | set(split.prompts)

    assert openings(corpus.heldout) == set(corpus.heldout.prompts)
    assert openings(corpus.train).isdisjoint(openings(corpus.heldout))


def test_the_shipped_rows_are_the_same_bytes_everywhere(corpus: Corpus) -> None:
    # Other rows under the same knobs need a new REVISION: it is what a run's key sees of them.
    assert corpus.digest[:8] == "b2e6acd3"


def test_held_out_rows_depend_on_the_seed_and_on_no_size_of_the_training_split() -> None:
    dataset = shipped()
    small = replace(dataset, embedded=replace(dataset.embedded, prompts=50, demos=20, pairs=30))
    one, whole = small.load(), dataset.load()
    assert one.heldout == whole.heldout and one.train.prompts == whole.train.prompts[:50]
    other = replace(small, embedded=replace(small.embedded, seed=1))
    assert other.load().digest != one.digest and other.fingerprint() != small.fingerprint()


def test_demonstrations_are_whole_dialogues_turn_by_turn(corpus: Corpus) -> None:
    demos = corpus.train.demos
    ended = 0
    for demo, following in pairwise(demos[:1001]):
        reply = HUMAN.reply(demo.prompt, [demo.response])
        ended += reply.done
        if reply.done:
            assert following.prompt in corpus.train.prompts
        else:
            assert following.prompt == demo.prompt + demo.response + reply.text
    assert 300 < ended < 450


def test_demonstrations_are_of_mixed_quality_with_room_both_ways(corpus: Corpus) -> None:
    demos = corpus.train.demos
    garbled = statistics.mean(guess_of(demo.response) is None for demo in demos)
    # One turn in ten by design; 8000 draws, three standard errors are 0.01.
    assert garbled == pytest.approx(0.1, abs=0.01)
    worth = gold([demo.prompt for demo in demos], [demo.response for demo in demos])
    best = [max(value(demo.prompt, f" Is it {n}?") for n in range(1, 16)) for demo in demos[:1000]]
    shortfall = [b - w for b, w in zip(best, worth, strict=False)]
    assert min(worth) == -0.5 and max(worth) == 0.9
    assert statistics.mean(shortfall) > 0.2
    assert 0.2 < statistics.mean(gap < 1e-9 for gap in shortfall) < 0.6


def test_four_labels_in_five_follow_the_worth_of_the_turns(corpus: Corpus) -> None:
    pairs = corpus.train.pairs
    prompts = [pair.prompt for pair in pairs]
    chosen = gold(prompts, [pair.chosen for pair in pairs])
    rejected = gold(prompts, [pair.rejected for pair in pairs])
    gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
    ties = statistics.mean(abs(gap) < 1e-9 for gap in gaps)
    right = statistics.mean(1.0 if gap > 1e-9 else 0.5 if gap > -1e-9 else 0.0 for gap in gaps)
    assert 0.75 < right < 0.9 and ties < 0.25
    numbers = [(guess_of(pair.chosen), guess_of(pair.rejected)) for pair in pairs]
    assert all(one != other or one is None for one, other in numbers)


def test_everything_fits_the_shipped_lengths_under_a_bpe_of_2048(corpus: Corpus) -> None:
    dataset = shipped()
    rows = [*corpus.train.demos, *corpus.heldout.demos]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([d.prompt + d.response for d in rows], 2048, show_progress=False)
    prompts = [row.prompt for row in (*rows, *corpus.train.pairs)]
    assert max(len(e.ids) for e in bpe.encode_batch(prompts)) <= dataset.max_prompt_tokens
    dialogues = [
        (demo.prompt + demo.response).split("\n\nAssistant:", 1)[1]
        for demo in rows
        if HUMAN.reply(demo.prompt, [demo.response]).done
    ]
    # Every turn may bring an end token.
    longest = max(len(e.ids) for e in bpe.encode_batch(dialogues)) + TURNS
    assert longest <= dataset.max_response_tokens


def test_other_data_has_no_task() -> None:
    assert replace(HH_ROWS, source="embedded").load().task is None
