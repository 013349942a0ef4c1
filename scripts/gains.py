"""What finished RL runs gained over the SFT policy they started from, as a markdown table.

    python scripts/gains.py RUN_DIRECTORY…

Every run is compared with its own step 0: the same prompts, the same random numbers. Differences are
paired by prompt; z is the mean difference over its standard error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_cli.evals.statistics import paired_difference
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run


def column(path: Path, name: str) -> list[float]:
    """One field of the samples of an evaluation, prompt by prompt."""
    return [json.loads(line)[name] for line in path.read_text(encoding="utf-8").splitlines()]


def row(run: Run) -> str:
    """One line of the table."""
    manifest = run.manifest()
    first, *_, last = sorted(run.samples.glob("*.jsonl"))
    end = read(run.metrics_path)[-1]
    cells = [manifest["algo"], manifest["seed"], manifest["key"]]
    cells += [f"{end['eval/kl']:.2f} ± {end['eval/kl_se']:.2f}"]
    for name in ("score", "gold"):
        gained = paired_difference(column(last, name), column(first, name))
        cells += [f"{gained.mean:+.2f} ± {gained.se:.2f}", f"{gained.z:.1f}"]
    proxy = paired_difference(column(last, "score"), column(first, "score")).mean
    cells += [f"{proxy - manifest['beta'] * end['eval/kl']:+.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(paths: list[str]) -> None:
    """Prints the table, algorithms and seeds in order."""
    runs = [Run(Path(path)) for path in paths]
    runs.sort(key=lambda run: (run.manifest()["algo"], run.manifest()["seed"]))
    print(
        "| algo | seed | key | KL, nats | proxy gain | z | gold gain | z | proxy gain less beta KL |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(map(row, runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
