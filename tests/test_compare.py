"""`rlhf compare`: equal terms or none, what a run spent, and curves at the same KL."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UserError
from rlhf_cli.evals.budget import Budget, budget_of, stored, tried
from rlhf_cli.evals.comparison import HOW_TO_READ, compare, write
from rlhf_cli.evals.grid import Cell
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run
from tests.conftest import Typed
from tests.test_store import a_run

SPENT = {
    "budget/prompts": 704.0,
    "budget/responses": 1408.0,
    "budget/given": 0.0,
    "budget/tokens": 30000.0,
    "budget/scored": 1408.0,
    "budget/flops": 2.5e12,
    "budget/seconds": 60.5,
}
FORCED = "or add --force to have it noted instead."


def metered(run: Run, episodes: int = 1408, **changes: float) -> Run:
    """The run with one more row, of what it spent; a_run ends at step 11 with 1408 episodes."""
    changed = {f"budget/{name}": value for name, value in changes.items()}
    Ledger(run.metrics_path).write({"step": 12, "episodes": episodes, **SPENT, **changed})
    run.finish()
    return run


def science(algo: str, seed: int = 1, **rest: Any) -> dict[str, Any]:
    """A manifest's description of an RL run."""
    return {"algo": {"beta": 0.1}, "algo_class": algo, "seed": seed, **rest}


def sampled(run: Run, rewards: Mapping[int, Sequence[float]]) -> Run:
    """The run with samples: at step 0 a KL of 0 for every prompt, and 1 more at each later step."""
    for kl, (step, values) in enumerate(rewards.items()):
        rows = [
            {"prompt": f"q{i}", "kl": float(kl), "score": value, "length": 5}
            for i, value in enumerate(values)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run.samples / f"{step:06d}.jsonl").write_text(lines)
    return run


def refusal(*runs: Run) -> str:
    with pytest.raises(UserError) as refused:
        compare(runs)
    return str(refused.value)


# --- what a run spent


def test_a_budget_is_the_last_row_of_the_ledger(tmp_path: Path) -> None:
    run = metered(a_run(tmp_path, "ppo", seed=1), flops=math.nan)
    spent = budget_of(run)
    assert (spent.episodes, spent.steps, spent.prompts, spent.responses) == (1408, 12, 704, 1408)
    assert (spent.given, spent.tokens, spent.scored, spent.seconds) == (0, 30000, 1408, 60.5)
    assert math.isnan(spent.flops) and spent.note is None


def test_a_run_made_before_budgets_were_metered_says_so(tmp_path: Path) -> None:
    spent = budget_of(a_run(tmp_path, "ppo", seed=1))
    assert (spent.episodes, spent.steps) == (1408, 11)
    assert math.isnan(spent.responses) and math.isnan(spent.seconds)
    assert spent.note == "only episodes and steps are known, as budgets were not metered yet"


def test_a_run_without_a_ledger_has_spent_nothing_that_is_known(tmp_path: Path) -> None:
    assert all(math.isnan(value) for value in vars(budget_of(Run(tmp_path / "x"))).values())


def test_settings_are_counted_once_over_seeds_measures_versions_and_whatever_became_of_them(
    tmp_path: Path,
) -> None:
    first = a_run(tmp_path, "ppo", seed=1)
    assert tried(stored(tmp_path), first) == 1
    a_run(tmp_path, "ppo", seed=2)
    a_run(tmp_path, "ppo", seed=1, science=science("ppo", eval={"points": 4}, revision=3))
    assert tried(stored(tmp_path), first) == 1
    a_run(tmp_path, "ppo", seed=1, hyper={"beta": 0.2})
    a_run(tmp_path, "ppo", seed=1, hyper={"beta": 0.4}).fail("it diverged")
    a_run(tmp_path, "ppo", seed=1, science=science("ppo", rollout={"temperature": 0.7}))
    assert tried(stored(tmp_path), first) == 4


