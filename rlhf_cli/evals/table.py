"""The evaluations of many runs as one table, read from run directories alone.

Runs that differ in their seed only make up one curve. Two curves of one algorithm are told apart by
whatever else their keys are hashes of, so that no label hides a difference.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rlhf_cli.errors import UserError
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run

_DIGITS = 10
"""Of a digest, where people read it."""


@dataclass(frozen=True)
class Point:
    """One evaluation of one run."""

    curve: str
    """The algorithm, with the settings that tell it from other curves of the table."""
    algo: str
    title: str
    """What the data are called, e.g. hh-embedded."""
    model: str
    seed: int
    group: str
    beta: float | None
    key: str
    step: int
    episodes: int
    prompts: int
    kl: float
    kl_se: float
    kl_k3: float
    reward: float
    reward_se: float
    gold: float
    """nan where the corpus has no gold reward; so is its error."""
    gold_se: float
    length: float
    eos_rate: float
    entropy: float
    perplexity_ref: float
    reference: str
    """Beginning of the digest of the policy that the KL is measured against."""
    pinned: str
    """Beginning of the digest of the prompts."""
    temperature: float
    """Of the responses."""
    estimator: str
    """Of `kl`."""


@dataclass(frozen=True)
class SeedMean:
    """The runs of a curve at one step, averaged; errors are over the seeds, not the prompts."""

    curve: str
    algo: str
    step: int
    seeds: int
    kl: float
    kl_se: float
    reward: float
    reward_se: float
    gold: float
    gold_se: float


def points(runs: Sequence[Run]) -> list[Point]:
    """Every evaluation of the RL runs among `runs`, by curve, seed and step.

    Raises UserError for a damaged manifest or ledger, and for one that is not as its run has left it.
    """
    manifests = {run: run.manifest() for run in runs}
    manifests = {run: m for run, m in manifests.items() if m.get("stage") == "rl"}
    for run in manifests:
        run.check(run.metrics_path.name)
    curves = _curves(manifests)
    table = [
        _point(curves[run], manifest, row)
        for run, manifest in manifests.items()
        for row in read(run.metrics_path)
        if "eval/kl" in row
    ]
    return sorted(table, key=lambda p: (p.curve, p.seed, p.key, p.step))


def seed_means(table: Sequence[Point]) -> list[SeedMean]:
    """Average each curve over its seeds at every step that at least two of them have reached."""
    cells: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for point in table:
        cells[point.curve, point.step].append(point)
    return [
        SeedMean(
            curve,
            cell[0].algo,
            step,
            len(cell),
            *mean_and_se([p.kl for p in cell]),
            *mean_and_se([p.reward for p in cell]),
            *mean_and_se([p.gold for p in cell]),
        )
        for (curve, step), cell in sorted(cells.items())
        if len(cell) > 1
    ]


Facts: TypeAlias = Iterator[tuple[str, object]]
"""What a comparison takes for granted about a run, in words for people (the plural), and its value."""


@dataclass(frozen=True)
class Disagreement:
    """Something that the runs of a comparison should have in common, and have not."""

    what: str
    runs: Mapping[str, Sequence[Run]]
    """Value to the runs that have it."""

    def refusal(self, refused: str, fix: str) -> UserError:
        """The error for two of the runs: what they cannot do, and what to do instead."""
        (one, (first, *_)), (other, (second, *_)), *_ = self.runs.items()
        return UserError(
            f"{first.path.name} and {second.path.name} cannot {refused}: their {self.what} differ"
            f" ({one} and {other}); {fix}."
        )


def trained(runs: Sequence[Run]) -> list[Run]:
    """The RL runs among `runs`, each once: a run that was named twice must not pass for two seeds."""
    each = {run.path.resolve(): run for run in runs}.values()
    return [run for run in each if run.manifest().get("stage") == "rl"]


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse to compare RL runs that were not given, or not measured on, the same things.

    Data, model, evaluation prompts, SFT policy and, where both have one, reward model must agree.
    Raises UserError naming the two runs and the difference.
    """
    for found in disagreements(runs, shared):
        raise found.refusal("share a figure", "name runs that agree in it")


def disagreements(runs: Sequence[Run], facts: Callable[[Run], Facts]) -> Iterator[Disagreement]:
    """What not all runs have in common, among the facts that they have at all."""
    values: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for what, value in facts(run):
            values[what][str(value)].append(run)
    return (Disagreement(what, found) for what, found in values.items() if len(found) > 1)


def shared(run: Run) -> Facts:
    """What a frontier takes for granted about every run on it."""
    manifest = run.manifest()
    data = manifest.get("data") or {}
    yield "data", manifest.get("title")
    yield "data digests", str(data.get("digest"))[:_DIGITS]
    yield "models", manifest.get("model")
    for stage, parent in (manifest.get("parents") or {}).items():
        yield f"{stage} parents", parent
    for prompts in {row["eval/prompts"] for row in read(run.metrics_path) if "eval/kl" in row}:
        yield "numbers of evaluation prompts", int(prompts)
    if "evaluation" in data:
        yield "evaluation prompts", data["evaluation"]["digest"][:_DIGITS]


def _point(curve: str, manifest: Mapping[str, Any], row: Mapping[str, float]) -> Point:
    def value(name: str) -> float:
        return row.get(f"eval/{name}", math.nan)

    return Point(
        curve=curve,
        algo=manifest["algo"],
        title=manifest["title"],
        model=manifest["model"],
        seed=manifest["seed"],
        group=manifest["group"],
        beta=manifest.get("beta"),
        key=manifest["key"],
        step=int(row["step"]),
        episodes=int(row["episodes"]),
        prompts=int(row["eval/prompts"]),
        kl=value("kl"),
        kl_se=value("kl_se"),
        kl_k3=value("kl_k3"),
        reward=value("reward"),
        reward_se=value("reward_se"),
        gold=value("gold"),
        gold_se=value("gold_se"),
        length=value("length"),
        eos_rate=value("eos_rate"),
        entropy=value("entropy"),
        perplexity_ref=value("perplexity_ref"),
        reference=(manifest.get("reference") or "")[:10],
        pinned=manifest.get("data", {}).get("evaluation", {}).get("digest", "")[:10],
        temperature=1.0,
        estimator="k1",
    )


def _curves(manifests: Mapping[Run, Mapping[str, Any]]) -> dict[Run, str]:
    """Name each run's curve: its algorithm and, if several are there, what differs."""
    settings = {run: dict(leaves(manifest["science"])) for run, manifest in manifests.items()}
    rivals: dict[str, list[Run]] = defaultdict(list)
    for run, manifest in manifests.items():
        rivals[manifest["algo"]].append(run)
    names = {}
    for algo, group in rivals.items():
        keys = sorted(set().union(*(settings[run] for run in group)) - {"seed"})
        differ = [k for k in keys if len({repr(settings[run].get(k)) for run in group}) > 1]
        for run in group:
            said = (f"{k.removeprefix('algo.')}={settings[run].get(k)}" for k in differ)
            names[run] = " ".join([algo, *said])
    return names


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, under its dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
