"""The command line: words in, one sentence or a run out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import launch
from rlhf_cli.cli import main
from rlhf_cli.errors import UserError
from rlhf_cli.plan import Plan
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run
from tests.conftest import Typed

Rlhf = Typed


@pytest.fixture
def rlhf(typed: Typed) -> Rlhf:
    """Exit code, stdout and stderr of a command line."""
    return typed


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, str]]:
    """What would have been run, instead of running it."""
    calls: list[tuple[Plan, str]] = []

    def execute(plan: Plan, command: str) -> Path:
        calls.append((plan, command))
        if plan.recipe.seed == 13:
            raise UserError("13 brings bad luck.")
        return plan.steps[-1].path

    monkeypatch.setattr(launch, "execute", execute)
    return calls


def made(stage: str, label: str, key: str, *rows: dict[str, float], **manifest: Any) -> Run:
    """A finished run below ./runs."""
    run = Run(Path("runs") / stage / f"{label}-{key}")
    run.begin("stage: rl\n", {"stage": stage, "key": key, "group": "hh-nano", **manifest})
    for row in rows:
        Ledger(run.metrics_path).write(row)
    (run.samples / "000005.jsonl").write_text('{"prompt": "Hi", "response": " Yes", "gold": 1.5}\n')
    run.finish()
    return run


def test_help_answers_within_half_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from rlhf_cli.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'hydra', 'wandb', 'deepspeed', 'matplotlib', 'scipy')\n"
        "print([m for m in heavy if m in sys.modules], time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    last = [run.stdout.splitlines()[-1].rsplit(" ", 1) for run in runs]
    assert {modules for modules, _ in last} == {"[]"}
    assert min(float(seconds) for _, seconds in last) < 0.5


def test_version_and_help_of_a_verb_show_what_to_type(rlhf: Rlhf) -> None:
    assert rlhf("--version")[1].startswith("rlhf-cli 0.")
    code, out, _ = rlhf("train", "--help")
    assert code == 0 and "rlhf train -m algo=p3o_v2,ppo seed=1,2" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algo=nope"], "choose one of aihf, "),
        (["algo.clp=1"], "algo.clp is not a key"),
        (["++algo.clp=1"], "algo.clp=1 is not a key"),
        (["seed=x"], "seed=x is not allowed"),
        (["algo.clip=${nope}"], "'nope' not found"),
        (["hydra/launcher=basic"], "hydra/launcher=basic has no effect"),
        (["hydra/sweeper=basic"], "hydra/sweeper=basic has no effect"),
        (["-m", "hydra/launcher=nope"], "choose one of basic"),
        (["--config-dir", "nope"], "not found"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["nope"], "nope cannot be read as KEY=VALUE"),
        (["-m", "seed=1,x"], "seed=x is not allowed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_are_one_sentence_exit_code_2_and_no_file(
    rlhf: Rlhf, executed: list[Any], tmp_path: Path, words: list[str], says: str
) -> None:
    code, out, err = rlhf("train", *words)
    assert code == 2
    assert says in err and err.startswith("error: ") and err.count("\n") == 1
    assert executed == [] and list(tmp_path.iterdir()) == []
    assert "run: " not in out


def test_debug_shows_the_traceback(rlhf: Rlhf) -> None:
    with pytest.raises(UserError, match="algo=nope"):
        main(["plan", "algo=nope", "--debug"])


def test_plan_prints_the_chain_and_leaves_no_trace(rlhf: Rlhf, tmp_path: Path) -> None:
    code, out, err = rlhf("plan", "algo=ppo", "seed=7")
    assert (code, err) == (0, "")
    assert "runs/rl/ppo-hh_embedded-nano-s7-" in out and "optimiser steps" in out
    assert list(tmp_path.iterdir()) == []


def test_train_ends_with_the_directory_of_its_run(rlhf: Rlhf, executed: list[Any]) -> None:
    code, out, _ = rlhf("train", "algo=p3o_v2", "data=hh")
    (plan, command), last = executed[0], out.splitlines()[-1]
    node = plan.steps[-1].node
    assert code == 0 and last == f"run: {plan.steps[-1].path}"
    assert command == "rlhf train algo=p3o_v2 data=hh"
    assert (node.name, node.stage, node.seed) == ("p3o_v2", "rl", 1)
    assert "next: rlhf frontier" in out


def test_overrides_may_stand_among_the_flags(
    rlhf: Rlhf, executed: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    text = "defaults: [p3o_v2, _self_]\nbeta: 0.7\n"
    (tmp_path / "mine" / "algo" / "mine.yaml").write_text(text)
    code, _, err = rlhf("train", "algo=mine", "--config-dir", "mine", "seed=4")
    assert (code, err) == (0, "")
    made = executed[0][0].recipe
    assert (made.name, made.algo.beta, made.seed) == ("mine", 0.7, 4)  # type: ignore[attr-defined]


def test_a_sweep_is_planned_whole_and_run_in_order(rlhf: Rlhf, executed: list[Any]) -> None:
    code, out, _ = rlhf("train", "-m", "algo=ppo,p3o_v1", "seed=1,2", "track=off")
    assert code == 0
    assert [(plan.recipe.name, plan.recipe.seed) for plan, _ in executed] == [
        *(("ppo", 1), ("ppo", 2), ("p3o_v1", 1), ("p3o_v1", 2))
    ]
    assert len({plan.steps[0].key for plan, _ in executed}) == 1
    ran = [line for line in out.splitlines() if line.startswith("run: ")]
    assert ran == [f"run: {plan.steps[-1].path}" for plan, _ in executed]


def test_a_sweep_goes_on_after_a_failure_and_names_it(rlhf: Rlhf, executed: list[Any]) -> None:
    code, out, err = rlhf("train", "-m", "seed=1,13,2")
    assert code == 1
    assert [plan.recipe.seed for plan, _ in executed] == [1, 13, 2]
    assert out.count("run: ") == 2
    assert "1 of 3 runs failed" in err and "-s13-" in err.splitlines()[-1]


def test_a_single_failure_is_a_sentence(rlhf: Rlhf, executed: list[Any]) -> None:
    code, _, err = rlhf("train", "seed=13")
    assert (code, err) == (2, "error: 13 brings bad luck.\n")


def test_an_interrupt_ends_with_130(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(plan: Plan, command: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "execute", execute)
    assert rlhf("train", "-m", "seed=1,2")[0] == 130


def test_hydras_own_flags_print_and_run_nothing(rlhf: Rlhf, executed: list[Any]) -> None:
    _, out, _ = rlhf("train", "algo=ppo", "--cfg", "job", "--package", "algo")
    assert "_target_: rlhf_cli.algos.ppo.PPO" in out
    assert rlhf("train", "--cfg", "job", "--resolve", "--package", "name")[1].strip() == "p3o_v2"
    assert executed == []


def test_runs_lists_every_run_with_its_last_evaluation(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert "no runs in runs yet" in rlhf("runs")[1]
    first = {"step": 0, "eval/kl": 0.0, "eval/reward": 0.1}
    last = {"step": 5, "eval/kl": 2.5, "eval/reward": 0.75, "eval/gold": float("nan")}
    made("rl", "ppo-hh-nano-s1", "aaaaaaaaaa", first, last, {"step": 6, "train/loss": 1.0})
    made("sft", "hh-nano-s1", "bbbbbbbbbb")
    code, out, _ = rlhf("runs")
    assert code == 0
    assert out.splitlines()[1].split()[:8] == [
        *("rl", "ppo-hh-nano-s1", "aaaaaaaaaa", "done", "6", "2.50", "0.75", "-")
    ]
    rows = json.loads(rlhf("runs", "--json")[1])
    assert [row["stage"] for row in rows] == ["rl", "sft"]
    assert (rows[0]["eval/kl"], rows[0]["eval/gold"], rows[1]["step"]) == (2.5, None, None)


def test_at_80_columns_a_run_stays_on_one_line(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"step": 128, "eval/kl": 5.5961, "eval/reward": 1.4501, "eval/gold": 0.9594}
    made("rl", "dpo_online-hh_embedded-nano-s1", "aaaaaaaaaa", row)
    monkeypatch.setenv("COLUMNS", "80")
    lines = rlhf("runs")[1].splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert lines[1].split()[1:] == [
        *("dpo_online-hh_embedded-nano-s1", "aaaaaaaaaa", "done", "5.60", "1.45", "0.96")
    ]


def test_show_tells_where_a_run_comes_from_and_what_it_wrote(rlhf: Rlhf) -> None:
    row = {"step": 5, "eval/kl": 2.5}
    made("rl", "ppo-hh-nano-s1", "aaaaaaaaaa", row, parents={"sft": "bbbbbbbbbb"}, command="rlhf x")
    code, out, _ = rlhf("show", "aaaa")
    assert code == 0
    for part in ("sft bbbbbbbbbb", "rlhf x", "2.5", "metrics.jsonl", "Yes"):
        assert part in out
    shown = json.loads(rlhf("show", "aaaa", "--json")[1])
    assert shown["metrics"]["eval/kl"] == 2.5 and shown["sample"]["gold"] == 1.5
    assert shown["manifest"]["status"] == "done" and "config.yaml" in shown["files"]
    assert rlhf("show", "zzz")[0] == 2


def test_frontier_draws_the_newest_group_unless_told(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rlhf_cli.figures.frontier as figure

    drawn: list[tuple[list[str], Path]] = []

    def frontier(runs: list[Run], out: Path, command: str, fit: str) -> dict[str, Path]:
        assert fit == "straight"
        drawn.append(([run.key for run in runs], out))
        return {"png": Path(f"{out}.png"), "csv": Path(f"{out}.csv")}

    monkeypatch.setattr(figure, "frontier", frontier)
    assert "holds no RL run yet" in rlhf("frontier")[2]
    for key, group, started in ("a" * 10, "old", "2026-01-01"), ("b" * 10, "new", "2026-01-02"):
        made("rl", "ppo-hh-nano-s1", key, group=group).update(started=started)
    code, out, _ = rlhf("frontier")
    assert code == 0 and "figure: figures/new.png" in out and "csv: figures/new.csv" in out
    assert "run: runs/rl/ppo-hh-nano-s1-bbbbbbbbbb" in out
    rlhf("frontier", "--group", "old", "--out", "here/it")
    rlhf("frontier", "aaaa", "bbbb")
    assert drawn == [
        (["b" * 10], Path("figures/new")),
        (["a" * 10], Path("here/it")),
        (["a" * 10, "b" * 10], Path("figures/frontier")),
    ]
    assert "choose one of new, old" in rlhf("frontier", "--group", "nope")[2]


def test_the_runs_folder_is_an_option_or_an_environment_variable(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no runs in there yet" in rlhf("runs", "--runs", "there")[1]
    monkeypatch.setenv("RLHF_RUNS", "elsewhere")
    assert "no runs in elsewhere yet" in rlhf("runs")[1]
    assert "elsewhere/rl/" in rlhf("plan")[1]
