"""The soak finds what a fault may leave behind, and a real one in miniature finds nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run
from scripts import chaos
from tests.test_chain import TINY

NAME = "rl/ppo-hh-s1-0123456789"


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """A sweep's folder with one finished run in it."""
    folder = tmp_path / "twins"
    run = Run(folder / "runs" / NAME)
    run.begin("seed: 1\n", {"key": run.key, "stage": "rl"})
    ledger = Ledger(run.metrics_path)
    for step in (0, 2, 4):
        ledger.write({"step": step, "wall": 1.5 * step, "segment": 1, "eval/kl": step / 10})
    run.keep_samples(4, [{"prompt": "a", "response": "b"}])
    run.final.mkdir()
    (run.final / "model.safetensors").write_bytes(b"weights")
    run.finish()
    return folder


@pytest.fixture
def ours(twins: Path, tmp_path: Path) -> Path:
    """Another that is equal to it."""
    return shutil.copytree(twins, tmp_path / "ours")


def found(twins: Path, ours: Path) -> list[str]:
    return [*chaos.differences(twins / "runs", ours / "runs"), *chaos.leavings(ours)]


def rewritten(run: Run, change: Callable[[list[dict[str, float]]], object]) -> None:
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    change(rows)
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_equal_runs_differ_in_their_times_and_segments_alone(twins: Path, ours: Path) -> None:
    rewritten(Run(ours / "runs" / NAME), lambda rows: rows[2].update(wall=99.0, segment=7))
    assert found(twins, ours) == []


def other_number(run: Run) -> None:
    rewritten(run, lambda rows: rows[1].update({"eval/kl": 0.2000001}))


def row_lost(run: Run) -> None:
    rewritten(run, lambda rows: rows.pop(1))


def row_twice(run: Run) -> None:
    rewritten(run, lambda rows: rows.append(rows[-1]))


def other_sample(run: Run) -> None:
    (run.samples / "000004.jsonl").write_text('{"prompt": "a", "response": "c"}\n')


def sample_lost(run: Run) -> None:
    (run.samples / "000004.jsonl").unlink()


def other_weights(run: Run) -> None:
    (run.final / "model.safetensors").write_bytes(b"weighty")
    run.finish()


def not_done(run: Run) -> None:
    run.update(status="running")


def other_report(run: Run) -> None:
    run.report_path.write_text("{}")
    run.finish()


def run_lost(run: Run) -> None:
    shutil.rmtree(run.path)


def half_a_file(run: Run) -> None:
    (run.path / ".manifest.json.17.tmp").touch()


def checkpoint_left(run: Run) -> None:
    (run.checkpoints / "000004").mkdir()


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (other_number, f"{NAME}: other metrics from step 2 on"),
        (row_lost, f"{NAME}: steps of the metrics are missing or there twice"),
        (row_twice, f"{NAME}: steps of the metrics are missing or there twice"),
        (other_sample, f"{NAME}: samples/000004.jsonl differs"),
        (sample_lost, f"{NAME}: samples/000004.jsonl differs"),
        (other_weights, f"{NAME}: checkpoints/final/model.safetensors differs"),
        (other_report, f"{NAME}: report.json differs"),
        (not_done, f"{NAME}: is interrupted, not done"),
        (run_lost, f"{NAME} is there once only"),
        (half_a_file, f"runs/{NAME}/.manifest.json.17.tmp was left behind"),
        (checkpoint_left, f"{Path(NAME).name} has still 1 checkpoints to resume from"),
    ],
)
def test_a_planted_difference_is_found(
    plant: Callable[[Run], None], said: str, twins: Path, ours: Path
) -> None:
    plant(Run(ours / "runs" / NAME))
    assert found(twins, ours) == [said]


def test_a_lock_that_is_still_held_is_found(twins: Path, ours: Path) -> None:
    (ours / "runs" / ".locks").mkdir()
    lock = FileLock(ours / "runs" / ".locks" / "0123456789.lock")
    with lock:
        assert found(twins, ours) == ["runs/.locks/0123456789.lock is still held"]
    assert found(twins, ours) == []


@pytest.fixture
def orphan() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={**os.environ, chaos.MARK: "1 /soak 3"},
        start_new_session=True,
    )
    yield child
    child.kill()
    child.wait()


def test_a_process_that_is_left_alive_is_found_by_its_mark_and_ended(
    orphan: subprocess.Popen[bytes],
) -> None:
    assert chaos.left_alive("1 /soak 2", seconds=0) == []
    assert chaos.left_alive("1 /soak 3", seconds=0) == [
        f"process {orphan.pid} (-c import time; time.sleep(60)) was left alive"
    ]
    assert orphan.wait(10) == -9


def test_steps_are_lost_that_the_newest_segment_told_of_and_no_checkpoint_holds(
    twins: Path,
) -> None:
    run = Run(twins / "runs" / NAME)
    assert chaos.lost_steps(run) == 4
    (run.checkpoints / "000002").mkdir()
    assert chaos.lost_steps(run) == 2
    run.update(segment=2)  # which has told of none
    assert chaos.lost_steps(run) == 0


def test_the_page_tells_strikes_codes_lost_steps_and_the_command() -> None:
    strike = {"times": 3, "codes": {"-9": 3}, "lost_mean": 4 / 3, "lost_most": 4}
    summary = {
        "minutes": 30.1, "sweeps": {"one process": 4}, "starts": 60, "runs": 32,
        "strikes": {"SIGKILL to the command": strike}, "places": {"rl": 3},
        "problems": [], "command": "python scripts/chaos.py --minutes 30", "commit": "c0ffee0",
    }  # fmt: skip
    page = chaos.page(summary)
    assert "| SIGKILL to the command | 3 | -9: 3 | 1.33 | 4 |\n" in page
    assert (
        "30.1 minutes, 60 starts, 3 strikes; sweeps ended: 4 in one process; 32 runs compared with their"
        " undisturbed twins, 0 differences.\n"
    ) in page
    assert "Made by `python scripts/chaos.py --minutes 30` at commit c0ffee0.\n" in page
    assert "- weights\n" in chaos.page({**summary, "problems": ["weights"]})


@pytest.mark.faults
def test_a_sweep_that_is_struck_again_and_again_equals_its_twins(
    tmp_path: Path, fault: Callable[..., None]
) -> None:
    words = [*TINY, "checkpoint.every=4", "track=off"]
    soak = chaos.Soak(tmp_path, Console(quiet=True), random.Random(1))
    soak.soak([chaos.sweeps(["ppo"], words)[0]], minutes=0.3)
    assert soak.problems == []
    summary = soak.summary()
    assert summary["runs"] >= 3 and summary["starts"] > 2
    assert not list(tmp_path.glob("sweep*"))  # what is equal is not kept
    fault(
        "a sweep struck again and again, by kills, signals and pauses at random moments",
        "the same command ends it; every run equals its undisturbed twin, and nothing is left behind",
        lost=f"at most {chaos.MOST_LOST} steps a kill",
    )
