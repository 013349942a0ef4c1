"""Curves side by side at equal budgets: where their last evaluations stand, and what that took.

Nothing is compared that was not given the same problem, the same measure and the same number of
responses to learn from, unless it is forced; then the table itself says what was unequal. A second table
compares the curves where they have paid the same KL.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UserError
from rlhf_cli.evals import grid
from rlhf_cli.evals.bootstrap import Interval
from rlhf_cli.evals.budget import Budget, budget_of, stored, tried
from rlhf_cli.evals.curves import curves as curves_of
from rlhf_cli.evals.grid import Cell, Grid
from rlhf_cli.evals.matched import Difference, Matched, Measure, differences, matched
from rlhf_cli.evals.statistics import mean_and_se
from rlhf_cli.evals.table import Facts, Point, disagreements, leaves, points, shared, trained
from rlhf_cli.store.files import atomic_write
from rlhf_cli.store.provenance import origin
from rlhf_cli.store.run import Run

EPISODES = "numbers of episodes"
SCORED = ("source", "unended", "unended_adds")
"""What of an RL stage's scoring enters its evaluations, so that a proxy reward means the same."""
HOW_TO_READ = (
    "KL in nats per response; ± is the standard error over seeds, or over prompts where there is one"
    " seed.",
    "Budgets are means over the runs of a curve, evaluations not counted; they are equal where equally"
    " many responses were learned from (episodes), be they drawn or given.",
    "Tried: settings of the algorithm that the run store holds for this problem, whatever became of"
    " them; where more were tried, chance alone makes the best look better.",
)
"""Notes of every table."""


