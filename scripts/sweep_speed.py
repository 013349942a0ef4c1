"""How much faster a sweep is with several slots than one run after the other, measured side by side.

    python scripts/sweep_speed.py [--slots 2] [--runs 8] [--full] [WORD…]

Both build the same runs from the same SFT policy and reward model, which are made beforehand and copied, so
that only what slots can share out is timed. The two take turns to be first in `--repeats` pairs, and the
ratio is that of the total times. Without `--full` the runs are a few seconds each; with it, nano's own size.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

SHORT = [
    "data.embedded.prompts=400", "data.embedded.demos=400", "data.embedded.pairs=400",
    "algo.update.episodes=512", "eval.points=1",
]  # fmt: skip


def timed(folder: Path, words: list[str]) -> float:
    """Seconds that the command takes."""
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "rlhf_cli", "train", *words],
        cwd=folder, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - begun


def measured(words: list[str], runs: int, slots: int, repeats: int) -> dict[str, object]:
    """Seconds of both, pair by pair, and their ratio."""
    spent: dict[int, list[float]] = {1: [], slots: []}
    with TemporaryDirectory() as scratch:
        parents = Path(scratch) / "parents"
        parents.mkdir()
        timed(parents, [*words, "seed=0"])
        shutil.rmtree(parents / "runs" / "rl")
        seeds = f"seed={','.join(str(seed) for seed in range(1, runs + 1))}"
        for pair in range(repeats):
            for count in sorted(spent, reverse=bool(pair % 2)):
                folder = Path(scratch) / f"{pair}-{count}"
                shutil.copytree(parents, folder)
                more = [] if count == 1 else [f"launch.slots={count}"]
                spent[count].append(timed(folder, ["-m", *words, seeds, *more]))
                done = list((folder / "runs" / "rl").glob("*/checkpoints/final"))
                assert len(done) == runs, f"{len(done)} of {runs} runs are there"
                shutil.rmtree(folder)
    one, many = sum(spent[1]), sum(spent[slots])
    return {
        "runs": runs,
        "slots": slots,
        "cores": len(os.sched_getaffinity(0)),
        "serial_seconds": [round(each, 1) for each in spent[1]],
        "slots_seconds": [round(each, 1) for each in spent[slots]],
        "ratio": round(one / many, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    words = ["algo=p3o_v2", "track=off", *([] if asked.full else SHORT), *asked.words]
    print(json.dumps(measured(words, asked.runs, asked.slots, asked.repeats), indent=1))


if __name__ == "__main__":
    main()
