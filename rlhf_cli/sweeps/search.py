"""A search by Optuna: which values the next jobs of a sweep get, by what those before them came to.

The study is made anew from the sweep whenever it is asked: a trial's values are in the index, what came of
it is in its run. So a search that is killed goes on, with the very trials that it had begun. A run that
failed, or whose metric is no number, is a failed trial, from which nothing is concluded.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_cli import words
from rlhf_cli.errors import UserError
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.metrics import VOCABULARY, read
from rlhf_cli.sweeps.index import Job, Search
from rlhf_cli.sweeps.standing import Standing
from rlhf_cli.words import Line, Space

if TYPE_CHECKING:
    import optuna
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

METRICS = ("eval/gold", "eval/reward")
"""What is looked at unless a metric is named: the first that an evaluation has."""


def of(line: Line) -> Search:
    """What a command line asks for. Raises UserError."""
    assert line.sweeper is not None
    space = words.space(line.words)
    metric, trials = line.sweeper["metric"], line.sweeper["n_trials"]
    if metric is not None and metric not in VOCABULARY:
        raise UserError(
            f"hydra.sweeper.metric={metric} is not a metric; give one that an evaluation writes, such as"
            " eval/gold or eval/reward."
        )
    if trials < 1:
        raise UserError(f"hydra.sweeper.n_trials={trials} is not allowed: it must be at least 1.")
    return Search(
        words=space.words,
        base=space.base,
        dimensions=space.dimensions,
        direction=line.sweeper["direction"],
        metric=metric,
        trials=trials,
        seed=line.sweeper["sampler"]["seed"],
    )


def first(line: Line) -> tuple[tuple[str, ...], Plan]:
    """The first trial of a command line, its words and its plan. Raises UserError."""
    said, _, node = ask(of(line), [])
    return tuple(said), plan(node)


def ask(search: Search, found: Sequence[Standing]) -> tuple[list[str], dict[str, Any], DictConfig]:
    """The next trial after these: its words, the values chosen, by key, and the configuration they make."""
    space = Space(search.words, search.base, search.dimensions)
    values = _study(search, space, found).ask(_distributions(space)).params
    chosen = [f"{key}={value}" for key, value in values.items()]
    return [*search.words, *chosen], values, space.at(chosen)


def objective(search: Search, standing: Standing) -> float | None:
    """What a trial came to at its last evaluation; None is a failed trial, or one that is not done."""
    if standing.state != "done":
        return None
    rows = read(standing.run.metrics_path)
    names = [search.metric] if search.metric else METRICS
    for name in names:
        values = [row[name] for row in rows if name in row]
        if values:
            return values[-1] if math.isfinite(values[-1]) else None
    return None


def best(search: Search, found: Sequence[Standing]) -> tuple[Job, float] | None:
    """The trial that came out best, and its metric; None if there is none."""
    known = [
        (value, at)
        for at, each in enumerate(found)
        if (value := objective(search, each)) is not None
    ]
    if not known:
        return None
    choose = max if search.direction == "maximize" else min
    value, at = choose(known, key=lambda pair: pair[0])
    return found[at].job, value


def _study(search: Search, space: Space, found: Sequence[Standing]) -> optuna.Study:
    """What is known so far; the sampler's seed differs from trial to trial."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "hydra/sweeper=optuna needs optuna, which is not installed; `pip install"
            " 'rlhf-cli[optuna]'` brings it."
        ) from error
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=1000 * search.seed + len(found), constant_liar=True
        )
    study = optuna.create_study(direction=search.direction, sampler=sampler)
    dimensions = _distributions(space)
    for each in found:
        value = objective(search, each)
        ended = each.state in ("done", "failed", "cancelled")
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL
        study.add_trial(
            create_trial(
                state=state if ended else TrialState.RUNNING,
                value=value,
                params=each.job.values or {},
                distributions=dimensions,
            )
        )
    return study


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {each.get_key_element(): _distribution(each) for each in space.parsed}


def _distribution(override: Override) -> BaseDistribution:
    """Of a choice, a range or an interval of Hydra's grammar; tag(log,interval(...)) is logarithmic."""
    from hydra.core.override_parser.types import IntervalSweep
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    if isinstance(value, IntervalSweep):
        ends: list[Any] = [value.start, value.end]
        log = "log" in value.tags
        if all(isinstance(end, int) for end in ends):
            return IntDistribution(*ends, log=log)
        return FloatDistribution(*map(float, ends), log=log)
    if override.is_range_sweep():
        steps: list[Any] = list(override.sweep_iterator())
        return CategoricalDistribution(sorted(steps))
    return CategoricalDistribution(list(override.sweep_string_iterator()))
