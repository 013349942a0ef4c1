"""A run that was stopped or killed and goes on equals one that was not, to the last bit.

What is equal is judged as the soak of scripts/chaos.py judges it. The runs are made by `resume_script.py` and
`kill_script.py`, all of them in one process or in two: loading the libraries takes longer than a run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.engine.world import free_port
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from scripts.chaos import unlike
from tests.algos.discovery import NAMES
from tests.resume_script import CASES, SHARDED, STAGES, VARIANTS
from tests.test_track import records

HERE = Path(__file__).parent
QUICK = ("sft", "reward", "copg-replay", "ppo-remembering")
"""Both stages on given rows; rollouts and numbers from before."""
ALONE = tuple(name for name in CASES if name not in SHARDED)
FAULTS = pytest.mark.faults
Found = tuple[Path, dict[str, list[Any]]]
"""The folder of a script, and what it says of it."""


def made(folder: Path, script: str, processes: int, words: tuple[str, ...]) -> Found:
    """Runs a script in so many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(HERE.parent)
    environment["TOKENIZERS_PARALLELISM"] = "false"  # kill_script.py forks
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    launcher = [
        "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes),
        "--master_port", str(free_port()), "--no_local_rank",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(HERE / script), folder, *words],
        env=environment, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return made(tmp_path_factory.mktemp("quick"), "resume_script.py", 1, QUICK)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return made(tmp_path_factory.mktemp("alone"), "resume_script.py", 1, ALONE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return made(tmp_path_factory.mktemp("two"), "resume_script.py", 2, tuple(CASES))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return made(tmp_path_factory.mktemp("killed"), "kill_script.py", 1, (*STAGES, "rl"))


def check(found: Found, case: str, fault: Callable[..., None]) -> None:
    """Each run of the case was stopped on its way, went on, and equals its twin."""
    folder, stops = found[0], found[1][case]
    assert stops
    for stop in stops:
        run, twin = folder / "stopped" / case / stop["run"], folder / "whole" / stop["run"]
        assert re.search(r" was stopped by SIGTERM after step \d+ of \d+;", stop["said"])
        assert Run(twin).manifest()["segment"] == 1 and Run(run).manifest()["segment"] == 2
        assert not [*unlike(Run(twin), Run(run))]
    fault(
        "SIGTERM somewhere in a run, for every stage and every algorithm, in one process or two",
        "exit code 75; what goes on equals what was not stopped, to the last bit",
        lost="0 steps",
    )


@pytest.mark.parametrize("case", QUICK)
def test_a_stopped_run_goes_on_as_its_twin(
    quick: Found, case: str, fault: Callable[..., None]
) -> None:
    check(quick, case, fault)


@FAULTS
@pytest.mark.parametrize("case", ALONE)
def test_one_process_goes_on_as_its_twin(
    alone: Found, case: str, fault: Callable[..., None]
) -> None:
    check(alone, case, fault)


@FAULTS
@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_as_their_twins(
    two: Found, case: str, fault: Callable[..., None]
) -> None:
    check(two, case, fault)


def test_every_algorithm_is_among_the_cases() -> None:
    assert set(CASES) == {"sft", "reward", *NAMES, *VARIANTS, "chain"}


@FAULTS
def test_signals_come_between_steps_and_between_a_rollout_and_its_steps(alone: Found) -> None:
    """An RL stage asks before a rollout, an odd place, and after it."""
    stops = [stop for stops in alone[1].values() for stop in stops if stop["run"][:3] == "rl/"]
    assert {stop["place"] for stop in stops} == {3, 4, 5, 6}
    assert {stop["asked"] for stop in stops} == {6}


@FAULTS
def test_a_run_that_goes_on_is_the_same_run_in_wandb(alone: Found) -> None:
    folder, found = alone
    (stop,) = found["p3o_v2-wandb"]
    run = Run(folder / "stopped" / "p3o_v2-wandb" / stop["run"])
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2  # what W&B was told by each start
    for place, file in enumerate(files):
        one = folder / f"wandb-{place}"
        shutil.copytree(file.parent, one / "wandb" / file.parent.name)
        told = list(records(one))
        assert {each.run.run_id for each in told if each.HasField("run")} == {run.key}


@FAULTS
@pytest.mark.parametrize("stage", [*STAGES, "rl"])
def test_a_run_killed_at_whatever_it_writes_goes_on_as_its_twin(
    killed: Found, stage: str, fault: Callable[..., None]
) -> None:
    """Also between a line of metrics and the checkpoint: no step is missing then, and none there twice."""
    folder, found = killed
    for store, name, before in found[stage]:
        run, twin = Run(folder / "killed" / store / name), Run(folder / "whole" / name)
        assert not [*unlike(twin, run)], before
        steps = [row["step"] for row in read(run.metrics_path)]
        assert steps == ([0, 2, 4, 6] if stage == "rl" else [*range(1, 9)]), before
    assert {re.sub(r"\d+", "#", before) for _, _, before in found[stage]} >= {
        "open metrics.jsonl",
        "os.rename checkpoints/.#.partial",
        "os.rename checkpoints/.final.partial",
        "os.remove checkpoints/#",
    }
    fault(
        "SIGKILL just before each kind of write to the run's folder",
        "goes on to the very same weights, metrics and samples; no step is missing or there twice",
        lost="steps since the last checkpoint",
    )