def test_settings_of_other_algorithms_data_models_and_parents_do_not_count(tmp_path: Path) -> None:
    first = a_run(tmp_path, "ppo", seed=1)
    other = {"beta": 0.2}
    a_run(tmp_path, "p3o_v2", seed=1, hyper=other)
    a_run(tmp_path, "ppo", seed=1, hyper=other, title="tldr")
    a_run(tmp_path, "ppo", seed=1, hyper=other, model="pythia_1b")
    a_run(tmp_path, "ppo", seed=1, hyper=other, parents={"sft": "cccc", "reward": "bbbb"})
    a_run(tmp_path, "ppo", seed=1, hyper=other, parents={"sft": "aaaa", "reward": "dddd"})
    assert tried(stored(tmp_path), first) == 1
    guided = {"sft": "aaaa", "reward": "bbbb", "guide": "eeee"}
    a_run(tmp_path, "ppo", seed=1, hyper=other, parents=guided)
    assert tried(stored(tmp_path), first) == 2


# --- what is refused


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({}, {"title": "hh"}, "data differ (hh-embedded and hh)"),
        (
            {"data": {"digest": "0123456789abcdef"}},
            {"data": {"digest": "fedcba9876543210"}},
            "data digests differ (0123456789 and fedcba9876)",
        ),
        (
            {"data": {"digest": "d", "evaluation": {"prompts": 280, "digest": "a1"}}},
            {"data": {"digest": "d", "evaluation": {"prompts": 280, "digest": "b2"}}},
            "evaluation prompts differ (a1 and b2)",
        ),
        ({}, {"model": "gpt2"}, "models differ (nano and gpt2)"),
        (
            {},
            {"parents": {"sft": "cccc", "reward": "bbbb"}},
            "sft parents differ (aaaa and cccc)",
        ),
        (
            {},
            {"parents": {"sft": "aaaa", "reward": "dddd"}},
            "reward parents differ (bbbb and dddd)",
        ),
        ({}, {"prompts": 64}, "numbers of evaluation prompts differ (280 and 64)"),
        (
            {"science": science("ppo", eval={"points": 8, "seed": 0})},
            {"science": science("p3o_v2", eval={"points": 8, "seed": 1})},
            "values of eval.seed differ (0 and 1)",
        ),
        (
            {"science": science("ppo", scoring={"source": {"kind": "learned"}})},
            {"science": science("p3o_v2", scoring={"source": {"kind": "gold"}})},
            "values of reward.source.kind differ (learned and gold)",
        ),
        (
            {"science": science("ppo", scoring={"unended": None})},
            {"science": science("p3o_v2", scoring={"unended": -1.0})},
            "values of reward.unended differ (None and -1.0)",
        ),
    ],
)
def test_unequal_runs_are_refused_in_one_sentence_with_the_fix(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], differ: str
) -> None:
    first = a_run(tmp_path, "ppo", seed=1, **one)
    second = a_run(tmp_path, "p3o_v2", seed=1, **other)
    assert refusal(first, second) == (
        f"{first.path.name} and {second.path.name} cannot be compared: their {differ}; name runs"
        f" that agree in it, {FORCED}"
    )
    assert len(compare([first, second], force=True).rows) == 2


def test_unequal_numbers_of_episodes_are_refused_with_the_key_to_set(tmp_path: Path) -> None:
    first = metered(a_run(tmp_path, "ppo", seed=1))
    second = metered(a_run(tmp_path, "dpo", seed=1), episodes=8192)
    assert refusal(first, second) == (
        f"{first.path.name} and {second.path.name} cannot be compared: their numbers of episodes"
        f" differ (1408 and 8192); train both to the same algo.update.episodes, {FORCED}"
    )


def test_an_offline_and_an_online_run_are_equal_if_they_learned_from_as_many_responses(
    tmp_path: Path,
) -> None:
    online = metered(a_run(tmp_path, "ppo", seed=1))
    offline = metered(a_run(tmp_path, "dpo", seed=1), responses=0, given=1408, tokens=0, scored=0)
    dpo, ppo = compare([online, offline]).rows
    assert (dpo.budget.responses, dpo.budget.given) == (0, 1408)
    assert (ppo.budget.responses, ppo.budget.given) == (1408, 0)


def test_what_is_scored_otherwise_only_in_learning_may_be_compared(tmp_path: Path) -> None:
    compare(
        [
            a_run(tmp_path, "ppo", seed=1, science=science("ppo", scoring={"relative": True})),
            a_run(tmp_path, "vpg", seed=1, science=science("vpg", scoring={"relative": False})),
        ]
    )


