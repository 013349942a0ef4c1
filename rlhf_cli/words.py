"""The words of a command line to configurations, through Hydra as its users know it.

Hydra runs here with a job that only keeps what was composed: a whole sweep is therefore known
before its first run starts, and an edit of a yaml file in between changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from functools import cache
from io import StringIO
from itertools import product
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_cli.config import conf_dir, explained, register, settled, unsettled
from rlhf_cli.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def collect(words: Sequence[str]) -> list[DictConfig]:
    """Compose one configuration per job of the command line.

    Overrides, `-m`, `--config-dir` and Hydra's other flags work; a flag that only prints (`--cfg`,
    `--info`) prints, and leaves no job. Raises UserError.
    """
    import hydra

    _refuse_idle(words)
    register()
    jobs: list[DictConfig] = []

    def keep(node: DictConfig) -> None:
        jobs.append(settled(node))

    run = hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")(keep)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors and exits by itself
    # Hydra's sweeper insists on a folder for itself: it gets one that nobody will miss.
    with (
        TemporaryDirectory() as scratch,
        _command_line(*words, f"hydra.sweep.dir='{scratch}'"),
        explained(),
    ):
        run()
    return jobs


def sweep(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], DictConfig]]:
    """Compose the jobs that `collect` makes of `-m` and these overrides, each beside its own words.

    Files are composed once per choice of them, however many values are set on top, which makes the
    sweeps of a figure ten times as quick. Raises UserError.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with explained():
        parser = OverridesParser.create()
        spelled = [_values(override) for override in parser.parse_overrides(list(words))]
        for job in product(*spelled):
            overrides = parser.parse_overrides(list(job))
            choices = [each for each in overrides if _chooses(each)]
            node = deepcopy(_chosen(tuple(str(each.input_line) for each in choices)))
            # Hydra's own way to set values, with its own complaints.
            ConfigLoaderImpl._apply_overrides_to_config(
                [each for each in overrides if each not in choices], node
            )
            yield job, settled(node)


def _values(override: Override) -> list[str]:
    """An override once per value that it sweeps over."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _chooses(override: Override) -> bool:
    """Whether it names a file, rather than a value to be set on what the files say."""
    key = override.key_or_group
    return override.package is not None or (conf_dir() / key).is_dir()


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return unsettled(choices)


@contextmanager
def _command_line(*words: str) -> Iterator[None]:
    """Let Hydra read these words, and say what its parser does not understand in one sentence."""
    # Its parser wants all overrides side by side; here they may stand among the flags.
    overrides = [word for word in words if word[:1] != "-" and ("=" in word or word[:1] == "~")]
    flags = [word for word in words if word not in overrides]
    before, sys.argv = sys.argv, ["rlhf", *overrides, *flags]
    heard = StringIO()
    try:
        with redirect_stderr(heard):
            yield
    except SystemExit as exit:
        if exit.code:
            complaint = heard.getvalue().strip().rpartition("error: ")[2]
            heard = StringIO()
            raise UserError(f"{complaint}; `rlhf train --help` has examples.") from exit
    except UserError:
        heard = StringIO()  # Hydra's own remarks on it
        raise
    finally:
        sys.argv = before
        sys.stderr.write(heard.getvalue())


def _refuse_idle(words: Sequence[str]) -> None:
    """Hydra passes over a launcher or sweeper without -m in silence."""
    if {"-m", "--multirun"} & set(words):
        return
    for word in words:
        if word.lstrip("+").startswith(("hydra/launcher=", "hydra/sweeper=")):
            raise UserError(f"{word} has no effect on a single run; add -m, or leave it out.")
