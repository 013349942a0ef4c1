"""What finished RL runs gained over the SFT policy they started from, as a markdown table.

    python scripts/gains.py [--by-algorithm] RUN_DIRECTORY…

Every run is compared with its own step 0: the same prompts, the same random numbers. Differences are
paired by prompt; z is the mean difference over its standard error. With --by-algorithm the runs of an
algorithm are one line: each prompt's difference is averaged over them first.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from rlhf_cli.evals.statistics import mean_and_se, paired_difference
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run


def column(run: Run, step: int, name: str) -> list[float]:
    """One field of the samples of an evaluation, prompt by prompt."""
    return [row[name] for row in run.responses(step)]


def ends(run: Run) -> tuple[int, int]:
    """The steps of the first and of the last evaluation."""
    first, *_, last = sorted(int(file.stem) for file in run.samples.glob("*.jsonl"))
    return first, last


def row(run: Run) -> str:
    """One run."""
    manifest = run.manifest()
    first, last = ends(run)
    end = read(run.metrics_path)[-1]
    cells = [manifest["algo"], manifest["seed"], manifest["key"]]
    cells += [f"{end['eval/kl']:.2f} ± {end['eval/kl_se']:.2f}"]
    for name in ("score", "gold"):
        gained = paired_difference(column(run, last, name), column(run, first, name))
        cells += [f"{gained.mean:+.2f} ± {gained.se:.2f}", f"{gained.z:.1f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def averaged(runs: list[Run], place: int, name: str) -> list[float]:
    """A field prompt by prompt, averaged over runs; place 0 is the first evaluation, 1 the last."""
    columns = [column(run, ends(run)[place], name) for run in runs]
    return [sum(values) / len(values) for values in zip(*columns, strict=True)]


def row_of_all(runs: list[Run]) -> str:
    """All runs of one algorithm."""
    kl = mean_and_se(averaged(runs, 1, "kl"))
    rows = [read(run.metrics_path)[-1] for run in runs]
    seeds = sorted(run.manifest()["seed"] for run in runs)
    cells = [f"`{runs[0].manifest()['algo']}`", ", ".join(map(str, seeds))]
    cells += [f"{kl[0]:.2f} ± {kl[1]:.2f}"]
    for name in ("score", "gold"):
        before, after = (averaged(runs, place, name) for place in (0, 1))
        gained, level = paired_difference(after, before), mean_and_se(after)
        cells += [f"{level[0]:+.2f} ± {level[1]:.2f}", f"{gained.mean:+.2f}", f"{gained.z:.1f}"]
    alone = (
        [averaged([run], 1, "gold") for run in runs],
        [averaged([run], 0, "gold") for run in runs],
    )
    each = [paired_difference(after, before).mean for after, before in zip(*alone, strict=True)]
    cells += [" ".join(f"{gain:+.2f}" for gain in each)]
    cells += [f"{min(row['wall'] for row in rows):.0f}"]  # what else a machine does can only add
    cells += [", ".join(f"{run.manifest()['commit'][:7]}" for run in runs[:1])]
    return "| " + " | ".join(map(str, cells)) + " |"


def main(words: list[str]) -> None:
    """Prints the table, algorithms and seeds in order."""
    runs = [Run(Path(word)) for word in words if not word.startswith("--")]
    runs.sort(key=lambda run: (run.manifest()["algo"], run.manifest()["seed"]))
    if "--by-algorithm" not in words:
        print("| algo | seed | key | KL, nats | proxy gain | z | gold gain | z |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(map(row, runs)))
        return
    together = defaultdict(list)
    for run in runs:
        together[run.manifest()["algo"]].append(run)
    print(
        "| algo | seeds | KL, nats | proxy | gain | z | gold | gain | z | by seed | seconds | commit |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(row_of_all, together.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
