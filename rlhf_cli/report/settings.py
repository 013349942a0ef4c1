"""How the runs of a comparison were made differently, by what their manifests say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from rlhf_cli.evals.grid import Grid
from rlhf_cli.evals.table import leaves
from rlhf_cli.store.run import Run

PARTS = ("science", "data", "launch", "versions", "machine", "commit", "patch")
"""Of a manifest: what was done, on what, with what; the rest is about the run itself."""
_DIGEST = re.compile(r"([0-9a-f]{10})[0-9a-f]{6,}")


def differences(curves: Mapping[str, Sequence[Run]]) -> Grid:
    """A row for every setting that not all runs have in common, a column for every curve.

    curves: runs by curve. The seed is left out: that is what the runs of a curve differ in. A cell is empty
    where a run has no such setting, and names the seeds where they are not all alike.
    """
    settings = {run.key: dict(_settings(run)) for runs in curves.values() for run in runs}
    names = dict.fromkeys(name for each in settings.values() for name in each)
    differ = [name for name in names if len({each.get(name, "") for each in settings.values()}) > 1]

    def cell(runs: Sequence[Run], name: str) -> str:
        return _said({run: settings[run.key].get(name, "") for run in runs})

    rows = tuple((name, *(cell(runs, name) for runs in curves.values())) for name in differ)
    return Grid("Settings by curve", ("setting", *curves), rows)


def _said(values: Mapping[Run, str]) -> str:
    """One value, or each with the seeds of the runs that have it."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for run, value in values.items():
        seeds[value].append(f"s{run.manifest()['seed']}")
    if len(seeds) == 1:
        return next(iter(seeds))
    return ", ".join(f"{value or 'not set'} ({', '.join(of)})" for value, of in seeds.items())


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    manifest = run.manifest()
    for part in PARTS:
        for name, value in leaves({part: manifest.get(part)}):
            if name != "science.seed" and value is not None:
                yield name.removeprefix("science."), _DIGEST.sub(r"\1", str(value))