def test_where_there_is_nothing_to_compare_it_says_what_to_do(tmp_path: Path) -> None:
    assert refusal(a_run(tmp_path, "ppo", seed=1, stage="sft")) == (
        "there is no RL run to compare among 1 run(s); train one with `rlhf train algo=p3o_v2`."
    )
    begun = a_run(tmp_path, "ppo", seed=2, rows=[])
    assert refusal(a_run(tmp_path, "ppo", seed=1), begun) == (
        f"{begun.path.name} has no evaluation to compare; finish it with the command that began it,"
        " or leave it out."
    )


def test_force_says_in_the_table_what_is_unequal_and_of_which_curves(tmp_path: Path) -> None:
    runs = [
        *(metered(a_run(tmp_path, "ppo", seed=seed, model="gpt2")) for seed in (1, 2)),
        metered(a_run(tmp_path, "vpg", seed=1)),
        metered(a_run(tmp_path, "raft", seed=1), episodes=2048),
        metered(a_run(tmp_path, "dpo", seed=1), episodes=8192),
        metered(a_run(tmp_path, "dpo", seed=2)),
    ]
    assert compare(runs, force=True).grids["curves"].notes == (
        *HOW_TO_READ,
        "Unequal, compared by force: models are nano, but gpt2 in ppo.",
        f"Unequal, compared by force: numbers of episodes are 1408, but 2048 in raft and 8192 in"
        f" {runs[4].key}.",
    )


def test_equal_runs_need_no_force_and_get_no_such_note(tmp_path: Path) -> None:
    runs = [metered(a_run(tmp_path, algo, seed=1)) for algo in ("ppo", "p3o_v2")]
    assert compare(runs).grids["curves"].notes == HOW_TO_READ
    assert compare(runs, force=True).grids["curves"].notes == HOW_TO_READ


# --- the table


def test_the_rows_of_a_curve_are_averaged_over_its_seeds_and_errors_are_theirs(
    tmp_path: Path,
) -> None:
    ends = {1: (2.0, 1.0), 2: (4.0, 2.0)}
    runs = [
        metered(
            a_run(tmp_path, "ppo", seed=seed, gold=True, rows=[(0, 0.0, 0.0), (5, *end)]),
            tokens=30000 + seed,
        )
        for seed, end in ends.items()
    ]
    a_run(tmp_path, "ppo", seed=1, hyper={"beta": 0.5})  # another setting that was tried
    (row,) = compare(runs).rows
    assert (row.curve, row.seeds, row.tried) == ("ppo", 2, 2)
    # half the distance of two values is the standard error of their mean; gold is 3 + reward / 2
    assert row.kl == Cell(3.0, 1.0)
    assert row.proxy == Cell(1.5, 0.5)
    assert row.gold == Cell(3.75, 0.25)
    assert row.budget == Budget(1408, 12, 704, 1408, 0, 30001.5, 1408, 2.5e12, 60.5)


def test_the_errors_of_a_single_seed_are_over_its_prompts(tmp_path: Path) -> None:
    (row,) = compare([a_run(tmp_path, "ppo", seed=1, gold=True)]).rows
    assert (row.kl, row.proxy, row.gold) == (Cell(2.0, 0.05), Cell(0.9, 0.06), Cell(3.45, 0.1))


def test_a_run_named_twice_does_not_pass_for_two_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, "ppo", seed=1)
    monkeypatch.chdir(tmp_path)
    (row,) = compare([run, Run(run.path.relative_to(tmp_path))]).rows
    assert row.seeds == 1 and row.kl.se == 0.05


def test_columns_of_what_nobody_counted_are_left_out_and_a_note_says_why(tmp_path: Path) -> None:
    old, new = a_run(tmp_path, "ppo", seed=1), metered(a_run(tmp_path, "p3o_v2", seed=1))
    table = compare([old]).grids["curves"]
    assert table.columns == ("curve", "seeds", "KL", "proxy", "tried", "episodes", "steps")
    note = "only episodes and steps are known, as budgets were not metered yet."
    assert table.notes == (*HOW_TO_READ, f"Of every curve: {note}")
    both = compare([old, new]).grids["curves"]
    assert both.columns == (
        *("curve", "seeds", "KL", "proxy", "tried", "episodes", "drawn", "given", "prompts"),
        *("tokens", "scored", "FLOP", "seconds", "steps"),
    )
    assert both.notes == (*HOW_TO_READ, f"Of ppo: {note}")


