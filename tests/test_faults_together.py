"""Two commands at one time: what both need is built once, and whoever waits goes on when the other is gone.

A process that is stopped (SIGSTOP) in the middle of its work holds its lock for as long as a test wants.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from rlhf_cli.store.run import Run, all_runs
from tests.test_chain import TINY

SFT = ["train", *TINY, "track=off", "stage=sft", "sft.epochs=4"]
WEIGHTS = "checkpoints/final/model.safetensors"
Begin = Callable[..., BaseProcess]
pytestmark = pytest.mark.faults


def command(words: list[str], folder: Path, said: Path) -> None:
    """`rlhf WORDS` in a folder."""
    from rlhf_cli.cli import main

    os.chdir(folder)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main(words)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Gives a command in a process of its own; what it says goes to a file named by its number."""
    context = multiprocessing.get_context("forkserver")
    # The libraries are loaded once, for all of them.
    context.set_forkserver_preload(["rlhf_cli.launch", "rlhf_cli.worker", "rlhf_cli.stages.rl"])
    children: list[BaseProcess] = []

    def start(*words: str) -> BaseProcess:
        said = tmp_path / f"said-{len(children)}"
        children.append(context.Process(target=command, args=(list(words), tmp_path, said)))
        children[-1].start()
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.join()


def ended(child: BaseProcess) -> int | None:
    """Its exit code, None if it does not end in time."""
    child.join(200)
    return child.exitcode


def wait_for(what: Callable[[], object], seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def said(folder: Path, number: int) -> str:
    file = folder / f"said-{number}"
    return file.read_text() if file.exists() else ""


def held_by(folder: Path, child: BaseProcess) -> bool:
    """Whether it is at work on the one run there is."""
    files = (folder / "runs" / ".locks").glob("*.holder")
    return any(file.read_text().startswith(f"process {child.pid} on ") for file in files)


def one(folder: Path) -> Run:
    (run,) = all_runs(folder / "runs")
    return run


def caught_at_work(folder: Path, begin: Begin) -> tuple[BaseProcess, Run]:
    """A command that was stopped with its lock held, its first checkpoint made."""
    child = begin(*SFT, "checkpoint.every=4")
    wait_for(lambda: list((folder / "runs").glob("sft/*/checkpoints/000004")))
    os.kill(child.pid or 0, signal.SIGSTOP)
    assert held_by(folder, child)
    return child, one(folder)


def test_of_two_equal_commands_one_builds_and_the_other_says_for_whom_it_waits(
    tmp_path: Path, begin: Begin, fault: Callable[..., None]
) -> None:
    first, run = caught_at_work(tmp_path, begin)
    second = begin(*SFT)
    wait_for(lambda: "waiting for" in said(tmp_path, 1))
    (line,) = (each for each in said(tmp_path, 1).splitlines() if "waiting for" in each)
    who = f"waiting for process {first.pid} on {socket.gethostname()}, since 20"
    assert line.startswith(who) and line.endswith(f", that builds runs/sft/{run.path.name}")
    os.kill(first.pid or 0, signal.SIGCONT)
    assert (ended(first), ended(second)) == (0, 0), said(tmp_path, 0) + said(tmp_path, 1)
    assert run.status() == "done" and run.manifest()["segment"] == 1
    assert not list((tmp_path / "runs" / ".locks").glob("*.holder"))
    fault(
        "the same command is given twice at once",
        "one builds, the other says for whom it waits; both end with code 0",
    )
    # The twin of the next test, which kills the first.
    begun = run.manifest()["outputs"][WEIGHTS]
    shutil.rmtree(tmp_path / "runs")
    killed, again = caught_at_work(tmp_path, begin)
    other = begin(*SFT)
    wait_for(lambda: f"waiting for process {killed.pid}" in said(tmp_path, 3))
    killed.kill()
    assert ended(other) == 0, said(tmp_path, 3)
    assert again.status() == "done" and again.manifest()["segment"] == 2
    assert again.manifest()["outputs"][WEIGHTS] == begun
    fault(
        "one of two equal commands is killed (SIGKILL) while the other waits",
        "the other goes on from the last checkpoint and ends like the twin",
        lost="the steps since the last checkpoint",
    )


def test_two_sweeps_at_once_build_the_runs_they_share_once(
    tmp_path: Path, begin: Begin, fault: Callable[..., None]
) -> None:
    rest = [*TINY, "track=off", "seed=1,2"]
    both = [begin("train", "-m", f"algo={name}", *rest) for name in ("ppo", "p3o_v2")]
    assert [ended(child) for child in both] == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    runs = all_runs(tmp_path / "runs")
    assert sorted(run.stage for run in runs) == ["reward", "rl", "rl", "rl", "rl", "sft"]
    assert {(run.status(), run.manifest()["segment"]) for run in runs} == {("done", 1)}
    fault("two sweeps that share an SFT policy and a reward model start at once", "each built once")
