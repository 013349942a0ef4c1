"""The sections of a report: the tables and figures that the other commands make, and how to read them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from rlhf_cli import __version__
from rlhf_cli.errors import UserError
from rlhf_cli.evals.grid import Cell, Grid
from rlhf_cli.evals.health import alarms
from rlhf_cli.evals.overoptimisation import overoptimisation
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.figures.inline import inline
from rlhf_cli.figures.learning import learning
from rlhf_cli.figures.panels import distances, frontiers, swatches
from rlhf_cli.recipes import ByScore
from rlhf_cli.report.material import Material
from rlhf_cli.report.samples import Sample, checkpoints, samples
from rlhf_cli.report.settings import differences
from rlhf_cli.store.metrics import read
from rlhf_cli.store.provenance import origin
from rlhf_cli.store.run import Run
from rlhf_cli.tools import winrate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTCOMES = ("curve", "seeds", "KL", "proxy", "gold", "tried")
"""Columns of a comparison that are no budget."""
GLANCE = ("episodes", "tokens", "FLOP")
"""Those of the budget that tell at a glance whether curves are on equal terms."""
DIGITS = 10
"""Of a digest, where people read it."""
DAYS, MINUTES = 10, 16
"""Characters of a time in ISO 8601 up to there."""


@dataclass(frozen=True)
class Section:
    """A part of the page; what it has none of is not shown."""

    anchor: str
    title: str
    lead: str
    """What it shows, in a sentence."""
    drawings: Mapping[str, str] = field(default_factory=dict)
    """SVG by title."""
    small: bool = False
    """Whether the drawings are many and small."""
    grids: tuple[Grid, ...] = ()
    matrices: tuple[Grid, ...] = ()
    """Tables of shares between 0 and 1, tinted by how far they are above one half."""
    folded: tuple[Grid, ...] = ()
    """Tables to be opened."""
    samples: tuple[Sample, ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be seen."""
        tables = self.grids + self.matrices + self.folded
        return not (self.drawings or tables or self.samples or self.commands or self.notes)


@dataclass(frozen=True)
class Report:
    """All that a page says."""

    title: str
    facts: Mapping[str, str]
    doubts: tuple[str, ...]
    swatches: Mapping[str, str]
    """SVG of line and marker, by curve."""
    sections: tuple[Section, ...]


def report(material: Material, command: str) -> Report:
    """Put all sections together that have something to show."""
    made = (
        summary(material),
        frontier(material),
        matched(material),
        win_rates(material),
        learning_curves(material),
        over_optimisation(material),
        side_by_side(material),
        budget(material),
        settings(material),
        provenance(material, command),
    )
    first = material.table[0]
    return Report(
        f"{first.title} · {first.model}",
        facts(material),
        material.doubts,
        _inlined("key", swatches(material.table)),
        tuple(section for section in made if not section.empty),
    )


def facts(material: Material) -> dict[str, str]:
    """Which data, model, seeds and code, and when."""
    manifests = [run.manifest() for run in material.runs]
    times = (str(m[name]) for m in manifests for name in ("started", "finished") if m.get(name))
    days = sorted(time[:DAYS] for time in times)
    return {
        "data": _listed([m["title"] for m in manifests]),
        "model": _listed([m["model"] for m in manifests]),
        "curves": str(len(material.by_curve)),
        "runs": str(len(manifests)),
        "seeds": _listed(sorted(m["seed"] for m in manifests)),
        "held-out prompts": _listed([point.prompts for point in material.table]),
        "trained": " to ".join(dict.fromkeys([days[0], days[-1]])),
        "commit": _listed([_commit(m) for m in manifests]),
    }


def summary(material: Material) -> Section:
    """Where the curves ended."""
    grid = _columns(material.compared.grids["curves"], lambda name: name in OUTCOMES + GLANCE)
    return Section("summary", "Summary", "Every curve at its last evaluation.", grids=(grid,))


def frontier(material: Material) -> Section:
    """KL against both rewards."""
    lead = (
        "What a policy gained against how far it moved from the SFT policy. Small marks are single"
        " evaluations with standard errors over prompts, large ones means over seeds with standard"
        " errors over seeds; lines fit the proxy by least squares, and join gold in order of steps."
    )
    drawings = _inlined("frontier", frontiers(material.table))
    return Section("frontier", "Frontier", lead, drawings)


