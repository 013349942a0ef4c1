"""Runs that are stopped or killed, by the real signals, in one process and through DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_cli.engine import checkpoint
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run, all_runs
from tests.test_chain import TINY, exit_code, rlhf

LONG = [*TINY, "algo=ppo", "track=off", "algo.update.episodes=480", "eval.points=3"]
"""30 rollouts of 16 responses, 60 steps: long enough to be hit on the way."""
TWO = ["launch=deepspeed", "launch.processes=2"]
TIMED = ("perf/", "wall", "segment", "budget/seconds")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run store with the SFT policy and the reward model, and the undisturbed twin."""
    folder = tmp_path_factory.mktemp("stopping")
    done = rlhf(folder, "train", *LONG)
    assert done.returncode == 0, done.stderr
    return folder


def copied(parents: Path, folder: Path) -> Path:
    """The store without the RL run."""
    import shutil

    shutil.copytree(parents / "runs", folder / "runs", ignore=lambda at, names: {"rl"} & {*names})
    return folder


def begun(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "RLHF_RUNS"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", "train", *LONG, *words],
        cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(what: Callable[[], object], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def the_run(folder: Path) -> Run:
    (path,) = (folder / "runs" / "rl").iterdir()
    return Run(path)


def steps(folder: Path) -> list[float]:
    try:
        return [row["step"] for row in read(the_run(folder).metrics_path)]
    except (FileNotFoundError, ValueError):
        return []


@pytest.fixture
def started(
    parents: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[Path, subprocess.Popen[str]]]]:
    """Begins the run in a store of its own and waits until it has learned for some steps."""
    children: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[Path, subprocess.Popen[str]]:
        folder = copied(parents, tmp_path)
        children.append(begun(folder, *words))
        wait_for(lambda: len(steps(folder)) > 3)
        return folder, children[-1]

    yield start
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def goes_on_like_its_twin(folder: Path, parents: Path, *words: str, exact: bool = True) -> None:
    """The same command ends it, and weights and metrics are those of the run that nobody disturbed."""
    done = rlhf(folder, "train", *LONG, *words)
    assert done.returncode == 0, done.stderr
    run, twin = the_run(folder), the_run(parents)
    assert run.status() == "done" and run.manifest()["segment"] > 1
    ours, theirs = read(run.metrics_path), read(twin.metrics_path)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    if exact:
        weights = "checkpoints/final/model.safetensors"
        assert run.manifest()["outputs"][weights] == twin.manifest()["outputs"][weights]
        for one, other in zip(ours, theirs, strict=True):
            assert {k: v for k, v in one.items() if not k.startswith(TIMED)} == {
                k: v for k, v in other.items() if not k.startswith(TIMED)
            }


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_a_run_between_two_steps_and_the_same_command_goes_on(
    started: Callable[..., tuple[Path, subprocess.Popen[str]]],
    parents: Path,
    sign: signal.Signals,
    fault: Callable[..., None],
) -> None:
    folder, child = started()
    child.send_signal(sign)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 75
    run = the_run(folder)
    assert run.status() == "interrupted"
    reached = int(steps(folder)[-1])
    assert f"{sign.name}: stopping after this step; again to leave at once" in said
    assert said.splitlines()[-1] == (
        f"stopped: runs/rl/{run.path.name} was stopped by {sign.name} after step {reached} of 60; give the"
        " same command again to go on from there."
    )
    assert [path.name for path in sorted(run.checkpoints.iterdir())][-1] == f"{reached:06d}"
    if sign is signal.SIGTERM:  # the others leave the same behind
        goes_on_like_its_twin(folder, parents)
    fault(
        f"{sign.name} to a run in one process",
        "stops between two steps with a checkpoint, a sentence and exit code 75",
        lost="0 steps",
    )


@pytest.mark.faults
def test_two_launched_processes_stop_at_one_step_and_leave_nobody_behind(
    started: Callable[..., tuple[Path, subprocess.Popen[str]]],
    parents: Path,
    fault: Callable[..., None],
) -> None:
    folder, child = started(*TWO)
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 3  # the launchers and the two
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=90)
    assert child.returncode == 75 and "was stopped by its launcher after step" in said
    assert not [each for each in workers if each.is_running()]
    goes_on_like_its_twin(folder, parents, *TWO, exact=False)
    fault(
        "SIGTERM to a run in two launched processes",
        "both stop after the same step, exit code 75; no process is left; the same command ends the run",
        lost="0 steps",
    )


