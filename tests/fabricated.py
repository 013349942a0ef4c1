"""Finished runs of a figure, made up: what the stages would leave, with numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.gallery import Job
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run

Floats: TypeAlias = NDArray[np.float64]
Course: TypeAlias = Callable[[Job, float], dict[str, float]]
"""A run and how far it has come, from 0 to 1, to the means of kl, reward, gold and length."""


def fabricate(
    jobs: Iterable[Job], course: Course, prompts: int = 24, spread: float = 0.3, points: int = 4
) -> None:
    """Write each job's run as done; single responses scatter about the course by `spread`."""
    for job in jobs:
        step = job.plan.steps[-1]
        made, run = step.recipe, Run(step.path)
        described = {
            "key": step.key,
            "stage": step.stage,
            "label": step.label,
            "title": made.data.title,
            "algo": made.name,
            "model": made.model.label,
            "seed": made.seed,
            "group": made.group,
            "beta": getattr(made.algo, "beta", None),
            "parents": dict(step.parents),
            "science": step.science,
            "commit": "c0ffee0" * 5,
        }
        run.begin("seed: 1\n", described)
        ledger = Ledger(run.metrics_path)
        hard = np.random.default_rng(0).normal(size=prompts)
        for point in range(points + 1):
            means = course(job, point / points)
            # Everybody starts from the SFT policy, drawn from with the same random numbers.
            noise = np.random.default_rng([made.seed if point else 0, point])
            columns = {
                name: mean + spread * (hard + noise.normal(size=prompts))
                for name, mean in means.items()
            }
            columns["kl"] = means["kl"] * (1 + spread * noise.normal(size=prompts))
            _evaluate(run, ledger, point, columns)
        run.finish()


def _evaluate(run: Run, ledger: Ledger, point: int, columns: dict[str, Floats]) -> None:
    summary = {f"eval/{name}": float(values.mean()) for name, values in columns.items()}
    errors = {
        f"eval/{name}_se": float(values.std() / len(values) ** 0.5)
        for name, values in columns.items()
        if name in ("kl", "reward", "gold")
    }
    kept = {"eval/prompts": len(columns["kl"]), "eval/eos_rate": 1 - 0.1 * point}
    kept |= {"eval/perplexity_ref": 2.0 + 0.1 * point, "eval/entropy": 0.7 - 0.02 * point}
    spent = {"budget/tokens": 4000 * point}
    row = {"step": 10 * point, "episodes": 1280 * point, **kept, **spent, **summary, **errors}
    ledger.write(row)
    scored = {**columns, "score": columns["reward"]}
    rows = [
        {"prompt": f"prompt {at}", **{name: float(x[at]) for name, x in scored.items()}}
        for at in range(len(columns["kl"]))
    ]
    run.keep_samples(10 * point, rows)