def matched(material: Material) -> Section:
    """Rewards at the same KL, with paired differences."""
    grid = material.compared.grids.get("matched")
    lead = "Curves where they have paid the same KL, and their differences on the same prompts."
    return Section("matched", "At equal KL", lead, grids=(grid,) if grid else ())


def win_rates(material: Material) -> Section:
    """Every curve over every other by gold and by proxy, and the pairs of runs behind it.

    The SFT policy is among them if all runs started from one.
    """
    anchor, title = "win-rates", "Win rates"
    lead = (
        "How often the row's response at the end of its run scores above the column's to the same"
        " prompt, a tie being half a win: means over all pairs of seeds."
    )
    kinds: tuple[Literal["gold", "reward"], ...] = ("gold", "reward")
    parents = {run.manifest().get("parents", {}).get("sft") for run in material.runs}
    sft = {winrate.SFT: winrate.SFT} if len(parents) == 1 else {}
    curve_of = {str(run.path): curve for curve, runs in material.by_curve.items() for run in runs}
    names = sft | curve_of
    if not material.curves or len(names) < 2:
        return Section(anchor, title, lead)
    found, notes = [], []
    for kind in kinds if material.has_gold else kinds[1:]:
        try:
            found.append(_win_rates(names, ByScore(kind, None, 0.0), material))
        except UserError as error:
            notes.append(str(error))
    matrices, pairs = (tuple(table[place] for table in found) for place in (0, 1))
    return Section(anchor, title, lead, matrices=matrices, folded=pairs, notes=tuple(notes))


def _win_rates(names: Mapping[str, str], judge: ByScore, material: Material) -> tuple[Grid, Grid]:
    """The matrix of curves and the table of runs; names: of the curve, by the word for the run."""
    root = material.runs[0].path.absolute().parents[1]
    policies = winrate.policies(root, [*names], judge)
    matches = winrate.judged(policies, judge, Console(stderr=True))
    pairs, *_ = winrate.tables(policies, judge, matches)
    curve = dict(zip((policy.name for policy in policies), names.values(), strict=True))
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for match in matches:
        first, second, rate = curve[match.first], curve[match.second], match.result.rate.value
        rates[first, second].append(rate)
        rates[second, first].append(1 - rate)
    curves = [*dict.fromkeys(names.values())]

    def cell(row: str, column: str) -> Cell | None:
        return None if row == column else Cell(mean_and_se(rates[row, column]).mean)

    rows = tuple((row, *(cell(row, column) for column in curves)) for row in curves)
    matrix = Grid(f"By {judge.kind}", ("over", *curves), rows)
    return matrix, replace(pairs, title=f"By {judge.kind}, run by run")


def learning_curves(material: Material) -> Section:
    """All metrics against episodes, and what looks like a gamed reward."""
    lead = (
        "Faint lines are single seeds, full ones their means, where all seeds of a curve have been."
    )
    drawings = _inlined("learning", learning(material.runs))
    notes = tuple(f"{run.path.name}: {alarm}." for run in material.runs for alarm in _alarms(run))
    return Section("learning", "Learning curves", lead, drawings, small=True, notes=notes)


def _alarms(run: Run) -> Iterator[str]:
    evaluations = [row for row in read(run.metrics_path) if "eval/kl" in row]
    return alarms(evaluations[0], evaluations[-1])


def over_optimisation(material: Material) -> Section:
    """Both rewards against the distance gone, and where gold turns; nothing without gold."""
    anchor, title = "over-optimisation", "Over-optimisation"
    lead = (
        "Where more proxy reward stops buying gold. The fit is that of Gao et al. 2023"
        " (arXiv:2210.10760): gold gained = d (alpha - beta log d), d = √KL, in standard deviations of"
        " gold over the prompts of the SFT policy; the gap is proxy gained less gold gained at the end."
    )
    if not material.has_gold:
        return Section(anchor, title, lead)
    rows, notes = [], []
    for curve in material.curves:
        try:
            found = overoptimisation(curve)
        except UserError as error:
            notes.append(str(error))
            continue
        gap = Cell(found.gap.value, interval=(found.gap.low, found.gap.high))
        rows.append((curve.name, found.alpha, found.beta, gap, str(found.turning)))
    columns = ("curve", "alpha", "beta", "gap", "turning point")
    grids = (Grid("Gold against √KL", columns, tuple(rows)),) if rows else ()
    drawings = _inlined("distance", distances(material.table))
    return Section(anchor, title, lead, drawings, grids=grids, notes=tuple(notes))