@dataclass(frozen=True)
class Row:
    """One curve: runs that differ in their seed only."""

    curve: str
    seeds: int
    kl: Cell
    """Nats per response, at the last evaluation; so are the rewards."""
    proxy: Cell
    gold: Cell
    tried: int
    """Settings of the algorithm in the run store, this one included."""
    budget: Budget
    """Mean over the runs."""

    def cells(self) -> dict[str, object]:
        """The row by column."""
        spent = {name: _whole(value) for name, value in asdict(self.budget).items()}
        return {
            "curve": self.curve,
            "seeds": self.seeds,
            "KL": self.kl,
            "proxy": self.proxy,
            "gold": self.gold,
            "tried": self.tried,
            "episodes": spent["episodes"],
            "drawn": spent["responses"],
            "given": spent["given"],
            "prompts": spent["prompts"],
            "tokens": spent["tokens"],
            "scored": spent["scored"],
            "FLOP": spent["flops"],
            "seconds": spent["seconds"],
            "steps": spent["steps"],
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    grids: Mapping[str, Grid]
    """`curves`, the rows as a table, and `matched`, the curves at equal KL, if that was asked for."""
    unequal: tuple[str, ...]
    """A sentence for everything that should be equal and is not; none unless forced."""


def compare(runs: Sequence[Run], force: bool = False, kls: Sequence[float] = ()) -> Comparison:
    """Compare the RL runs among `runs` by their last evaluations, a row per curve.

    At each of the KLs (nats) too, if there are any, against the curve of the first run. Raises UserError
    if there is nothing to compare, and, unless forced, if two runs differ in their data, model, parents,
    evaluation or number of episodes.
    """
    compared = trained(runs)
    if not compared:
        raise UserError(
            f"there is no RL run to compare among {len(runs)} run(s); train one with `rlhf train"
            " algo=p3o_v2`."
        )
    last = {point.key: point for point in points(compared)}
    for run in compared:
        if run.key not in last:
            raise UserError(
                f"{run.path.name} has no evaluation to compare; finish it with the command that began"
                " it, or leave it out."
            )
    if not force:
        _check_equal(compared)
    curves: dict[str, list[Run]] = defaultdict(list)
    for run in compared:
        curves[last[run.key].curve].append(run)
    stores = {root: stored(root) for root in {_root(run) for run in compared}}
    rows = tuple(
        _row(name, mine, [last[run.key] for run in mine], stores[_root(mine[0])])
        for name, mine in sorted(curves.items())
    )
    first = last[compared[0].key]
    title = f"{first.title} · {first.model} · {first.prompts} held-out prompts"
    unequal = tuple(_unequal(curves))
    notes = (*HOW_TO_READ, *unequal, *_uncounted(curves))
    grids = {"curves": _grid(title, [row.cells() for row in rows], notes, names=1)}
    if kls:
        grids["matched"] = _matched_grid(title, compared, kls, first.curve)
    return Comparison(tuple(compared), rows, grids, unequal)


def write(found: Comparison, base: Path, command: str) -> dict[str, Path]:
    """Write the tables in every format, and beside them which runs and what command they come from.

    Returns {csv, json, md, tex, origin}: `base` with each ending (`_origin.json` for the last), and the
    same of `base` with `_matched` where there is such a table. Raises UserError if the disk refuses.
    """
    files = {**grid.write(found.grids["curves"], base), "origin": Path(f"{base}_origin.json")}
    atomic_write(files["origin"], json.dumps(origin(found.runs, command), indent=2) + "\n")
    if "matched" in found.grids:
        also = grid.write(found.grids["matched"], Path(f"{base}_matched"))
        files |= {f"matched {kind}": path for kind, path in also.items()}
    return files


def _check_equal(runs: Sequence[Run]) -> None:
    """UserError for the first thing that should be equal and is not."""
    for found in disagreements(runs, _facts):
        fix = (
            "train both to the same algo.update.episodes"
            if found.what == EPISODES
            else "name runs that agree in it"
        )
        raise found.refusal("be compared", f"{fix}, or add --force to have it noted instead")


def _facts(run: Run) -> Facts:
    """What a comparison takes for granted about a run: what a frontier does, its measure, its budget."""
    yield from shared(run)
    science = run.manifest()["science"]
    scoring = science.get("scoring", {})
    measure = {
        "eval": science.get("eval", {}),
        "reward": {name: scoring[name] for name in SCORED if name in scoring},
    }
    for name, value in leaves(measure):
        yield f"values of {name}", value
    yield EPISODES, int(budget_of(run).episodes)


def _root(run: Run) -> Path:
    """The store that it is kept in."""
    return run.path.absolute().parents[1]


def _row(
    curve: str, runs: Sequence[Run], ends: Sequence[Point], store: Sequence[dict[str, Any]]
) -> Row:
    spent = [asdict(budget_of(run)) for run in runs]
    mean = {name: mean_and_se([each[name] for each in spent]).mean for name in spent[0]}
    return Row(
        curve=curve,
        seeds=len(runs),
        kl=_level([(end.kl, end.kl_se) for end in ends]),
        proxy=_level([(end.reward, end.reward_se) for end in ends]),
        gold=_level([(end.gold, end.gold_se) for end in ends]),
        tried=tried(store, runs[0]),
        budget=Budget(**mean),
    )


def _level(ends: Sequence[tuple[float, float]]) -> Cell:
    """Mean and error over seeds; of a single seed its own, over prompts."""
    if len(ends) == 1:
        return Cell(*ends[0])
    return Cell(*mean_and_se([value for value, _ in ends]))


def _whole(value: float) -> float | int:
    """A count that is one, as one."""
    return int(value) if value.is_integer() else value


def _grid(
    title: str, lines: Sequence[Mapping[str, object]], notes: tuple[str, ...], names: int
) -> Grid:
    """Rows by column as a table, without columns that nobody has anything in."""
    cells = tuple(tuple(line.values()) for line in lines)
    return Grid(title, tuple(lines[0]), cells, notes, names).without_empty_columns()


def _unequal(curves: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """A sentence for everything that should be equal and is not."""
    runs = [run for mine in curves.values() for run in mine]
    for found in disagreements(runs, _facts):
        usual, *others = sorted(found.runs, key=lambda value: -len(found.runs[value]))
        said = (f"{value} in {_names(found.runs[value], curves)}" for value in others)
        yield f"Unequal, compared by force: {found.what} are {usual}, but {' and '.join(said)}."


def _uncounted(curves: Mapping[str, Sequence[Run]]) -> Iterator[str]:
    """What the budgets leave out."""
    runs = [run for mine in curves.values() for run in mine]
    if old := [run for run in runs if budget_of(run).note]:
        yield f"Of {_names(old, curves)}: {budget_of(old[0]).note}."
    if guided := [run for run in runs if "guide" in run.manifest()["parents"]]:
        yield f"Of {_names(guided, curves)}: what training the guide took is not counted."


def _names(runs: Sequence[Run], curves: Mapping[str, Sequence[Run]]) -> str:
    """Curves all of whose runs are meant, and the keys of the runs of others."""
    meant = {run.key for run in runs}
    said = []
    for name, mine in curves.items():
        keys = [run.key for run in mine if run.key in meant]
        said += [name] if len(keys) == len(mine) else keys
    return "every curve" if said == [*curves] else ", ".join(said)


def _matched_grid(title: str, runs: Sequence[Run], kls: Sequence[float], baseline: str) -> Grid:
    """Every curve at every KL, and how far it is from the baseline there."""
    curves = curves_of(runs)
    apart = {(one.curve, one.kl, one.measure): one for one in differences(curves, kls, baseline)}

    def cells(row: Matched) -> dict[str, object]:
        def against(measure: Measure) -> Difference | None:
            return apart.get((row.curve, row.kl, measure))

        proxy, gold = against("reward"), against("gold")
        return {
            "curve": row.curve,
            "KL": row.kl,
            "reached": f"{row.reached} of {row.seeds}",
            "proxy": _within(row.reward),
            "proxy gap": proxy and _within(proxy.difference),
            "proxy p": proxy and proxy.p_holm,
            "gold": _within(row.gold),
            "gold gap": gold and _within(gold.difference),
            "gold p": gold and gold.p_holm,
        }

    notes = (
        "KL in nats per response; runs are read where their mean KL first reaches it (reached: runs that"
        " do).",
        "In brackets: intervals of 95% over prompts, and over seeds where a curve has several.",
        f"Gap: to {baseline}, on the same prompts; p: of no gap, two-sided, corrected for all gaps of"
        " the table (Holm).",
    )
    lines = [cells(row) for row in matched(curves, kls)]
    return _grid(f"{title}, at equal KL", lines, notes, names=2)


def _within(found: Interval | None) -> Cell | None:
    return None if found is None else Cell(found.value, interval=(found.low, found.high))
