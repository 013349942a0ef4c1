"""Processes that stand still or vanish: who is to blame, and how soon the job ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_cli.engine import pulse
from rlhf_cli.engine.pulse import Life
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import TINY, rlhf

WORDS = [*TINY, "algo=ppo", "track=off", "algo.update.episodes=480", "eval.points=3"]
TWO = ["launch=deepspeed", "launch.processes=2", "launch.timeout=10"]
SLEEPY = """
import os, time
asked = 0
def score(prompts, responses):
    global asked
    asked += 1
    if asked > 8 and os.environ.get("RANK") == "1":
        time.sleep(1000)
    return [0.0] * len(prompts)
"""


@pytest.mark.parametrize(
    "found, said",
    [
        (
            {0: Life(8, "all_reduce (rl.py:9)", True), 1: Life(8, "score (mine.py:7)")},
            "rank 1 made no progress for 10 s after step 8, in score (mine.py:7)",
        ),
        (
            {0: Life(8, "_step (rl.py:9)", True), 1: Life(7)},
            "rank 1 gave no sign for 10 s after step 7 and is not to be asked (stopped, or cut off); rank 0"
            " waited for it in _step (rl.py:9)",
        ),
        (
            {0: Life(8, ended="RuntimeError: Connection closed by peer"), 1: Life(8)},
            "rank 1 was killed after step 8, from outside or by the system for want of memory (then"
            " launch.micro_batch must be lower)",
        ),
        (
            {
                0: Life(3, ended="ValueError: 7"),
                1: Life(3, ended="RuntimeError: Connection closed"),
            },
            "rank 0 ended after step 3 with ValueError: 7",
        ),
        ({0: Life(9, finished=True)}, "not all processes came to their work"),
        (
            {0: Life(9, finished=True), 1: Life(8)},
            "rank 1 was killed after step 8, from outside or by the system for want of memory (then"
            " launch.micro_batch must be lower)",
        ),
        ({}, "not all processes came to their work"),
    ],
)
def test_a_verdict_names_the_rank_its_last_step_and_where_it_was(
    found: dict[int, Life], said: str
) -> None:
    assert pulse.verdict(found, 10) == said


def test_what_processes_leave_is_read_back_and_forgotten(tmp_path: Path) -> None:
    with pytest.raises(ValueError), pulse.watched(tmp_path, 1, 60, alone=False):
        pulse.beat(12)
        raise ValueError("seven\nand more")
    assert pulse.lives(tmp_path) == {1: Life(12, ended="ValueError: seven")}
    with pulse.watched(tmp_path, 0, 60, alone=False):
        pulse.beat(3)
    assert pulse.lives(tmp_path)[0] == Life(3, finished=True)
    pulse.forget(tmp_path)
    assert pulse.lives(tmp_path) == {}


STILL = """
import sys, time
from pathlib import Path
from rlhf_cli.engine import pulse
def slow(): time.sleep(60)
with pulse.watched(Path(sys.argv[1]), 0, 1.0, alone=True):
    if sys.argv[2] == "rests":
        pulse.rest(); time.sleep(2.5); print("rested")
    else:
        pulse.beat(4); slow()
"""


def still(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STILL, str(folder), how], capture_output=True, text=True, timeout=60
    )


def test_a_process_alone_that_stands_still_says_where_and_ends(tmp_path: Path) -> None:
    done = still(tmp_path, "stands")
    assert done.returncode == 1
    assert (
        "error: rank 0 made no progress for 1 s after step 4, in slow (<string>:5); stack: "
        in done.stderr
    )
    assert "slow" in (tmp_path / "rank_0.stack").read_text()


def test_work_that_may_take_long_is_not_hurried(tmp_path: Path) -> None:
    done = still(tmp_path, "rests")
    assert (done.returncode, done.stdout) == (0, "rested\n")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT policy and the reward model."""
    folder = tmp_path_factory.mktemp("pulse")
    done = rlhf(folder, "train", *WORDS, "stage=reward")
    assert done.returncode == 0, done.stderr
    return folder


def begun(parents: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    shutil.copytree(parents / "runs", folder / "runs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "RLHF_RUNS"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", "train", *WORDS, *TWO, *words],
        cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def family(child: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(child.pid).children(recursive=True)


@pytest.mark.faults
def test_a_rank_that_is_stopped_ends_the_job_within_the_time_allowed(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    child = begun(parents, tmp_path)
    run = None
    until = time.monotonic() + 120
    while run is None or len(read(run.metrics_path)) < 3:
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.1)
        found = [*(tmp_path / "runs").glob("rl/*/metrics.jsonl")]
        run = Run(found[0].parent) if found else None
    everybody = family(child)
    ranks = [each for each in everybody if each.cmdline()[-3:-1] == ["-m", "rlhf_cli.worker"]]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, said = child.communicate(timeout=120)
    spent = time.monotonic() - began
    assert child.returncode == 1
    assert "gave no sign for 10 s after step" in said and "give the same command again" in said
    assert not [each for each in everybody if each.is_running()]
    assert spent < 60  # 10 s of patience, 5 s between two looks, 5 s for words, the launchers' own
    fault(
        "one of two ranks is stopped (SIGSTOP)",
        "the job ends after launch.timeout, the rank named, exit 1",
        "the steps since the last checkpoint",
    )


@pytest.mark.faults
def test_a_rank_that_hangs_is_named_with_its_last_step_and_its_stack(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    source = "source: {kind: function, call: sleepy.score, batch: 128}"
    parts = f"[{{weight: 1, source: {{kind: learned}}}}, {{weight: 1, {source}}}]"
    words = ("reward=mix", f"reward.source.parts={parts}")
    child = begun(parents, tmp_path, *words)
    _, said = child.communicate(timeout=240)
    assert child.returncode == 1, said
    assert (
        "rank 1 made no progress for 10 s after step" in said and "in score (sleepy.py:8)" in said
    )
    (stack,) = (tmp_path / "runs").glob("rl/*/log/rank_1.stack")
    assert "sleepy.py" in stack.read_text()
    fault(
        "a rank hangs in a reward function",
        "the job ends after launch.timeout with rank, step and stack, exit 1",
        "the steps since the last checkpoint",
    )