def side_by_side(material: Material) -> Section:
    """Answers of every curve to the same prompts, at the same KL as nearly as can be."""
    chosen = checkpoints(material.curves) if material.curves else []
    lead = (
        "The first pinned prompts, chosen by nobody, as each curve answers them at the evaluation whose"
        " mean KL is nearest to the smallest final KL of all curves."
    )
    rows = tuple((c.curve, c.seed, c.step, c.kl) for c in chosen)
    grid = Grid("Which evaluations", ("curve", "seed", "step", "mean KL"), rows)
    return Section(
        "samples",
        "Samples at equal KL",
        lead,
        folded=(grid,) if rows else (),
        samples=tuple(samples(chosen, material.runs)) if rows else (),
    )


def budget(material: Material) -> Section:
    """What the curves took."""
    grid = _columns(
        material.compared.grids["curves"], lambda name: name == "curve" or name not in OUTCOMES
    )
    lead = "What the curves were given and what they spent, evaluations not counted."
    return Section(
        "budget", "Budget", lead, grids=(Grid("Means over seeds", grid.columns, grid.rows),)
    )


def settings(material: Material) -> Section:
    """How the runs were made differently."""
    grid = differences(material.by_curve)
    lead = "Whatever the manifests of the runs do not have in common, seeds aside."
    return Section("settings", "Settings that differ", lead, grids=(grid,) if grid.rows else ())


def provenance(material: Material, command: str) -> Section:
    """Which runs in which state, the commands that made them and the one that made the page."""
    made = origin(material.runs, command)
    stages = [*dict.fromkeys(stage for each in made["runs"] for stage in each["parents"] or {})]
    rows = tuple(_row(*each, stages) for each in zip(material.runs, made["runs"], strict=True))
    parents = (f"{stage} parent" for stage in stages)
    columns = ("run", "key", "status", *parents, "commit", "began (UTC)", "ended (UTC)", "metrics")
    notes = ("Metrics: the first digits of the SHA-256 of metrics.jsonl.",)
    grid = Grid("Runs", columns, rows, notes).without_empty_columns()
    commands = [str(run.manifest().get("command") or "") for run in material.runs]
    return Section(
        "provenance",
        "Provenance",
        "Where every number of this page comes from, and the commands that make it again.",
        grids=(grid,),
        commands=(*dict.fromkeys(filter(None, commands)), command),
        notes=(f"Page made by rlhf-cli {__version__}, commit {_commit(made)}.",),
    )


def _row(run: Run, made: Mapping[str, Any], stages: Sequence[str]) -> tuple[object, ...]:
    """A run with its state, its parents at these stages, its code, its times and its numbers' digest."""
    manifest, parents = run.manifest(), made["parents"] or {}
    times = (str(manifest.get(name) or "") for name in ("started", "finished"))
    return (
        run.label,
        run.key,
        made["status"],
        *(parents.get(stage) for stage in stages),
        _commit(manifest),
        *(time[:MINUTES].replace("T", " ") for time in times),
        made["metrics_sha256"][:DIGITS],
    )


def _commit(made: Mapping[str, Any]) -> str:
    """Of the code, and the digest of what was not committed."""
    commit = str(made.get("commit") or "unknown")[:DIGITS]
    return f"{commit} + {made['patch']}" if made.get("patch") else commit


def _listed(values: Sequence[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _columns(grid: Grid, wanted: Callable[[str], bool]) -> Grid:
    return grid.only([place for place, name in enumerate(grid.columns) if wanted(name)])


def _inlined(anchor: str, figures: Mapping[str, Figure]) -> dict[str, str]:
    return {
        title: inline(figure, f"{anchor}-{place}", title)
        for place, (title, figure) in enumerate(figures.items())
    }