def test_what_training_a_guide_took_is_said_to_be_missing(tmp_path: Path) -> None:
    parents = {"sft": "aaaa", "reward": "bbbb", "guide": "cccc"}
    runs = [
        metered(a_run(tmp_path, "rto", seed=1, parents=parents)),
        metered(a_run(tmp_path, "ppo", seed=1)),
    ]
    assert compare(runs).grids["curves"].notes == (
        *HOW_TO_READ,
        "Of rto: what training the guide took is not counted.",
    )


def test_the_files_hold_the_numbers_and_where_they_come_from(tmp_path: Path) -> None:
    runs = [metered(a_run(tmp_path, algo, seed=1)) for algo in ("ppo", "p3o_v2")]
    files = write(compare(runs), tmp_path / "tables" / "main", "rlhf compare --out tables/main")
    assert {kind: path.name for kind, path in files.items()} == {
        "csv": "main.csv",
        "json": "main.json",
        "md": "main.md",
        "tex": "main.tex",
        "origin": "main_origin.json",
    }
    with files["csv"].open(newline="") as file:
        p3o, ppo = csv.DictReader(file)
    assert (p3o["curve"], ppo["curve"], ppo["KL"], ppo["KL se"]) == ("p3o_v2", "ppo", "2.0", "0.05")
    assert (ppo["tokens"], ppo["FLOP"], ppo["seconds"]) == ("30000", "2500000000000", "60.5")
    assert "p3o\\_v2 & $1$ & $2.00 \\pm 0.05$ & " in files["tex"].read_text()
    origin = json.loads(files["origin"].read_text())
    assert origin["command"] == "rlhf compare --out tables/main"
    assert [run["key"] for run in origin["runs"]] == [run.key for run in runs]


# --- at equal KL


def pair(root: Path) -> list[Run]:
    """ppo gains 2 per nat on every prompt, p3o_v2 4; both start from rewards of 0, 1, 2 and 3."""
    return [
        sampled(
            a_run(root, algo, seed=1, rows=[(step, step / 5, 0.0) for step in (0, 5, 10)]),
            {step: [i + slope * step / 5 for i in range(4)] for step in (0, 5, 10)},
        )
        for algo, slope in (("ppo", 2.0), ("p3o_v2", 4.0))
    ]


def test_at_equal_kl_curves_are_read_between_evaluations_and_set_against_the_first_run(
    tmp_path: Path,
) -> None:
    table = compare(pair(tmp_path), kls=[1.5, 3.0]).grids["matched"]
    assert table.title == "hh-embedded · nano · 280 held-out prompts, at equal KL"
    assert table.columns == ("curve", "KL", "reached", "proxy", "proxy gap", "proxy p")
    assert [row[:3] for row in table.rows] == [
        ("p3o_v2", 1.5, "1 of 1"),
        ("ppo", 1.5, "1 of 1"),
        ("p3o_v2", 3.0, "0 of 1"),
        ("ppo", 3.0, "0 of 1"),
    ]
    # half-way between 1 and 2 nats: a mean start of 1.5, and 1.5 nats of gain
    p3o, ppo = table.rows[0][3:], table.rows[1][3:]
    assert isinstance(p3o[0], Cell) and p3o[0].value == pytest.approx(7.5)
    assert isinstance(ppo[0], Cell) and ppo[0].value == pytest.approx(4.5)
    # 6 against 3 nats' worth on every prompt alike, so that there is nothing to be unsure of
    gap = p3o[1]
    assert isinstance(gap, Cell) and gap.interval is not None
    assert (gap.value, *gap.interval) == pytest.approx((3.0, 3.0, 3.0))
    assert p3o[2] == pytest.approx(0.0)
    assert ppo[1:] == (None, None)
    assert [row[3:] for row in table.rows[2:]] == [(None, None, None)] * 2
    assert table.notes[-1].startswith("Gap: to ppo, on the same prompts;")


