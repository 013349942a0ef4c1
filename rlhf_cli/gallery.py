"""The figures of papers: which runs each is drawn from, what is missing of them, and the drawing.

A file of conf/figure names the command lines of its runs. They are composed and planned as `rlhf train -m`
would, and so a figure finds its runs by their keys, whoever made them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import get_args

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from rlhf_cli import complaints, dotted
from rlhf_cli.config import conf_dir, explained
from rlhf_cli.errors import UserError
from rlhf_cli.figures.spec import Scale, Spec
from rlhf_cli.figures.write import write
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.run import Run
from rlhf_cli.words import sweep

EVERY = "all"
"""The word for all figures at once."""


@dataclass(frozen=True)
class Job:
    """One run of a figure."""

    words: tuple[str, ...]
    """What `rlhf train` makes it of."""
    plan: Plan

    @property
    def run(self) -> Run:
        """Where it is, or is going to be."""
        return Run(self.plan.steps[-1].path)

    @property
    def done(self) -> bool:
        """Whether it can be drawn."""
        return self.plan.steps[-1].status == "done"


@dataclass(frozen=True)
class Exhibit:
    """A figure at one scale."""

    spec: Spec
    scale: Scale
    more: tuple[str, ...]
    """Words on top of those in the figure's file."""

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """The command lines of its runs, each once: words of `rlhf train -m`."""
        every = (line for scales in self.spec.panels.values() for line in scales[self.scale])
        return [self._words(line) for line in dict.fromkeys(every)]

    @cached_property
    def panels(self) -> dict[str, list[Job]]:
        """The runs of each panel, each once. Raises UserError."""
        return {
            panel: list(
                {
                    job.run.key: job
                    for line in scales[self.scale]
                    for job in _jobs(self._words(line))
                }.values()
            )
            for panel, scales in self.spec.panels.items()
        }

    @property
    def jobs(self) -> list[Job]:
        """All of its runs, each once."""
        return _distinct(job for jobs in self.panels.values() for job in jobs)

    @property
    def missing(self) -> list[Job]:
        """Those that are not there yet, or not finished."""
        return [job for job in self.jobs if not job.done]

    @property
    def command(self) -> str:
        """What draws it."""
        scale = [f"scale={self.scale}"] * (self.scale != "nano")
        return shlex.join(["rlhf", "figure", self.spec.name, *scale, *self.more])

    def _words(self, line: str) -> tuple[str, ...]:
        return (*shlex.split(line), *self.more)


def exhibits(words: Sequence[str]) -> list[Exhibit]:
    """Read `NAME [scale=SCALE] [KEY=VALUE...]`, NAME being `all` for every figure. Raises UserError."""
    name, *others = words
    scales = [word.partition("=")[2] for word in others if word.startswith("scale=")]
    more = tuple(word for word in others if not word.startswith("scale="))
    scale: Scale = "nano"
    for given in scales:
        if given not in get_args(Scale):
            raise UserError(f"scale={given} is not allowed: choose nano or paper.")
        scale = given  # type: ignore[assignment]
    chosen = names() if name == EVERY else [name]
    return [Exhibit(spec(each), scale, more) for each in chosen]


def names() -> list[str]:
    """All figures."""
    return sorted(path.stem for path in (conf_dir() / "figure").glob("*.yaml"))


def spec(name: str) -> Spec:
    """Read a figure's file. Raises UserError for a name there is none of, and for a fault in the file."""
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no figure {name}; {meant}`rlhf figure` lists those there are.")
    with explained():
        values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "figure" / f"{name}.yaml"))
    assert isinstance(values, dict)
    try:
        return TypeAdapter(Spec).validate_python({"name": name, **values})
    except ValidationError as error:
        raise complaints.of_values(error, name, values) from None


def commands(jobs: Iterable[Job]) -> dict[str, Plan]:
    """The command that makes each run, and its plan."""
    return {shlex.join(["rlhf", "train", *job.words]): job.plan for job in jobs}


def together(shown: Iterable[Exhibit]) -> list[Job]:
    """The runs of several figures that are missing, each once: first those of figures that lack least."""
    lacking = sorted(shown, key=lambda exhibit: len(exhibit.missing))
    return _distinct(job for exhibit in lacking for job in exhibit.missing)


def sweeps(exhibit: Exhibit) -> list[str]:
    """The commands that make all its runs, a sweep a line."""
    return [shlex.join(["rlhf", "train", "-m", *line]) for line in exhibit.lines]


def refusal(incomplete: Sequence[Exhibit]) -> UserError:
    """The error for figures of which runs are missing."""
    missing = len(together(incomplete))
    wanted = len(_distinct(job for exhibit in incomplete for job in exhibit.jobs))
    name, command = incomplete[0].spec.name, incomplete[0].command
    if len(incomplete) > 1:
        name, command = f"{len(incomplete)} figures", command.replace(name, EVERY, 1)
    return UserError(
        f"{missing} of the {wanted} runs of {name} are missing; `{command} --run` makes them."
    )


def left_out(incomplete: Sequence[Exhibit]) -> str:
    """What there was no time for."""
    named = ", ".join(f"{each.spec.name} ({len(each.missing)} runs)" for each in incomplete)
    return f"left out for want of time: {named}; the same command goes on with them."


def prepare(exhibit: Exhibit) -> None:
    """Make what drawing needs beyond runs, where a figure needs more. Raises UserError."""
    if path := exhibit.spec.prepare:
        dotted.named("prepare", path, "function")(_runs(exhibit), exhibit.spec)


def draw(exhibit: Exhibit, folder: Path) -> tuple[dict[str, Path], str]:
    """Draw and judge a figure whose runs are there; returns its files and the verdict. Raises UserError."""
    spec = exhibit.spec
    result = dotted.named("draw", spec.draw, "function")(_runs(exhibit), spec)
    runs = [job.run for job in exhibit.jobs]
    suffix = "" if exhibit.scale == "nano" else f"_{exhibit.scale}"
    out = folder / f"{spec.name}{suffix}"
    files = write(result, spec, exhibit.scale, runs, exhibit.command, out)
    return files, f"{result.verdict}: {result.reason}"


def table(shown: Sequence[Exhibit]) -> Table:
    """Draw a list of figures for a terminal."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("figure", no_wrap=True)
    drawn.add_column("title")
    drawn.add_column("after")
    for exhibit in shown:
        drawn.add_row(exhibit.spec.name, exhibit.spec.title, exhibit.spec.source)
    return drawn


def _runs(exhibit: Exhibit) -> Mapping[str, Sequence[Run]]:
    return {panel: [job.run for job in jobs] for panel, jobs in exhibit.panels.items()}


def _jobs(line: Sequence[str]) -> Iterator[Job]:
    for words, node in sweep(line):
        yield Job(words, plan(node))


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    return list({job.run.key: job for job in jobs}.values())
