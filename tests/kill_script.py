"""Kills runs by SIGKILL just before they touch a file, lets them go on; `tests/test_resume.py` compares them.

`python tests/kill_script.py FOLDER STAGE...`: the undisturbed twins are kept in FOLDER/whole, the others
in FOLDER/killed/STAGE-PLACE. Writes FOLDER/out.json: {stage: [[STAGE-PLACE, the run in it, before what it was
killed]...]}.

A place is a call that appends to a file of the run's folder, renames one, or removes one with its folder;
logs do not count, and of all that look alike but for numbers the last is chosen. Each run has a process of
its own, forked when the libraries are loaded: those are most of what a start takes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_cli import launch, worker
from rlhf_cli.config import compose
from rlhf_cli.plan import Plan, plan
from tests.resume_script import SMALL, STAGES, algorithm

CHAINS = {**STAGES, "rl": [*algorithm("ppo"), "checkpoint.every=2"]}


def composed(stage: str, store: Path) -> Plan:
    """What the command would do."""
    return plan(compose([*SMALL, "track=off", *CHAINS[stage], f"paths.runs={store}"]))


def train(chain: Plan, touched: Callable[[str], None]) -> None:
    """Carries a chain out; `touched` is told of each change to the last run's directory that is ahead."""
    run, removed = chain.steps[-1].path, ""

    def heard(event: str, about: tuple[Any, ...]) -> None:
        nonlocal removed
        if event == "shutil.rmtree":
            removed = str(about[0])
        renames = event == "os.rename"
        appends = event == "open" and about[2] & os.O_APPEND
        removes = (
            event == "os.remove" and about[1] != -1
        )  # by its name in the folder that is removed
        if renames or appends or removes:
            path = Path(removed if removes else about[0])
            if run in path.parents and run / "log" not in path.parents:
                touched(f"{event} {path.relative_to(run)}")

    sys.addaudithook(heard)
    launch.execute(chain, "tests/kill_script.py")


def forked(what: Callable[[], None]) -> int:
    """Runs it in a process of its own: the exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            what()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def places(chain: Plan, note: Path) -> list[str]:
    """Trains a chain undisturbed; what it was about to do to its directory, in order."""

    def undisturbed() -> None:
        seen: list[str] = []
        train(chain, seen.append)
        note.write_text(json.dumps(seen))

    assert forked(undisturbed) == 0
    seen: list[str] = json.loads(note.read_text())
    return seen


def chosen(seen: list[str]) -> list[int]:
    """The last of each kind, whatever numbers are in its name."""
    return sorted({re.sub(r"\d+", "#", what): place for place, what in enumerate(seen)}.values())


def killed(chain: Plan, place: int) -> None:
    """Trains a chain until it is killed at a place."""
    left = place

    def touched(what: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    assert forked(lambda: train(chain, touched)) == -signal.SIGKILL


def main(folder: str, *stages: str) -> None:
    at, found = Path(folder), {}
    for stage in stages:
        twin = composed(stage, at / "whole")
        worker.corpus_of(twin.recipe.data)  # type: ignore[arg-type]
        seen = places(twin, at / "seen.json")
        found[stage] = []
        for place in chosen(seen):
            chain = composed(stage, at / "killed" / f"{stage}-{place}")
            for step, other in zip(chain.steps[:-1], twin.steps, strict=False):
                shutil.copytree(other.path, step.path)
            killed(chain, place)
            assert forked(lambda: train(chain, print)) == 0  # noqa: B023
            found[stage].append(
                [f"{stage}-{place}", f"{stage}/{chain.steps[-1].path.name}", seen[place]]
            )
    (at / "out.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
