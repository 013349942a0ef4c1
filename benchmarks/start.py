"""How long whole commands take, from the start of their process, once caches are warm.

Each is run a few times, and again if others used the machine meanwhile; what counts is the median.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.race import QUIET, THREADS, TRIES, all_busy
from benchmarks.table import Line

ROUNDS = 3
TRAIN = ("algo=p3o_v2", "data=hh", "sft.epochs=0", "reward.epochs=0.05")
"""As shipped, on parents that are hardly trained: how good they are changes nothing about a start."""
SWEEP = (
    "-m", "algo=p3o_v2,rloo", *TRAIN[1:], "track=off", "eval.points=1", "eval.prompts=16",
    "algo.update={episodes: 32, batch: 32, epochs: 1, minibatches: 1}",
)  # fmt: skip
FIGURE = "p3o_hh"
"""Of 32 runs."""
PROMPTS, POINTS = 280, 8
"""Prompts of an evaluation and evaluations of a run, as shipped."""


def lines(folder: Path) -> list[Line]:
    """The rows of the table; runs are kept in a folder."""
    runs, drawn = folder.resolve() / "start", folder.resolve() / "start-figure"
    here = f"paths.runs={runs}"
    _finish([*TRAIN, here, "stage=reward"])
    _fabricate(drawn)
    rlhf = [sys.executable, "-m", "rlhf_cli"]
    figure = [*rlhf, "figure", FIGURE, f"paths.runs={drawn}", "--out", str(folder / "figures")]
    ours = [sys.executable, "-m", "benchmarks.start"]

    def afresh() -> None:
        shutil.rmtree(runs / "rl", ignore_errors=True)

    first = [*ours, "first", *TRAIN, here]
    return [
        _line("rlhf train, to the end of the first step", 8.0, first, afresh),
        _line("rlhf --help", 0.3, [*rlhf, "--help"]),
        _line("rlhf plan", 1.5, [*rlhf, "plan", *TRAIN[:2], here]),
        _line(f"rlhf figure {FIGURE}, 32 runs", 3.0, figure),
        _sweep([*ours, "sweep", *SWEEP, here], afresh),
    ]


def _line(
    work: str, goal: float, command: Sequence[str], before: Callable[[], None] = lambda: None
) -> Line:
    """Seconds of a command; one that says how many it took is believed."""
    _timed(command, before)  # whatever is cached is so afterwards
    found = [_quietest(command, before) for _ in range(ROUNDS)]
    seconds = [each[0] for each in found]
    median, busy = statistics.median(seconds), max(each[1] for each in found)
    note = f"{min(seconds):.2f} to {max(seconds):.2f} s"
    if busy > QUIET:
        note += f"; others used up to {busy:.0%} of the cores"
    return Line(
        work, "", f"{median:.2f} s", f"{goal:g} s", median / goal, None, "<= 1", median <= goal, note
    )  # fmt: skip


def _sweep(command: Sequence[str], before: Callable[[], None]) -> Line:
    """Seconds that a sweep spends on what its parents have done."""
    said = []
    for _ in range(2):  # the first may still fill caches
        before()
        said = json.loads(_heard(command))
    spent, whole = sum(said[:3]), said[3]
    note = "SFT {:.2f} s, reward model {:.2f} s, encoding data {:.2f} s".format(*said[:3])
    work = "a sweep on finished parents: SFT, reward model, encoding"
    return Line(work, "", f"{spent:.2f} s", f"{whole:.2f} s", spent / whole, None, "<= 0",
                spent == 0, note)  # fmt: skip


def _quietest(command: Sequence[str], before: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and the share of the cores that others had, of the first quiet run or the quietest."""
    found = []
    for _ in range(TRIES):
        found.append(_timed(command, before))
        if found[-1][1] <= QUIET:
            break
    return min(found, key=lambda each: each[1])


def _timed(command: Sequence[str], before: Callable[[], None]) -> tuple[float, float]:
    before()
    all_before, own_before, began = all_busy(), _own(), time.perf_counter()
    said = _heard(command)
    wall = time.perf_counter() - began
    others = max(0.0, all_busy() - all_before - (_own() - own_before))
    seconds = float(said) if command[2] == "benchmarks.start" else wall
    return seconds, others / (wall * (os.cpu_count() or 1))


def _heard(command: Sequence[str]) -> str:
    """The last line that a command prints; raises RuntimeError with its complaint if it fails."""
    child = subprocess.run(
        command, capture_output=True, text=True, env={
            **os.environ, "OMP_NUM_THREADS": str(THREADS), "WANDB_MODE": "offline"},
    )  # fmt: skip
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: {child.stderr.strip()[-500:]}")
    return child.stdout.strip().rpartition("\n")[2]


def _own() -> float:
    """Seconds of all cores that this process and its children have had."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _finish(words: Sequence[str]) -> None:
    """Makes what is missing of a chain."""
    _heard([sys.executable, "-m", "rlhf_cli", "train", *words])


def _fabricate(runs: Path) -> None:
    """Runs of the figure with numbers made up, once."""
    from rlhf_cli import gallery
    from tests.fabricated import fabricate

    (exhibit,) = gallery.exhibits([FIGURE, f"paths.runs={runs}"])
    rates = {"p3o_v1": 1.5, "ppo": 1.2, "p3o_v2": 1.6, "dpo_online": 1.1}

    def course(job: gallery.Job, t: float) -> dict[str, float]:
        reward = rates[job.plan.recipe.name] * t
        return {"kl": 2.5 * t, "reward": reward, "gold": 0.8 * reward, "length": 20 + t}

    fabricate(exhibit.missing, course, prompts=PROMPTS, points=POINTS)


def first(words: Sequence[str]) -> None:
    """Train as the command line does and leave after the first step, saying how long all of it took."""
    from rlhf_cli import cli
    from rlhf_cli.engine.learner import Learner

    step, took = Learner.step, []

    def last(*given: Any, **more: Any) -> Any:
        step(*given, **more)
        took.append(time.time() - psutil.Process().create_time())
        raise KeyboardInterrupt

    Learner.step = last  # type: ignore[method-assign]
    try:
        cli.main(["train", *words])
    except SystemExit:
        if not took:
            raise
        print(took[0])


def sweep(words: Sequence[str]) -> None:
    """Train as the command line does and say the seconds of SFT, reward model, encoding, and of it all."""
    from rlhf_cli import cli
    from rlhf_cli.data import tokens
    from rlhf_cli.stages import reward, sft

    parts = [(sft, "main"), (reward, "main"), (tokens, "_write")]
    spent = [0.0] * len(parts)

    def noted(place: int, carried_out: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return carried_out(*given, **more)
            finally:
                spent[place] += time.perf_counter() - began

        return timed

    for place, (module, name) in enumerate(parts):
        setattr(module, name, noted(place, getattr(module, name)))
    try:
        cli.main(["train", *words])
    except SystemExit as left:
        if left.code:
            raise
    print(json.dumps([*spent, time.time() - psutil.Process().create_time()]))


if __name__ == "__main__":
    {"first": first, "sweep": sweep}[sys.argv[1]](sys.argv[2:])
