"""The runs of a report, read once, and what makes their comparison doubtful."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from rlhf_cli.errors import UserError
from rlhf_cli.evals.comparison import Comparison, compare
from rlhf_cli.evals.curves import Curve
from rlhf_cli.evals.curves import curves as curves_of
from rlhf_cli.evals.matched import KLS, at_kl
from rlhf_cli.evals.table import Point, points, trained
from rlhf_cli.store.run import Run


@dataclass(frozen=True)
class Material:
    """What the sections of a report are made of."""

    runs: tuple[Run, ...]
    """Those that were evaluated."""
    table: tuple[Point, ...]
    curves: tuple[Curve, ...]
    """Prompt by prompt; none where samples are missing or runs were asked different prompts."""
    compared: Comparison
    doubts: tuple[str, ...]
    """A sentence for everything that a reader should know first."""

    @classmethod
    def of(cls, runs: Sequence[Run], kls: Sequence[float] = ()) -> Material:
        """Read the RL runs among `runs`.

        kls: nats at which curves are compared; by default those of `matched.KLS` that any run reached.
        Raises UserError if none was evaluated, for a KL not above 0, and for a damaged run.
        """
        named = trained(runs)
        table = points(named)
        evaluated = {point.key for point in table}
        chosen = [run for run in named if run.key in evaluated]
        doubts = [*_unfinished(named, evaluated)]
        curves: list[Curve] = []
        try:
            curves = curves_of(chosen)
        except UserError as error:
            doubts.append(f"Nothing can be said of single prompts: {error}")
        at = (kls or _reached(curves)) if curves else ()
        compared = compare(chosen or runs, force=True, kls=at)
        doubts = [*compared.unequal, *doubts]
        return cls(compared.runs, tuple(table), tuple(curves), compared, tuple(doubts))

    @property
    def by_curve(self) -> Mapping[str, Sequence[Run]]:
        """The runs of each curve."""
        curve = {point.key: point.curve for point in self.table}
        found: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            found[curve[run.key]].append(run)
        return dict(sorted(found.items()))

    @property
    def has_gold(self) -> bool:
        """Whether any evaluation has a gold reward."""
        return any(point.gold == point.gold for point in self.table)


def _unfinished(runs: Sequence[Run], evaluated: AbstractSet[str]) -> Iterator[str]:
    for run in runs:
        status = run.status()
        if run.key not in evaluated:
            yield f"{run.path.name} is {status} and has not been evaluated: it is left out."
        elif status != "done":
            yield f"{run.path.name} is {status}: its last evaluation stands for its end."


def _reached(curves: Sequence[Curve]) -> list[float]:
    """The usual KLs, less those that no run got to."""
    paths = [path for curve in curves for path in curve.paths]
    return [kl for kl in KLS if any(at_kl(path, kl) for path in paths)]
