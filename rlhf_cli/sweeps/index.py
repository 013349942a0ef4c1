"""A sweep's folder, `<runs>/sweeps/<name>-<key>/`: what a command meant, frozen before its first run begins.

    sweep.json      the command, the launcher and, of each job, its words and the runs it takes
    jobs/KEY.yaml   the configuration of each job
    cancelled/KEY   an empty file for each job that was called off
    submitit/       what a scheduler's jobs are told and say

How far it came is nowhere here: the runs say that (`sweeps.standing`). A sweep is called by a hash of the
keys of its runs, so the same command finds it again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlhf_cli import config
from rlhf_cli.errors import UserError
from rlhf_cli.plan import Plan, plan
from rlhf_cli.printable import file_name
from rlhf_cli.recipes import STRICT
from rlhf_cli.secret import masked
from rlhf_cli.store.files import atomic_write, check_writable, disk
from rlhf_cli.store.key import key
from rlhf_cli.store.run import Run

FOLDER = "sweeps"
"""Where they are, in the folder of all runs."""
Beside = Annotated[str, Field(pattern=r"^\w+/[^./\\\x00][^/\\\x00]*$")]
"""A run directory in the folder of all runs, by stage and name."""


@dataclass(frozen=True, config=STRICT)
class Job:
    """One run of a sweep, with those that it starts from."""

    words: tuple[str, ...]
    """What `rlhf train` makes it of."""
    chain: tuple[Beside, ...]
    """In the order they are built, its own the last."""
    values: dict[str, Any] | None = None
    """What a search chose for it, by key of the configuration; None in a grid."""

    @property
    def key(self) -> str:
        """Of its own run."""
        return self.chain[-1].rpartition("-")[2]

    @property
    def command(self) -> str:
        """What makes it alone."""
        return masked(shlex.join(["rlhf", "train", *self.words]))


@dataclass(frozen=True, config=STRICT)
class Search:
    """What Optuna is to find."""

    words: tuple[str, ...]
    """What `rlhf train` is told beside the values that are searched for."""
    base: str
    """The configuration without the values that are searched for: yaml with open references."""
    dimensions: tuple[str, ...]
    """What these may be, in Hydra's grammar of overrides."""
    direction: str
    """maximize or minimize."""
    metric: str | None
    """Of the last evaluation; None is the gold reward where there is one, else the reward."""
    trials: int
    seed: int


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """What a command asked for."""

    path: Path
    command: str
    started: str
    """When the command was first given, in UTC."""
    launcher: dict[str, Any]
    """As `words.Line` has it."""
    jobs: tuple[Job, ...]
    search: Search | None = None

    @property
    def name(self) -> str:
        """For people, with the key at its end."""
        return self.path.name

    @property
    def key(self) -> str:
        """A hash of what its runs are."""
        return self.name.rpartition("-")[2]

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path.parents[1]

    def run(self, job: Job) -> Run:
        """The run that a job stands for."""
        return Run(self.runs / job.chain[-1])

    def marker(self, job: Job) -> Path:
        """A file that says that a job was called off."""
        return self.path / "cancelled" / job.key

    def plan(self, job: Job) -> Plan:
        """The chain of a job by its frozen configuration. Raises UserError if that makes another run."""
        file = _config(self.path, job.key)
        node = config.read(file)
        if Path(node.paths.runs).absolute() != self.runs.absolute():
            node.paths.runs = str(self.runs)
        found = plan(node)
        made = found.steps[-1].path.name
        if made != self.run(job).path.name:
            raise UserError(
                f"{file} makes {made}, not {self.run(job).path.name}: it was edited, the data or the model"
                " that it names by a path are others now, or another version of rlhf-cli made it; undo"
                f" that, or give the command again: {self.command}"
            )
        return found

    def write(self) -> None:
        """Put it down whole or not at all."""
        values = {name: value for name, value in asdict(self).items() if name != "path"}
        atomic_write(
            self.path / "sweep.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        )


def grid(
    jobs: Sequence[tuple[Sequence[str], Plan]], command: str, launcher: Mapping[str, Any]
) -> Sweep:
    """Write the index of a sweep whose jobs are all known, each job by its words; or bring it up to date.

    What says how the jobs are run (launch, track) is as this command has it. Raises UserError.
    """
    plans = [each for _, each in jobs]
    path = _path(plans[0], key({"jobs": sorted({each.steps[-1].key for each in plans})}))
    with _alone(path):
        found = tuple(_frozen(path, words, each) for words, each in jobs)
        sweep = replace(_begun(path, command, launcher), jobs=found)
        sweep.write()
    return sweep


def study(first: Plan, search: Search, command: str, launcher: Mapping[str, Any]) -> Sweep:
    """Write the index of a search that chooses its jobs as it goes, or go on with the one there is.

    first: any job of it. How the jobs are run, and how many there shall be, is as this command has it.
    """
    base = OmegaConf.create(search.base)
    assert isinstance(base, DictConfig)
    values = {str(name): value for name, value in OmegaConf.to_container(base).items()}  # type: ignore[union-attr]
    science = {
        "base": {name: value for name, value in values.items() if name not in config.HOW},
        "dimensions": list(search.dimensions),
        "direction": search.direction,
        "metric": search.metric,
        "seed": search.seed,
    }
    path = _path(first, key(science))
    with _alone(path):
        sweep = replace(_begun(path, command, launcher), search=search)
        sweep.write()
    return sweep


def _path(first: Plan, name: str) -> Path:
    """Where a sweep of this key is, whatever it is called, or shall be: by the group of its jobs."""
    made = first.recipe
    folder = Path(made.paths.runs) / FOLDER
    known = sorted(folder.glob(f"*-{name}"))
    return known[0] if known else folder / f"{file_name(made.group)}-{name}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Be the only one who writes there, after clearing away what a killed process was writing."""
    check_writable(path.parents[1])
    with Run(path).lock():
        with disk(path):
            for folder in ("jobs", "cancelled"):
                (path / folder).mkdir(parents=True, exist_ok=True)
            for left in path.rglob(".*.tmp"):
                left.unlink()
        yield


def _begun(path: Path, command: str, launcher: Mapping[str, Any]) -> Sweep:
    """The sweep with the jobs that it has already, as this command is to carry it out."""
    if (path / "sweep.json").exists():
        return replace(load(path), command=command, launcher=dict(launcher))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Sweep(path, command, now, dict(launcher), ())


def added(sweep: Sweep, words: Sequence[str], made: Plan, values: Mapping[str, Any]) -> Sweep:
    """The sweep with one more job, written."""
    with _alone(sweep.path):
        job = replace(_frozen(sweep.path, words, made), values=dict(values))
        longer = replace(sweep, jobs=(*sweep.jobs, job))
        longer.write()
    return longer


def _frozen(path: Path, words: Sequence[str], made: Plan) -> Job:
    """A job whose configuration is on disk."""
    last = made.steps[-1]
    atomic_write(_config(path, last.key), config.freeze(last.node))
    return Job(tuple(words), tuple(f"{each.stage}/{each.path.name}" for each in made.steps))


def _config(path: Path, name: str) -> Path:
    return path / "jobs" / f"{name}.yaml"


def load(path: Path) -> Sweep:
    """Read a sweep's folder. Raises UserError if its index is damaged."""
    file = path / "sweep.json"
    try:
        values = json.loads(file.read_bytes())
        return TypeAdapter(Sweep).validate_python({**values, "path": path})
    except (ValueError, TypeError, ValidationError) as error:
        raise UserError(
            f"{file} is damaged ({str(error).splitlines()[0]}); delete {path} and give its command again:"
            " what is done stays done."
        ) from error


def every(runs: Path) -> list[Sweep]:
    """All sweeps in a folder of runs, the newest first."""
    found = [load(file.parent) for file in (runs / FOLDER).glob("*/sweep.json")]
    return sorted(found, key=lambda sweep: (sweep.started, sweep.name), reverse=True)


def find(runs: Path, reference: str) -> Sweep:
    """The one sweep meant by a name, a key or the beginning of either; the newest by "". Raises UserError."""
    sweeps = every(runs)
    if not sweeps:
        raise UserError(f"--runs={runs} holds no sweep yet; `rlhf train -m` makes one.")
    if not reference:
        return sweeps[0]
    meant = [sweep for sweep in sweeps if reference in (sweep.name, sweep.key)] or [
        sweep
        for sweep in sweeps
        if sweep.name.startswith(reference) or sweep.key.startswith(reference)
    ]
    if not meant:
        raise UserError(
            f"no sweep in {runs} is called {reference!r}; `rlhf sweep` lists those there are."
        )
    if len(meant) > 1:
        listed = ", ".join(sweep.name for sweep in meant)
        raise UserError(f"{reference!r} may mean {listed}; give the key of one of them.")
    return meant[0]
