"""scripts/slurm.sh under a scheduler that is not there: its commands are stubs that note their calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_chain import rlhf
from tests.test_stopping import (
    LONG,
    copied,
    goes_on_like_its_twin,
    parents,
    steps,
    the_run,
    wait_for,
)

__all__ = ["parents"]  # a fixture, asked for by name

SCRIPT = ROOT / "scripts" / "slurm.sh"


class Job:
    """A job of SLURM: the script, started as sbatch would start it."""

    def __init__(self, folder: Path, *words: str, number: str = "4711") -> None:
        self.calls = folder / "calls.txt"
        stubs = folder / "stubs"
        stubs.mkdir(exist_ok=True)
        for name in ("scontrol", "srun"):
            (stubs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.calls}"\n')
            (stubs / name).chmod(0o755)
        # Only what the job is given: sbatch copies the script to a folder of its own.
        spooled = shutil.copy(SCRIPT, folder / "slurm_script")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        environment |= {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": number}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "RLHF_RUNS"):
            environment.pop(name, None)
        self.shell = subprocess.Popen(
            ["bash", str(spooled), *words],
            cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def ended(self) -> tuple[int, str, list[str]]:
        """Exit code, what was said, and what the scheduler was asked to do."""
        _, said = self.shell.communicate(timeout=90)
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return self.shell.returncode, said, calls


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Begins jobs in a folder of their own; none of them outlives the test."""
    jobs: list[Job] = []

    def begin(*words: str, **more: str) -> Job:
        jobs.append(Job(tmp_path, *words, **more))
        return jobs[-1]

    yield begin
    for each in jobs:
        with suppress(ProcessLookupError):
            os.killpg(each.shell.pid, signal.SIGKILL)


HEARD = "echo begun > begun; trap 'exit %d' %s; while :; do sleep 0.05; done"
"""A command that ends with a code when it is sent a signal."""


def test_the_directives_ask_for_a_signal_ahead_of_the_limit_and_a_log_that_goes_on() -> None:
    lines = SCRIPT.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line.split(" ", 1)[1] for line in lines[:first_command] if "#SBATCH" in line[:7]]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append", "--nodes=1"} <= {*directives}
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_the_code_of_a_command_that_ended_is_the_jobs(job: Callable[..., Job], code: int) -> None:
    assert job("bash", "-c", f"exit {code}").ended() == (code, "", [])


def test_words_reach_the_command_as_they_were_given(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    job("touch", "one file", "a=[1,2]", "*").ended()
    assert {"one file", "a=[1,2]", "*"} <= {path.name for path in tmp_path.iterdir()}


def test_without_a_command_there_is_no_job(job: Callable[..., Job]) -> None:
    code, said, calls = job().ended()
    assert (code, calls) == (2, []) and said.startswith("usage: sbatch ")


def test_code_75_puts_the_job_back_into_the_queue_whoever_asked(job: Callable[..., Job]) -> None:
    code, said, calls = job("bash", "-c", "exit 75").ended()
    assert (code, calls) == (75, ["scontrol requeue 4711"])
    assert said == "job 4711 goes back into the queue (code 75)\n"
    assert job("bash", "-c", "exit 75", number="").ended()[2] == calls  # no job, no further call


@pytest.mark.parametrize(
    ("sign", "code", "requeued"),
    [
        (signal.SIGUSR1, 75, True),  # the limit
        (signal.SIGTERM, 75, False),  # somebody cancels the job
        (signal.SIGUSR1, 0, False),  # it was at its end
        (signal.SIGUSR1, 1, False),
    ],
)
def test_a_signal_is_passed_on_and_only_the_limit_is_followed_by_another_turn(
    job: Callable[..., Job], tmp_path: Path, sign: signal.Signals, code: int, requeued: bool
) -> None:
    begun = job("bash", "-c", HEARD % (code, sign.name[3:]))
    wait_for((tmp_path / "begun").exists)
    begun.shell.send_signal(sign)
    assert begun.ended()[::2] == (code, ["scontrol requeue 4711"] if requeued else [])


def test_a_command_that_the_limit_meets_before_it_listens_has_another_turn_too(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    begun = job("bash", "-c", "echo > begun; exec sleep 60")
    wait_for((tmp_path / "begun").exists)
    begun.shell.send_signal(signal.SIGUSR1)
    assert begun.ended()[::2] == (128 + signal.SIGUSR1, ["scontrol requeue 4711"])


def test_a_second_signal_is_passed_on_as_the_first_was(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    twice = "echo > begun; n=0; trap 'n=$((n+1)); echo > heard$n; [ $n = 2 ] && exit 75' USR1"
    begun = job("bash", "-c", f"{twice}; while :; do sleep 0.05; done")
    for sign in ("begun", "heard1"):
        wait_for((tmp_path / sign).exists)
        begun.shell.send_signal(signal.SIGUSR1)
    assert begun.ended()[::2] == (75, ["scontrol requeue 4711"])


@pytest.mark.faults
def test_a_run_that_the_limit_stops_is_put_back_and_its_second_turn_ends_it(
    parents: Path,
    tmp_path: Path,
    job: Callable[..., Job],
    fault: Callable[..., None],
) -> None:
    folder = copied(parents, tmp_path)
    words = (sys.executable, "-m", "rlhf_cli", "train", *LONG)
    first = job(*words)
    wait_for(lambda: len(steps(folder)) > 3)
    first.shell.send_signal(signal.SIGUSR1)
    code, said, calls = first.ended()
    run = the_run(folder)
    assert (code, calls, run.status()) == (75, ["scontrol requeue 4711"], "interrupted")
    assert "was stopped by SIGUSR1 after step" in said
    assert job(*words).ended()[0] == 0
    assert calls == ["scontrol requeue 4711"]  # and no second time
    assert run.status() == "done" and run.manifest()["segment"] == 2
    goes_on_like_its_twin(folder, parents)  # which finds it done
    assert rlhf(folder, "resume", run.key).stdout == f"finished: runs/rl/{run.path.name}\n"
    fault(
        "the time limit of a SLURM job, announced by SIGUSR1 to the job's script",
        "the run stops after its step with code 75, the job is queued again, and its second turn ends as"
        " an undisturbed run does",
    )
