"""What a figure of a paper is: which runs it is drawn from, by what, and what it is said to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlhf_cli.complaints import of_values
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.key import key
from rlhf_cli.store.run import Run

Scale: TypeAlias = Literal["nano", "paper"]
"""The embedded data on a CPU, or the paper's own models and data on a cluster."""

Options = TypeVar("Options")


@dataclass(frozen=True, config=STRICT)
class Spec:
    """A file of conf/figure."""

    name: str
    """Of the file."""
    title: str
    """Of the picture."""
    source: str
    """Authors, year, arXiv number, figure."""
    claim: str
    """What the source says that the figure shows, in one sentence."""
    draw: str
    """Dotted path of the function that draws and judges: (panels of runs, Spec) -> Result."""
    options: dict[str, Any]
    """What that function reads."""
    panels: dict[str, dict[Scale, tuple[str, ...]]]
    """Panel to scale to command lines: the words of `rlhf train -m`. None for a figure without runs."""
    prepare: str | None = None
    """Dotted path of the function that makes what drawing needs beside runs: (panels of runs, Spec). It
    writes `made_of` every run that lacks it."""

    def made_of(self, run: Run) -> Path:
        """Where `prepare` puts what it makes of a run: another file for other options."""
        return run.path / "prepared" / f"{self.name}-{key(self.options)}.json"

    def made(self, run: Run) -> Any:
        """What `prepare` made of a run. Raises UserError if it has not been called."""
        try:
            return json.loads(self.made_of(run).read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{run.path.name} has not been prepared for the figure {self.name};"
                f" `rlhf figure {self.name} --run` does that."
            ) from None

    def typed(self, kind: type[Options]) -> Options:
        """The options as a pydantic dataclass. Raises UserError for the first that is not allowed."""
        try:
            return TypeAdapter(kind).validate_python(self.options)
        except ValidationError as error:
            raise of_values(error, "options", self.options) from None
