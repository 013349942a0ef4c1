"""Win rates: the statistics against closed forms and known effects, the verb on runs that are made up."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats
from scipy.special import expit

from rlhf_cli.evals.winrate import (
    Floats,
    at_equal_length,
    by_both_orders,
    by_score,
    mean_outcome,
    position,
    win_rate,
)
from rlhf_cli.store.run import Run
from tests.conftest import Typed
from tests.test_store import a_run

NAN = math.nan


def floats(*values: float) -> Floats:
    return np.array(values, dtype=float)


# --- outcomes


def test_the_higher_score_wins_and_scores_within_the_tolerance_tie() -> None:
    first, second = floats(1, 2, 3, NAN, 5), floats(2, 2, 1, 0, NAN)
    assert_array_equal(by_score(first, second, 0.0), [0, 0.5, 1, NAN, NAN])
    assert_array_equal(by_score(first, second, 1.0), [0.5, 0.5, 1, NAN, NAN])


def test_a_win_is_one_in_both_orders_and_anything_else_a_tie() -> None:
    # the first policy's response is A in the straight order and B in the swapped one
    straight = floats(1, 0, 1, 0, 0.5, 1.0, 0.5, NAN, 1)
    swapped = floats(0, 1, 1, 0, 0.5, 0.5, 1.0, 0, NAN)
    outcome = by_both_orders(straight, swapped)
    assert_array_equal(outcome, [1, 0, 0.5, 0.5, 0.5, 0.5, 0.5, NAN, NAN])


def test_position_bias_is_the_share_of_decided_verdicts_for_the_response_shown_first() -> None:
    straight, swapped = floats(1, 1, 1, 0, 0.5, NAN), floats(0, 1, 1, 0, 1, 1)
    # decided: 1 1 1 0 and 0 1 1 0 1, of which six are for the first place
    found = position(straight, swapped)
    assert found.first == pytest.approx(6 / 9)
    assert found.contradicted == 3  # twice the first place both times, once the second
    undecided = position(floats(0.5, NAN), floats(0.5, 1))
    assert math.isnan(undecided.first) and undecided.contradicted == 0


# --- the rate


def test_wins_ties_and_losses_are_counted_and_what_nobody_could_tell_is_left_out() -> None:
    found = win_rate(floats(1, 1, 1, 0.5, 0, NAN, NAN), floats(0, 0, 0, 0, 0, 9, 9))
    assert (found.wins, found.ties, found.losses, found.untold) == (3, 1, 1, 2)
    assert found.rate.value == pytest.approx(0.7)  # (3 + 1/2) / 5
    assert found.at_equal_length == found.rate  # no two lengths differ


def test_where_nothing_could_be_told_nothing_is_said() -> None:
    found = win_rate(floats(NAN, NAN), floats(1, 2))
    assert (found.wins, found.ties, found.losses, found.untold) == (0, 0, 0, 2)
    assert all(math.isnan(x) for x in (*found.rate, *found.at_equal_length))


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (3, 10), (57, 100), (280, 280)])
def test_without_ties_the_interval_is_wilsons(wins: int, n: int) -> None:
    outcome = np.repeat([1.0, 0.0], [wins, n - wins])
    wilson = stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    found = mean_outcome(outcome)
    assert found == pytest.approx((wins / n, wilson.low, wilson.high), abs=1e-12)


@pytest.mark.parametrize("chances", [(0.3, 0.5, 0.2), (0.1, 0.8, 0.1), (0.6, 0.1, 0.3)])
def test_with_ties_the_interval_holds_what_it_promises(chances: Sequence[float]) -> None:
    drawn = np.random.default_rng(0).choice([1.0, 0.5, 0.0], (2000, 60), p=chances)
    truth = chances[0] + chances[1] / 2
    held = [found.low <= truth <= found.high for found in map(mean_outcome, drawn)]
    assert 0.935 <= np.mean(held) <= 0.985


def test_ties_make_the_interval_narrower_than_the_same_rate_without_them() -> None:
    tied, decided = mean_outcome(np.full(100, 0.5)), mean_outcome(np.repeat([1.0, 0.0], 50))
    assert tied.value == decided.value == 0.5
    assert tied.high - tied.low < 0.25 * (decided.high - decided.low)


# --- at equal length


def test_of_two_differences_in_length_the_answer_is_midway_between_their_log_odds() -> None:
    # 12 longer by 8, of which 9 win; 20 shorter by 8, of which 5 win: with two coefficients the fit is
    # exact, and Jeffreys' prior is half a win and half a loss for either of the two
    outcome = np.repeat([1.0, 0.0, 1.0, 0.0], [9, 3, 5, 15])
    excess = np.repeat([8.0, -8.0], [12, 20])
    middle = (math.log(9.5 / 3.5) + math.log(5.5 / 15.5)) / 2
    se = math.sqrt(1 / 9.5 + 1 / 3.5 + 1 / 5.5 + 1 / 15.5) / 2
    expected = expit([middle, middle - 1.959964 * se, middle + 1.959964 * se])
    assert at_equal_length(outcome, excess) == pytest.approx(tuple(expected), abs=1e-5)


def known_effect(
    rng: np.random.Generator, n: int, theta: float, phi: float
) -> tuple[Floats, Floats]:
    """Outcomes of responses that are 10 tokens longer on average, with longer ones preferred."""
    excess = rng.normal(10, 20, n)
    chance = expit(theta + phi * np.tanh(excess / math.sqrt(np.mean(excess**2))))
    return (rng.random(n) < chance).astype(float), excess


def test_a_known_preference_for_length_is_taken_out() -> None:
    outcome, excess = known_effect(np.random.default_rng(1), 20000, -0.4, 2.0)
    found = win_rate(outcome, excess)
    assert found.rate.low > 0.5  # for no other reason than its length
    assert found.at_equal_length.value == pytest.approx(expit(-0.4), abs=0.015)
    assert found.at_equal_length.high < 0.5


@pytest.mark.parametrize("ties", [0.0, 0.5])
def test_the_interval_at_equal_length_holds_what_it_promises(ties: float) -> None:
    rng, held = np.random.default_rng(2), []
    for _ in range(300):
        outcome, excess = known_effect(rng, 120, 0.0, 1.5)
        # a tie in the place of a win as often as of a loss leaves the truth at 1/2
        outcome[rng.random(len(outcome)) < ties] = 0.5
        found = at_equal_length(outcome, excess)
        held.append(found.low <= 0.5 <= found.high)
    assert np.mean(held) >= 0.92


def test_swapping_the_policies_turns_both_rates_round() -> None:
    outcome, excess = known_effect(np.random.default_rng(3), 200, 0.3, 1.0)
    there, back = win_rate(outcome, excess), win_rate(1 - outcome, -excess)
    assert (back.wins, back.losses) == (there.losses, there.wins)
    for one, other in (there.rate, back.rate), (there.at_equal_length, back.at_equal_length):
        assert one == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low), abs=1e-4)


def test_where_length_or_nothing_decides_every_prompt_the_answer_stays_finite() -> None:
    excess = np.random.default_rng(4).normal(0, 20, 200)
    by_length = at_equal_length((excess > 0).astype(float), excess)
    assert by_length.low < 0.5 < by_length.high and by_length.high - by_length.low > 0.3
    always = at_equal_length(np.ones(200), excess)
    wilson = stats.binomtest(200, 200).proportion_ci(0.95, method="wilson")
    assert always.low == pytest.approx(wilson.low, abs=0.02) and always.high < 1


def test_lengths_that_always_differ_by_the_same_cannot_be_told_from_quality() -> None:
    assert all(math.isnan(x) for x in at_equal_length(floats(1, 0, 1), floats(5, 5, 5)))


def test_units_of_length_do_not_matter() -> None:
    outcome, excess = known_effect(np.random.default_rng(5), 200, 0.3, 1.0)
    assert at_equal_length(outcome, excess) == pytest.approx(at_equal_length(outcome, 4 * excess))


# --- the verb, on runs that are made up

Row = Mapping[str, Any]
PROMPTS = [f"\n\nHuman: question {n}?\n\nAssistant:" for n in range(6)]


def evaluated(
    root: Path, algo: str, samples: Mapping[int, Sequence[Row]], seed: int = 1, **manifest: Any
) -> Run:
    """A finished run with the responses of its evaluations."""
    run = a_run(root / "runs", algo, seed, **manifest)
    for step, rows in samples.items():
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (run.samples / f"{step:06d}.jsonl").write_text(lines, encoding="utf-8")
    return run


def rows(
    scores: Sequence[float | None],
    golds: Sequence[float] | None = None,
    lengths: Sequence[int] = (3, 5, 8, 4, 6, 7),
    prompts: Sequence[str] = PROMPTS,
) -> list[Row]:
    made: list[dict[str, Any]] = [
        {"prompt": prompt, "response": f" answer {score}", "length": length, "score": score}
        for prompt, score, length in zip(prompts, scores, lengths, strict=True)
    ]
    if golds is not None:
        made = [{**row, "gold": gold} for row, gold in zip(made, golds, strict=True)]
    return made


START = rows([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], (5, 5, 5, 5, 5, 5))


def three(root: Path) -> tuple[str, str]:
    """Keys of two runs: one that wins by reward, and one that wins by gold."""
    high = rows([1, 2, 3, 4, 5, -6], [-1, -1, -1, 0, 1, -1])
    true = rows([1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], (5, 4, 9, 6, 7, 2))
    first = evaluated(root, "ppo", {0: START, 8: START, 16: high})
    second = evaluated(root, "p3o_v2", {0: START, 12: true})
    return first.key, second.key


def test_all_pairs_are_compared_by_the_samples_of_the_last_evaluation(
    typed: Typed, tmp_path: Path
) -> None:
    a, b = three(tmp_path)
    code, out, err = typed("winrate", a, b, "sft", "--json")
    assert code == 0, err
    pairs, matrix = json.loads(out)
    counts = {
        row["pair"]: (row["wins"], row["ties"], row["losses"], row["win rate"]["value"])
        for row in pairs["rows"]
    }
    assert counts == {
        "ppo s1 over p3o_v2 s1": (4, 1, 1, 0.75),
        "ppo s1 over sft": (5, 0, 1, pytest.approx(5 / 6)),
        "p3o_v2 s1 over sft": (6, 0, 0, 1.0),
    }
    assert matrix["rows"][1] == {"policy": "p3o_v2 s1", "ppo s1": 0.25, "p3o_v2 s1": None, "sft": 1}
    assert matrix["rows"][2]["p3o_v2 s1"] == 0.0
    said = " ".join(pairs["notes"])
    assert "after step 16." in said and "after step 12." in said and "before step 1." in said


def test_the_gold_reward_may_say_the_contrary_and_ties_are_as_wide_as_wished(
    typed: Typed, tmp_path: Path
) -> None:
    a, b = three(tmp_path)
    (pairs,) = json.loads(typed("winrate", a, b, "judge=gold", "--json")[1])
    row = pairs["rows"][0]
    # gold -1 -1 -1 0 1 -1 against 1 1 1 0 0 0
    assert (row["wins"], row["ties"], row["losses"]) == (1, 1, 4)
    words = ("judge=gold", "judge.tolerance=1", "judge.prompts=5")
    (pairs,) = json.loads(typed("winrate", a, b, *words, "--json")[1])
    row = pairs["rows"][0]
    assert (row["prompts"], row["wins"], row["ties"], row["losses"]) == (5, 0, 2, 3)
    assert "Scores that differ by no more than 1 tie." in pairs["notes"]


def test_the_lengths_in_the_samples_are_those_that_are_made_equal(
    typed: Typed, tmp_path: Path
) -> None:
    # 4 longer by 3, all won, and 2 shorter by 3, both lost: as above, with half a prompt added to each
    ended = rows([1, 1, 1, 1, -1, -1], lengths=(8, 8, 8, 8, 2, 2))
    run = evaluated(tmp_path, "ppo", {0: START, 4: ended})
    (pairs,) = json.loads(typed("winrate", run.key, "sft", "--json")[1])
    expected = expit((math.log(4.5 / 0.5) + math.log(0.5 / 2.5)) / 2)
    found = pairs["rows"][0]["at equal length"]
    assert found["value"] == pytest.approx(expected, abs=1e-5)
    assert found["low"] < 0.5 < found["high"]


def test_responses_without_a_score_are_left_out_and_counted(typed: Typed, tmp_path: Path) -> None:
    some = evaluated(tmp_path, "ppo", {0: START, 4: rows([1, None, 1, 1, None, -1])})
    (pairs,) = json.loads(typed("winrate", some.key, "sft", "--json")[1])
    row = pairs["rows"][0]
    assert (row["prompts"], row["wins"], row["losses"], row["left out"]) == (4, 3, 1, 2)
    assert pairs["notes"][-1] == "Left out, since a score is missing: 2."


def test_seeds_of_one_algorithm_are_told_apart_and_the_same_twice_by_key(
    typed: Typed, tmp_path: Path
) -> None:
    runs = [
        evaluated(tmp_path, "ppo", {0: START, 4: START}, seed, hyper={"beta": beta})
        for seed, beta in ((1, 0.1), (2, 0.1), (2, 0.2))
    ]
    (pairs, _) = json.loads(typed("winrate", *(run.key for run in runs), "--json")[1])
    assert [row["pair"] for row in pairs["rows"]] == [
        f"ppo s1 over ppo s2 {runs[1].key}",
        f"ppo s1 over ppo s2 {runs[2].key}",
        f"ppo s2 {runs[1].key} over ppo s2 {runs[2].key}",
    ]


def test_a_run_that_is_not_done_is_said_not_to_be(typed: Typed, tmp_path: Path) -> None:
    a, b = three(tmp_path)
    for path in (tmp_path / "runs" / "rl").glob(f"*{a}"):
        Run(path).update(status="failed")
    (pairs,) = json.loads(typed("winrate", a, b, "--json")[1])
    assert any(note.endswith("after step 16 (the run is failed).") for note in pairs["notes"])


def again(run: Run, **manifest: Any) -> Run:
    """The same as a run of `rlhf eval`, which are kept in a folder of their own."""
    moved = Run(run.path.parents[1] / "eval" / run.path.name)
    moved.path.parent.mkdir(exist_ok=True)
    run.path.rename(moved.path)
    moved.update(stage="eval", **manifest)
    return moved


def test_of_a_policy_that_was_measured_again_the_first_response_to_each_prompt_counts(
    typed: Typed, tmp_path: Path
) -> None:
    first, second = rows([1, 1, 1, 1, -1, 0]), rows([9, 9, 9, 9, 9, 9])
    drawn = [row for both in zip(first, second, strict=True) for row in both]
    science = {"draws": 2, "contract": {"scoring": {"missing": "stop"}}}
    measured = again(evaluated(tmp_path, "mine", {0: drawn}, science=science), seed=None)
    other = {"algo": {}, "scoring": {"missing": "stop"}}
    evaluated(tmp_path, "ppo", {0: START, 9: drawn}, science=other)
    code, out, err = typed("winrate", measured.key, "sft", "--json")
    assert code == 0, err
    (pairs,) = json.loads(out)
    row = pairs["rows"][0]
    assert row["pair"] == "mine over sft"
    assert (row["wins"], row["ties"], row["losses"]) == (4, 1, 1)
    assert f"mine: {measured.path.name}." in pairs["notes"]


def test_the_sft_policy_of_a_policy_measured_again_is_found_in_no_other_runs(
    typed: Typed, tmp_path: Path
) -> None:
    measured = again(evaluated(tmp_path, "mine", {0: START}))
    evaluated(tmp_path, "ppo", {0: START}, parents={"sft": "dddd", "reward": "bbbb"})
    evaluated(tmp_path, "dpo", {0: START}, data={"digest": "e"})
    evaluated(tmp_path, "kto", {})
    assert mistake(typed, measured.key, "sft") == (
        f"no RL run in runs began with the SFT policy of {measured.path.name} and was measured alike;"
        " leave sft out."
    )


def test_the_table_is_printed_and_written_in_every_format(typed: Typed, tmp_path: Path) -> None:
    a, b = three(tmp_path)
    code, out, err = typed("winrate", "sft", a, b, "--out", "tables/w")
    assert (code, err) == (0, "")
    assert "Win rates by reward\n" in out and "sft over ppo s1" in out
    assert out.splitlines()[-1] == "next: rlhf winrate RUN... judge=gold, rlhf compare"
    endings = [
        f"{base}.{kind}" for base in ("w", "w_matrix") for kind in ("csv", "json", "md", "tex")
    ]
    assert [line for line in out.splitlines() if ": tables/" in line] == [
        f"{name.partition('.')[2]}: tables/{name}" for name in endings
    ]
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {*endings}
    with (tmp_path / "tables" / "w.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rate = table[0]
    wilson = stats.binomtest(1, 6).proportion_ci(0.95, method="wilson")
    assert rate["pair"] == "sft over ppo s1"
    assert float(rate["win rate"]) == pytest.approx(1 / 6)
    assert float(rate["win rate low"]) == pytest.approx(wilson.low)


def test_a_dry_run_by_score_says_that_nobody_is_asked(typed: Typed, tmp_path: Path) -> None:
    a, b = three(tmp_path)
    said = "judge=gold reads scores that are there: no calls.\n"
    assert typed("winrate", a, b, "judge=gold", "--dry-run") == (0, "", said)


# --- mistakes


def mistake(typed: Typed, *words: str) -> str:
    code, out, err = typed("winrate", *words)
    assert (code, out) == (2, "")
    return err.removeprefix("error: ").removesuffix("\n")


def test_one_policy_is_not_two(typed: Typed, tmp_path: Path) -> None:
    a, _ = three(tmp_path)
    said = "a win rate is between two policies; name two runs by directory, name or key, or a run and sft."
    assert mistake(typed, a) == mistake(typed, "sft") == mistake(typed, a, a) == said
    directory = next((tmp_path / "runs" / "rl").glob(f"*{a}"))
    assert mistake(typed, a, str(directory)) == said


def test_runs_that_were_asked_other_prompts_are_refused(typed: Typed, tmp_path: Path) -> None:
    zeros = [0.0] * 6
    a = evaluated(tmp_path, "ppo", {0: START, 3: rows(zeros)})
    b = evaluated(tmp_path, "dpo", {0: START, 4: rows(zeros, prompts=PROMPTS[::-1])})
    assert mistake(typed, a.key, b.key) == (
        f"ppo s1 and dpo s1 answered different prompts ({a.path.name} after step 3; {b.path.name} after"
        " step 4); name runs on the same data with the same eval.prompts."
    )
    fewer = rows(zeros[:4], lengths=[1] * 4, prompts=PROMPTS[:4])
    c = evaluated(tmp_path, "kto", {0: START, 4: fewer})
    assert "ppo s1 and kto s1 answered different prompts" in mistake(typed, a.key, c.key)
    assert typed("winrate", a.key, c.key, "judge.prompts=4")[0] == 0


def test_scores_of_different_rewards_are_refused(typed: Typed, tmp_path: Path) -> None:
    a = evaluated(tmp_path, "ppo", {0: START})
    b = evaluated(tmp_path, "dpo", {0: START}, parents={"sft": "aaaa", "reward": "cccc"})
    assert mistake(typed, a.key, b.key) == (
        f"rewards of different kinds cannot be compared, since {a.path.name} and {b.path.name} differ in"
        " theirs; use judge=gold or llm."
    )
    assert typed("winrate", a.key, b.key, "judge=gold")[0] == 0


def test_sft_must_mean_one_policy(typed: Typed, tmp_path: Path) -> None:
    a = evaluated(tmp_path, "ppo", {0: START})
    b = evaluated(tmp_path, "dpo", {0: START}, parents={"sft": "dddd", "reward": "bbbb"})
    assert mistake(typed, a.key, b.key, "sft") == (
        f"`sft` may mean several policies, since {a.path.name} and {b.path.name} differ in theirs; leave"
        " it out."
    )
    assert typed("winrate", a.key, b.key)[0] == 0


def test_a_run_without_evaluation_or_without_the_score_is_refused(
    typed: Typed, tmp_path: Path
) -> None:
    bare = evaluated(tmp_path, "kto", {})
    a = evaluated(tmp_path, "ppo", {0: rows([0.0] * 6)})
    assert mistake(typed, bare.key, a.key) == (
        f"{bare.path.name} has no evaluation whose responses could be compared; name an RL run, or sft"
        " for the policy it started from."
    )
    assert mistake(typed, a.key, "sft", "judge=gold") == (
        f"judge=gold compares the gold of responses, but ppo s1 has none ({a.path.name} after step 0);"
        " choose another judge."
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("judge=me", "judge=me is not a choice; choose one of gold, llm, reward."),
        (
            "judge.model=x",
            "judge.model is not a key of the configuration; `rlhf winrate --help` names those there are.",
        ),
        (
            "+judge.model=x",
            "judge.model=x is not a key of the configuration; `rlhf winrate --help` names those there"
            " are.",
        ),
        (
            "judge.tolerance=-1",
            "judge.tolerance=-1 is not allowed: it must be greater than or equal to 0; give another"
            " value.",
        ),
        ("judge=llm", "judge.model has no value yet; give it one with judge.model=VALUE."),
    ],
)
def test_a_word_that_is_wrong_is_one_sentence(
    typed: Typed, tmp_path: Path, word: str, said: str
) -> None:
    assert mistake(typed, *three(tmp_path), word) == said


def test_every_key_of_every_judge_is_in_the_help(typed: Typed, root: Path) -> None:
    import yaml

    code, out, _ = typed("winrate", "--help")
    assert code == 0
    keys = {
        key
        for file in (root / "conf" / "judge").glob("*.yaml")
        for key in yaml.safe_load(file.read_text())
    }
    assert len(keys) >= 14
    assert [key for key in sorted(keys - {"kind"}) if f"judge.{key}" not in out] == []
