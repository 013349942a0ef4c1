"""Memory that does not suffice: smaller micro-batches with the same mathematics, or what to set."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli import worker
from rlhf_cli.config import compose
from rlhf_cli.config import read as read_config
from rlhf_cli.errors import OutOfMemory, UserError
from rlhf_cli.launch import execute
from rlhf_cli.plan import plan
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import TINY, rlhf

WORDS = [
    *TINY, "algo=rloo", "track=off", "algo.update.batch=1024", "algo.update.episodes=2048", "eval.points=1",
    "algo.update.minibatches=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT policy and the reward model."""
    folder = tmp_path_factory.mktemp("memory")
    done = rlhf(folder, "train", *WORDS, "stage=reward")
    assert done.returncode == 0, done.stderr
    return folder


def ran(
    parents: Path, folder: Path, *words: str, limit: int | None = None
) -> tuple[int, str, int, Run]:
    """Exit code, output, most bytes of address space at any look, and the run."""
    shutil.copytree(parents / "runs", folder / "runs")

    def bound() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", "train", *WORDS, *words],
        cwd=folder, env=environment, text=True, preexec_fn=bound,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    most = 0
    while child.poll() is None:
        most = max(most, _peak(child.pid))
        time.sleep(0.05)
    said, _ = child.communicate(timeout=240)
    (path,) = (folder / "runs" / "rl").iterdir()
    return child.returncode, said, most, Run(path)


def _peak(pid: int) -> int:
    """Most bytes of address space that the process has had so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak")), 0)


@pytest.mark.faults
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_numbers_stay(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    code, said, most, twin = ran(parents, small, "launch.micro_batch=16")
    assert code == 0, said
    code, said, _, run = ran(parents, large, "launch.micro_batch=1024", limit=most + 250 * 2**20)
    assert code == 0, said
    assert (
        "out of memory" in said
        and "going on from the last checkpoint with launch.micro_batch=512" in said
    )
    ours, theirs = read(run.metrics_path), read(twin.metrics_path)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "train/grad_norm", "eval/kl", "eval/reward"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-2, abs=1e-3), name
    fault("memory runs out", "micro-batch halved until it fits, same numbers; found before step 1")


def test_what_cannot_be_made_smaller_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    """Nothing below one row: tried from 8 down to 1, each time from the last checkpoint."""
    tried: list[int] = []

    def work(path: Path) -> None:
        tried.append(read_config(Run(path).config_path).launch.micro_batch)
        raise OutOfMemory("asked for 7 GB")

    monkeypatch.setattr(worker, "work", work)
    made = plan(
        compose([*WORDS, "launch.micro_batch=8", f"paths.runs={tmp_path / 'runs'}", "stage=sft"])
    )
    with pytest.raises(UserError) as refused:
        execute(made, "rlhf train")
    run = Run(made.steps[0].path)
    assert tried == [8, 4, 2, 1]
    assert str(refused.value) == (
        f"{run.path} does not fit into memory even with launch.micro_batch=1 (asked for 7 GB); set"
        " launch.checkpointing=true, shard it with launch=deepspeed launch.zero=3 over more processes, or"
        " lower data.max_response_tokens."
    )
    assert run.status() == "failed"
    fault("memory that holds no single row", "one sentence with what to set, exit 2")
