"""What a run has spent to get where it is, and how many settings were tried before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.store.key import canonical
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run, all_runs

COUNTED = ("prompts", "responses", "given", "tokens", "scored", "flops", "seconds")
"""Fields that a ledger keeps under `budget/`."""
UNTRIED = {"seed", "eval", "revision", "algo_revision", "parents"}
"""What of a run's description is no setting of its algorithm: chance, measurement, version, origin."""


@dataclass(frozen=True)
class Budget:
    """Totals of one run so far, evaluations not counted; nan where the run did not count."""

    episodes: float
    """Responses learned from, drawn or given. Runs are on equal terms where this is equal: how many of
    them are drawn is what online and offline algorithms differ in."""
    steps: float
    """Optimiser steps."""
    prompts: float
    """Prompts asked."""
    responses: float
    """Responses drawn."""
    given: float
    """Responses read from the dataset."""
    tokens: float
    """Tokens drawn."""
    scored: float
    """Responses that a reward was asked for."""
    flops: float
    """Floating-point operations needed, by the shapes of the models: an estimate, nan for unknown ones."""
    seconds: float
    """Spent on rollouts and on learning."""

    @property
    def note(self) -> str | None:
        """What is to be said of a run made before anything but episodes was counted; else None."""
        if not math.isnan(self.responses):
            return None
        return "only episodes and steps are known, as budgets were not metered yet"


def budget_of(run: Run) -> Budget:
    """Read what a run has spent from the last row of its ledger; all nan if there is none.

    Raises UserError for a damaged ledger.
    """
    last = (read(run.metrics_path) or [{}])[-1]
    return Budget(
        episodes=last.get("episodes", math.nan),
        steps=last.get("step", math.nan),
        **{name: last.get(f"budget/{name}", math.nan) for name in COUNTED},
    )


def stored(root: Path) -> list[dict[str, Any]]:
    """The manifests of all runs below `root`."""
    return [run.manifest() for run in all_runs(root)]


def tried(manifests: Sequence[dict[str, Any]], run: Run) -> int:
    """How many settings of the run's algorithm a store with these manifests holds on the same footing.

    That is: for the same data, model, SFT policy and reward model, whatever became of the run. Seeds
    of one setting count once. A store knows nothing of what was deleted or tried elsewhere.
    """
    mine = _footing(run.manifest())
    return len({_setting(each) for each in manifests if _footing(each) == mine})


def _footing(manifest: dict[str, Any]) -> tuple[object, ...]:
    """What two runs of an algorithm share that were given the same problem."""
    parents = manifest.get("parents", {})
    names = (manifest.get(name) for name in ("stage", "algo", "title", "model"))
    return (*names, parents.get("sft"), parents.get("reward"))


def _setting(manifest: dict[str, Any]) -> str:
    return canonical({k: v for k, v in manifest["science"].items() if k not in UNTRIED})