def test_the_table_at_equal_kl_has_files_of_its_own(tmp_path: Path) -> None:
    files = write(compare(pair(tmp_path), kls=[1.0]), tmp_path / "t", "")
    assert [path.name for path in files.values()] == [
        *("t.csv", "t.json", "t.md", "t.tex", "t_origin.json"),
        *("t_matched.csv", "t_matched.json", "t_matched.md", "t_matched.tex"),
    ]
    with files["matched csv"].open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:6] == ["curve", "KL", "reached", "proxy", "proxy low", "proxy high"]
    assert [row[:3] for row in rows] == [["p3o_v2", "1.0", "1 of 1"], ["ppo", "1.0", "1 of 1"]]


# --- the verb


def test_the_verb_prints_within_80_columns_and_ends_with_what_is_next(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for algo in ("ppo", "p3o_v2"):
        metered(a_run(tmp_path / "runs", algo, seed=1, gold=True))
    code, out, err = typed("compare", "--out", "tables/main")
    lines = [line.rstrip() for line in out.splitlines()]
    assert (code, err) == (0, "") and max(map(len, lines)) <= 80
    assert lines[:9] == [
        "hh-embedded · nano · 280 held-out prompts",
        "curve   seeds           KL        proxy         gold  tried  episodes  drawn",
        "p3o_v2      1  2.00 ± 0.05  0.90 ± 0.06  3.45 ± 0.10      1     1,408  1,408",
        "ppo         1  2.00 ± 0.05  0.90 ± 0.06  3.45 ± 0.10      1     1,408  1,408",
        "curve   given  prompts  tokens  scored     FLOP  seconds  steps",
        "p3o_v2      0      704  30,000   1,408  2.5e+12     60.5     12",
        "ppo         0      704  30,000   1,408  2.5e+12     60.5     12",
        "KL in nats per response; ± is the standard error over seeds, or over prompts",
        "where there is one seed.",
    ]
    assert lines[-6:] == [
        "csv: tables/main.csv",
        "json: tables/main.json",
        "md: tables/main.md",
        "tex: tables/main.tex",
        "origin: tables/main_origin.json",
        "next: rlhf frontier, rlhf compare --out tables/NAME",
    ]


def test_the_verb_takes_the_runs_of_a_group_and_prints_json(typed: Typed, tmp_path: Path) -> None:
    ours = a_run(tmp_path / "runs", "ppo", seed=1, group="mine")
    a_run(tmp_path / "runs", "p3o_v2", seed=1, group="yours", model="gpt2")
    code, out, _ = typed("compare", "--group", "mine", "--json")
    read = json.loads(out)
    assert code == 0 and [*read] == ["curves"]
    assert [row["curve"] for row in read["curves"]["rows"]] == ["ppo"]
    assert read["curves"]["rows"][0]["KL"] == {"value": 2.0, "se": 0.05}
    both = json.loads(typed("compare", ours.key, "p3o_v2", "--force", "--json")[1])
    assert [row["curve"] for row in both["curves"]["rows"]] == ["p3o_v2", "ppo"]
    assert typed("compare", "--group", "nope") == (
        *(2, "", "error: --group=nope has no RL run; choose one of mine, yours.\n"),
    )


def test_the_verb_refuses_unequal_runs_with_exit_code_2(typed: Typed, tmp_path: Path) -> None:
    for algo, model in (("ppo", "nano"), ("p3o_v2", "gpt2")):
        a_run(tmp_path / "runs", algo, seed=1, model=model)
    code, out, err = typed("compare")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "their models differ (gpt2 and nano)" in err


def test_the_verb_compares_at_equal_kl(typed: Typed, tmp_path: Path) -> None:
    ppo, p3o = pair(tmp_path / "runs")
    read = json.loads(typed("compare", ppo.key, p3o.key, "--kl", "1,1.5", "--json")[1])
    assert [*read] == ["curves", "matched"]
    assert [row["KL"] for row in read["matched"]["rows"]] == [1.0, 1.0, 1.5, 1.5]
    code, _, err = typed("compare", "--kl", "1;2")
    assert (code, err) == (
        2,
        "error: --kl=1;2 is not allowed: give KLs in nats with commas between, such as --kl 1,2,5.\n",
    )
