"""Keys, run directories, locks and ledgers, also when the disk or the process gives way."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.errors import UserError
from rlhf_cli.store import files
from rlhf_cli.store.files import atomic_write, check_writable, disk
from rlhf_cli.store.key import canonical, key
from rlhf_cli.store.metrics import VOCABULARY, Ledger, describe, read
from rlhf_cli.store.provenance import provenance
from rlhf_cli.store.run import Run, all_runs, find

ROWS = ((0, 0.0, 0.0), (5, 1.0, 0.5), (10, 2.0, 0.9))


def a_run(
    root: Path,
    algo: str,
    seed: int,
    *,
    rows: Sequence[tuple[int, float, float]] = ROWS,
    gold: bool = False,
    hyper: Mapping[str, Any] | None = None,
    prompts: int = 280,
    **manifest: Any,
) -> Run:
    """A finished RL run with evaluations (step, KL, reward), as the stages leave it."""
    science = {"algo": hyper or {"beta": 0.1}, "algo_class": algo, "seed": seed}
    name = key({"science": science, "rest": [prompts, manifest]})
    run = Run(root / "rl" / f"{algo}-hh_embedded-nano-s{seed}-{name}")
    described = {
        "key": name,
        "stage": "rl",
        "label": run.label,
        "title": "hh-embedded",
        "algo": algo,
        "model": "nano",
        "seed": seed,
        "group": "hh_embedded-nano",
        "beta": 0.1,
        "parents": {"sft": "aaaa", "reward": "bbbb"},
        "science": science,
    }
    run.begin(f"seed: {seed}\n", described | manifest)
    # The manifest says what the data are only once the worker has read them.
    run.update(data=manifest.get("data", {"digest": "d", "drops": {}}))
    ledger = Ledger(run.metrics_path)
    for step, kl, reward in rows:
        row: dict[str, float] = {"step": step, "episodes": step * 128, "eval/prompts": prompts}
        row |= {"eval/kl": kl, "eval/kl_se": 0.05, "eval/kl_k3": kl}
        row |= {"eval/reward": reward, "eval/reward_se": 0.06}
        row |= {"eval/gold": 3 + reward / 2, "eval/gold_se": 0.1} if gold else {}
        ledger.write(row)
    ledger.write({"step": 11, "episodes": 11 * 128, "train/loss": 0.5})
    run.finish()
    return run


def test_the_key_of_a_known_description_is_8575ba05bf() -> None:
    # by sha256sum of the text below; a change would disown every finished run
    assert canonical({"b": {"c": "π"}, "a": (1.0, 1e-3, None, True)}) == (
        '{"a":[1,0.001,null,true],"b":{"c":"π"}}'
    )
    assert key({"b": {"c": "π"}, "a": (1.0, 1e-3, None, True)}) == "8575ba05bf"


def test_1_and_1_0_share_a_key_but_true_and_1_1_do_not() -> None:
    assert key({"a": 1}) == key({"a": 1.0}) == key({"a": 1e0})
    assert key({"a": 0.001}) == key({"a": 1e-3})
    assert len({key({"a": value}) for value in (1, True, 1.1, "1", None, [1])}) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": b"x"}, object()])
def test_what_has_no_one_spelling_gets_no_key(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical({"a": value})


def test_a_run_goes_from_missing_through_running_to_done_with_digests(tmp_path: Path) -> None:
    run = Run(tmp_path / "rl" / "ppo-hh-nano-s1-0123456789")
    assert (run.key, run.label, run.stage) == ("0123456789", "ppo-hh-nano-s1", "rl")
    assert run.status() == "missing"
    with run.lock():
        assert run.begin("seed: 1\n", {"key": run.key}) == 1
        assert run.status() == "running"
        run.update(data={"digest": "d"})
        run.final.mkdir()
        (run.final / "model.bin").write_bytes(b"abc")
        run.metrics_path.write_text('{"step": 0}\n')
        run.finish(score=1.5)
    manifest = run.manifest()
    assert run.status() == "done" and run.config_path.read_text() == "seed: 1\n"
    assert manifest["data"] == {"digest": "d"} and manifest["score"] == 1.5
    assert list(manifest["outputs"]) == ["metrics.jsonl", "checkpoints/final/model.bin"]
    # sha256("abc"), from FIPS 180-2
    assert manifest["outputs"]["checkpoints/final/model.bin"].startswith("ba7816bf8f01cfea")


def test_a_second_beginning_is_segment_2_and_keeps_when_the_run_started(tmp_path: Path) -> None:
    run = Run(tmp_path / "rl" / "x-1")
    run.begin("", {"started": "ignored"})
    run.update(started="2020-01-01T00:00:00+00:00")
    assert run.status() == "interrupted"
    run.fail("out of memory")
    assert run.status() == "failed" and run.manifest()["reason"] == "out of memory"
    assert run.begin("", {}) == 2
    assert run.manifest()["started"] == "2020-01-01T00:00:00+00:00"
    assert "reason" not in run.manifest()


@pytest.mark.parametrize("text", ["", '{"status": "do', "[1]", '{"key": "x"}'])
def test_a_damaged_manifest_is_named_with_its_fix(tmp_path: Path, text: str) -> None:
    run = Run(tmp_path / "rl" / "x-1")
    run.begin("", {})
    run.manifest_path.write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is damaged.*delete .*x-1"):
        run.status()


HOLD = """
import sys
from pathlib import Path
from rlhf_cli.store.run import Run
run = Run(Path(sys.argv[1]))
with run.lock():
    run.begin("", {})
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run: Run, root: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of `run` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    process = subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_killed_owner_leaves_an_interrupted_run_and_a_free_lock(
    tmp_path: Path, root: Path
) -> None:
    run = Run(tmp_path / "rl" / "x-1")
    owner = holder(run, root)
    assert run.status() == "running"
    owner.kill()
    owner.communicate()
    assert run.status() == "interrupted"
    with run.lock(on_wait=lambda holder: pytest.fail("the lock of a dead process is still held")):
        assert run.status() == "running"


