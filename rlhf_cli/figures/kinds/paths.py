"""Numbers per seed and prompt as paths of a curve, so that `evals.bootstrap` has intervals for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_cli.evals.curves import Curve, Floats, Path, curves
from rlhf_cli.store.run import Run


def settings(panel: str, runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs that differ in nothing but their seed, by seed, under the name of the panel and their setting."""
    by_key = {run.key: run for run in runs}
    return {
        f"{panel}, {curve.name}": {path.seed: by_key[path.key] for path in curve.paths}
        for curve in curves(runs)
    }


def curve_of(
    name: str,
    values: Mapping[int, Floats],
    prompts: Sequence[str],
    lengths: Mapping[int, Floats] | None = None,
) -> Curve:
    """Values [K,N] of each seed in the place of the reward, and lengths [K,N] in that of the length.

    K numbers for each of N prompts, which need not be evaluations: nan stands wherever nothing is known.
    """
    paths = []
    for seed, each in values.items():
        unknown, places = np.full_like(each, np.nan), np.arange(len(each))
        paths.append(
            Path(
                key=f"{name} {seed}",
                algo=name,
                seed=seed,
                beta=None,
                setting=name,
                step=places,
                episodes=places,
                kl=unknown,
                reward=each,
                gold=unknown,
                length=lengths[seed] if lengths else unknown,
                prompts=tuple(prompts),
            )
        )
    return Curve(name, name, tuple(paths))
