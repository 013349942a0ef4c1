"""Threads sleep while they wait where others need the cores, and are at hand where nobody does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli import neighbours
from rlhf_cli.neighbours import CHOSEN, Moment, crowded


def test_others_are_what_the_cores_did_less_what_this_process_did() -> None:
    before, after = Moment(10.0, 100.0, 5.0), Moment(12.0, 103.5, 6.5)
    assert before.others(after) == pytest.approx(1.0)  # 3.5 s of cores in 2 s, 1.5 of them ours
    assert before.others(Moment(12.0, 101.0, 6.5)) == 0.0  # two clocks are never quite one


@pytest.mark.parametrize(
    ("others", "cores", "threads", "said"),
    [
        (0.0, 2, "", False),
        (1.0, 2, "", True),
        (1.0, 2, "1", False),  # one thread waits for nobody
        (3.0, 8, "4", False),
        (5.0, 8, "4", True),
        (1.0, 8, "8,2", True),
        (1.0, 8, "many", True),  # as many as there are cores
    ],
)
def test_cores_are_crowded_if_others_need_those_of_our_threads(
    others: float, cores: int, threads: str, said: bool
) -> None:
    assert crowded(others, cores, {"OMP_NUM_THREADS": threads}) is said


SCRIPT = """
import os, sys
from rlhf_cli import neighbours
neighbours.first()
neighbours.Moment.others = lambda *given: float(sys.argv[1])
neighbours.settle()
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("others", "chosen", "said"),
    [("0", {}, "None"), ("9", {}, "PASSIVE"), ("9", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
     ("9", {"GOMP_SPINCOUNT": "7"}, "None")],
)  # fmt: skip
def test_it_is_settled_before_torch_is_loaded_unless_the_user_has_chosen(
    others: str, chosen: dict[str, str], said: str, root: Path
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    environment = {**clean, "OMP_NUM_THREADS": "2", **chosen}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, others], capture_output=True, text=True, cwd=root,
        env=environment, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [said, "False"]


def test_a_process_that_is_busy_is_seen() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = Moment.now()
        while Moment.now().clock < before.clock + 1.0:
            pass
        assert before.others(Moment.now()) > 0.2
    finally:
        busy.kill()
        busy.wait()


def test_nothing_is_done_once_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(neighbours, "crowded", lambda *given: True)
    neighbours.settle()
    assert "OMP_WAIT_POLICY" not in os.environ