def test_a_signal_after_the_last_step_of_a_run_stops_those_that_were_to_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    save = checkpoint.save_final

    def interrupted(*words: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(*words)

    monkeypatch.setattr(checkpoint, "save_final", interrupted)
    words = ["train", *TINY, "track=off", f"paths.runs={tmp_path}"]
    assert exit_code(*words) == 75
    (sft,) = all_runs(tmp_path)
    assert sft.stage == "sft" and sft.status() == "done"
    monkeypatch.undo()
    assert exit_code(*words) == 0
    assert len(all_runs(tmp_path)) == 3 and sft.manifest()["segment"] == 1
    fault(
        "SIGTERM while a run writes its finished model",
        "the run is finished, those that were to follow are not begun, exit code 75",
        lost="0 steps",
    )


def test_a_second_signal_is_obeyed_at_once(
    started: Callable[..., tuple[Path, subprocess.Popen[str]]], fault: Callable[..., None]
) -> None:
    folder, child = started()
    os.kill(child.pid, signal.SIGSTOP)  # so that both are there before it looks
    child.send_signal(signal.SIGTERM)
    os.kill(child.pid, signal.SIGCONT)
    wait_for(lambda: child.poll() is not None or child.send_signal(signal.SIGTERM) is not None, 30)
    assert child.returncode in (-signal.SIGTERM, 75)
    assert the_run(folder).status() == "interrupted"
    fault(
        "SIGTERM twice",
        "the second is obeyed at once; the run counts as interrupted",
        lost="the steps since the last checkpoint",
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="one process"),
        pytest.param(TWO, id="two launched", marks=pytest.mark.faults),
    ],
)
def test_a_driver_that_is_killed_leaves_no_worker_no_lock_and_no_finished_run(
    started: Callable[..., tuple[Path, subprocess.Popen[str]]],
    parents: Path,
    words: list[str],
    fault: Callable[..., None],
) -> None:
    folder, child = started("checkpoint.every=4", *words)
    workers = psutil.Process(child.pid).children(recursive=True)
    reached = steps(folder)[-1]
    child.kill()
    child.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    run = the_run(folder)
    assert run.status() == "interrupted"
    newest = max(int(path.name) for path in run.checkpoints.iterdir() if path.name[0] != ".")
    assert reached - newest <= 4
    goes_on_like_its_twin(folder, parents, *words, exact=not words)
    fault(
        f"SIGKILL to the command, {'two launched processes' if words else 'one process'}",
        "no process and no lock is left, and no finished run; the same command ends it",
        lost="at most 4 steps, with checkpoint.every=4",
    )


@pytest.mark.faults
def test_a_launcher_that_is_killed_at_its_start_is_no_finished_run(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    """DeepSpeed's runner ends with 0 when the launcher that it started is killed."""
    folder = copied(parents, tmp_path)
    child = begun(folder, *TWO)

    def launchers() -> list[psutil.Process]:
        found = []
        for each in psutil.Process(child.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                found += [each] if "deepspeed.launcher.launch" in each.cmdline() else []
        return found

    wait_for(launchers)
    launchers()[0].kill()
    _, said = child.communicate(timeout=90)
    assert child.returncode == 1 and "give the same command again" in said
    assert the_run(folder).status() == "failed"
    goes_on_like_its_twin(folder, parents, *TWO, exact=False)
    fault(
        "SIGKILL to DeepSpeed's launcher, which then ends with code 0",
        "exit code 1; the run is not taken for finished, the same command ends it",
        "the steps since the last checkpoint",
    )


@pytest.mark.faults
def test_one_rank_that_is_killed_ends_the_run_with_the_log_and_the_way_on(
    started: Callable[..., tuple[Path, subprocess.Popen[str]]],
    parents: Path,
    fault: Callable[..., None],
) -> None:
    folder, child = started(*TWO)
    everybody = psutil.Process(child.pid).children(recursive=True)
    ranks = [each for each in everybody if each.cmdline()[-3:-1] == ["-m", "rlhf_cli.worker"]]
    assert len(ranks) == 2
    ranks[1].kill()
    _, said = child.communicate(timeout=90)
    assert child.returncode == 1
    assert "rank 1 was killed after step" in said and "give the same command again" in said
    assert not [each for each in everybody if each.is_running()]
    goes_on_like_its_twin(folder, parents, *TWO, exact=False)
    fault(
        "SIGKILL to one of two processes",
        "the other and the launchers end; exit code 1 with a sentence; the same command ends the run",
        lost="the steps since the last checkpoint",
    )


def test_a_command_whose_time_is_up_stops_and_goes_on_when_given_again(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    folder = copied(parents, tmp_path)
    first = rlhf(
        folder, "train", *LONG, "train.max_hours=0.0001"
    )  # less than the libraries take to load
    assert first.returncode == 75, first.stderr
    assert "was stopped by train.max_hours after step 0 of 60" in first.stderr
    goes_on_like_its_twin(folder, parents)
    fault(
        "train.max_hours is over",
        "stops between two steps, exit code 75; the same command ends the run like its twin",
        lost="0 steps",
    )