def test_a_second_builder_says_once_that_it_waits_and_then_gets_its_turn(
    tmp_path: Path, root: Path
) -> None:
    run = Run(tmp_path / "rl" / "x-1")
    owner = holder(run, root)
    said = []

    def let_go(holder: str) -> None:
        said.append(holder)
        assert owner.stdin is not None
        owner.stdin.close()

    with run.lock(on_wait=let_go):
        assert owner.wait(timeout=10) == 0
    ((who, since),) = (each.split(", since ") for each in said)
    assert who == f"process {owner.pid} on {socket.gethostname()}"
    began = datetime.fromisoformat(since.rstrip(","))
    assert abs(datetime.now(timezone.utc) - began) < timedelta(minutes=5)
    assert not list((tmp_path / ".locks").glob("*.holder"))
    assert owner.stdout is not None
    owner.stdout.close()


def test_a_beginning_removes_what_a_killed_segment_was_writing(tmp_path: Path) -> None:
    run = Run(tmp_path / "sft" / "x-0123456789")
    run.begin("seed: 1\n", {})
    (run.checkpoints / "000008").mkdir()
    (run.checkpoints / ".000009.partial").mkdir()
    (run.checkpoints / ".000009.partial" / "state.safetensors").write_bytes(b"half")
    (run.samples / ".000009.jsonl.17.tmp").touch()
    run.begin("seed: 1\n", {})
    assert [path.name for path in run.checkpoints.iterdir()] == ["000008"]
    assert list(run.path.rglob(".*")) == []


def test_runs_are_found_by_path_name_key_or_beginning(tmp_path: Path) -> None:
    one = a_run(tmp_path, "ppo", seed=1)
    two = a_run(tmp_path, "ppo", seed=2)
    (tmp_path / "rl" / "notes").mkdir()
    assert all_runs(tmp_path) == sorted([one, two], key=lambda run: run.path)
    assert all_runs(tmp_path / "nowhere") == []
    for reference in (
        str(one.path),
        one.path.name,
        one.key,
        one.key[:6],
        "ppo-hh_embedded-nano-s1",
    ):
        assert find(tmp_path, reference) == one


