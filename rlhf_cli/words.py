"""The words of a command line to configurations, through Hydra as its users know it.

Hydra runs here with a job that only keeps what was composed: a whole sweep is therefore known
before its first run starts, and an edit of a yaml file in between changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from rlhf_cli.complaints import of_composition
from rlhf_cli.config import conf_dir, register, settled
from rlhf_cli.errors import UserError


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
    with TemporaryDirectory() as scratch, _command_line(*words, f"hydra.sweep.dir='{scratch}'"):
        try:
            run()
        except Exception as error:
            if sentence := of_composition(error):
                raise sentence from error
            raise
    return jobs


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