def test_an_ambiguous_or_unknown_reference_is_refused_by_name(tmp_path: Path) -> None:
    names = [a_run(tmp_path, "ppo", seed=seed).path.name for seed in (1, 2)]
    with pytest.raises(UserError) as ambiguous:
        find(tmp_path, "ppo")
    assert all(name in str(ambiguous.value) for name in names)
    for reference in ("p3o", "", "nano"):
        with pytest.raises(UserError, match=r"no run in .* is called"):
            find(tmp_path, reference)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_a_disk_that_refuses_half_way_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    atomic_write(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=said):
        atomic_write(tmp_path / "file", b"new, and longer")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_errors_than_the_disks_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk(tmp_path):
        (tmp_path / "missing").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_met_while_metrics_are_written_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"cannot write /dev/full: the disk is full"):
        Ledger(Path("/dev/full")).write({"step": 1})


def test_a_runs_folder_is_made_and_left_empty_by_the_check(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


def test_a_file_in_the_way_and_a_nearly_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(UserError, match=r"cannot write .*paths\.runs=DIR"):
            check_writable(place)
    usage = shutil.disk_usage(tmp_path)._replace(free=files.LEAST_FREE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 49 MB of disk left, a run needs at least 50 MB"):
        check_writable(tmp_path)


def test_rows_come_back_as_written_and_nan_goes_through_null(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "metrics.jsonl")
    ledger.write({"step": 1, "eval/kl": 0.1, "train/loss": math.inf})
    assert ledger.path.read_text() == '{"step": 1, "eval/kl": 0.1, "train/loss": null}\n'
    (row,) = read(ledger.path)
    assert row["eval/kl"] == 0.1 and math.isnan(row["train/loss"])
    assert read(tmp_path / "missing") == []


def test_a_rewind_to_step_2_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "metrics.jsonl")
    ledger.rewind(5)
    assert not ledger.path.exists()
    for step in (1, 2, 2, 3):
        ledger.write({"step": step, "train/loss": math.nan})
    with ledger.path.open("a") as file:
        file.write('{"step": 4, "train/l')
    assert [row["step"] for row in read(ledger.path)] == [1, 2, 2, 3]
    ledger.rewind(2)
    ledger.write({"step": 3})
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 2, 3]
    assert lines[0]["train/loss"] is None and "train/loss" not in lines[3]
    ledger.rewind(-1)
    assert ledger.path.read_text() == ""


def test_a_broken_line_that_is_not_the_last_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for text in ('{"step": 1}\n{"st\n{"step": 3}\n', '{"step": 1}\n7\n'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a row of metrics"):
            read(path)


def test_a_name_outside_the_vocabulary_is_a_defect_except_an_algorithms_own(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "metrics.jsonl")
    for name in ("eval/k1", "loss", "train/", "train/A b", "perf/speed"):
        with pytest.raises(ValueError, match="vocabulary"):
            ledger.write({"step": 1, name: 0.0})
    with pytest.raises(ValueError, match="needs a step"):
        ledger.write({"eval/kl": 0.0})
    assert not ledger.path.exists()
    ledger.write({"step": 1, "train/my_entropy": 0.5})
    assert describe("train/my_entropy").meaning == "watched by the algorithm"


def test_every_word_of_the_vocabulary_has_a_unit_and_a_meaning() -> None:
    assert all(metric.unit and metric.meaning for metric in VOCABULARY.values())
    promised = "step episodes wall eval/kl eval/kl_se eval/kl_k3 eval/reward eval/reward_se"
    promised += " eval/gold eval/gold_se eval/length eval/eos_rate train/loss train/kl train/reward"
    promised += " train/clip_fraction train/grad_norm perf/step_seconds"
    promised += " perf/generated_tokens_per_second"
    assert set(promised.split()) <= set(VOCABULARY)


def test_provenance_names_the_interpreter_and_the_packages() -> None:
    where = provenance()
    assert where["machine"]["python"] == sys.version.split()[0]
    assert {"torch", "numpy", "scipy"} <= set(where["versions"])
    assert where["commit"] is None or len(where["commit"]) == 40
    assert json.loads(json.dumps(where)) == where
