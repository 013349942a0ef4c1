"""The words of a command line to configurations, through Hydra as its users know it.

Hydra runs here with a job that only keeps what was composed: a whole sweep is therefore known
before its first run starts, and an edit of a yaml file in between changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from itertools import product
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Optional

from omegaconf import DictConfig, OmegaConf

from rlhf_cli.config import conf_dir, explained, register, settled, unsettled
from rlhf_cli.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


PLUGINS = {
    "joblib": ("hydra-joblib-launcher", "sweep"),
    "submitit_local": ("hydra-submitit-launcher", "slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "slurm"),
}
"""Launchers of Hydra's beside its basic one: the plugin that says their keys, our extra that brings it."""
MULTIRUN = {"-m", "--multirun"}
"""Hydra's flag for a sweep."""


class Direction(Enum):
    """Which way a search goes."""

    maximize = 1
    minimize = 2


@dataclass
class Sampler:
    """Of hydra/sweeper=optuna: what its tree-structured Parzen estimator begins with."""

    seed: int = 1


@dataclass
class Sweeper:
    """What may be said of hydra/sweeper=optuna: words of Hydra's plugin, and the metric."""

    _target_: str = "optuna"
    direction: Direction = Direction.maximize
    n_trials: int = 20
    metric: Optional[str] = None  # noqa: UP045 - OmegaConf reads it
    sampler: Sampler = field(default_factory=Sampler)


@dataclass(frozen=True)
class Line:
    """A command line, less what it says of how its jobs are carried out."""

    words: tuple[str, ...]
    """Of the jobs."""
    launcher: Mapping[str, Any]
    """`kind`, and the values of Hydra's node hydra/launcher where a plugin is named."""
    sweeper: Mapping[str, Any] | None
    """The values of hydra/sweeper=optuna; None is Hydra's own, which runs every combination."""

    @property
    def plain(self) -> bool:
        """Whether it says nothing of the kind."""
        return self.launcher["kind"] == "basic" and self.sweeper is None


def read(words: Sequence[str]) -> Line:
    """Take the launcher and Optuna off a command line, checked by Hydra against their own schemas.

    Hydra would start them while it composes; here all is composed before anything starts. Raises UserError.
    """
    _refuse_idle(words)
    launcher, sweeper = _last(words, "hydra/launcher="), _last(words, "hydra/sweeper=")
    groups = [f"hydra{sign}launcher" for sign in "/." if launcher]
    groups += [f"hydra{sign}sweeper" for sign in "/." if sweeper == "optuna"]
    taken = [word for word in words if word.lstrip("+").startswith(tuple(groups))]
    if not groups:
        return Line(tuple(words), {"kind": "basic"}, None)
    node = _hydras(launcher, taken)
    kept = tuple(word for word in words if word not in taken)
    searched = _values_of(node.sweeper) if sweeper == "optuna" else None
    return Line(kept, {"kind": launcher or "basic", **_values_of(node.launcher)}, searched)


def _values_of(node: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    return {str(k): v for k, v in values.items() if k != "_target_"}  # type: ignore[union-attr]


def _last(words: Sequence[str], group: str) -> str:
    """What is chosen in a group of Hydra's; "" if nothing is said."""
    said = [word.lstrip("+") for word in words]
    return next((w.removeprefix(group) for w in reversed(said) if w.startswith(group)), "")


def _hydras(launcher: str, words: Sequence[str]) -> DictConfig:
    """Hydra's own settings, as these words make them."""
    import hydra

    register()
    _register_search()
    if launcher in PLUGINS:
        plugin, extra = PLUGINS[launcher]
        try:
            version(plugin)
        except PackageNotFoundError as error:
            raise UserError(
                f"hydra/launcher={launcher} needs {plugin}, which is not installed;"
                f" `pip install 'rlhf-cli[{extra}]'` brings it."
            ) from error
    folder = ["hydra.launcher.submitit_folder='%j'"] * launcher.startswith("submitit")
    with (
        explained(),
        hydra.initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="rlhf"),
    ):
        node = hydra.compose("train", [*folder, *words], return_hydra_config=True)
    if launcher and launcher not in ("basic", *PLUGINS):
        raise UserError(
            f"hydra/launcher={launcher} is not one that rlhf carries out: choose one of basic,"
            f" {', '.join(PLUGINS)}."
        )
    return node.hydra


def _register_search() -> None:
    """What may be said of hydra/sweeper=optuna; our own, with the words of Hydra's plugin."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # else the plugin, where it is installed, would take the name back
    ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=Sweeper)


def flags(words: Sequence[str]) -> list[str]:
    """What else than overrides a command line has, but for -m."""
    return [w for w in words if not _is_override(w) and w not in MULTIRUN]


def _is_override(word: str) -> bool:
    return word[:1] != "-" and ("=" in word or word[:1] == "~")


def collect(words: Sequence[str]) -> list[DictConfig]:
    """Compose one configuration per job of the command line, as `jobs` does. Raises UserError."""
    return [node for _, node in jobs(words)]


def jobs(words: Sequence[str]) -> list[tuple[tuple[str, ...], DictConfig]]:
    """Compose one configuration per job of the command line, each beside the overrides that make it.

    Overrides, `-m`, `--config-dir` and Hydra's other flags work; a flag that only prints (`--cfg`,
    `--info`) prints, and leaves no job. Raises UserError.
    """
    _refuse_idle(words)
    _chosen.cache_clear()  # a file may have been edited since the last command line of this process
    overrides = [word for word in words if _is_override(word)]
    others = {word for word in words if word not in overrides}
    # Of overrides alone Hydra's composition is enough, which takes half as long as its whole application.
    # What is wrong with them, and what else there is to do, the latter says.
    if others <= MULTIRUN and not any("hydra" in word for word in overrides):
        with suppress(Exception):
            return list(_composed(_combined(overrides, _respelled) if others else [overrides]))
    return _applied(words)


def _applied(words: Sequence[str]) -> list[tuple[tuple[str, ...], DictConfig]]:
    """The same through Hydra as an application."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register()
    found: list[tuple[tuple[str, ...], DictConfig]] = []

    def keep(node: DictConfig) -> None:
        said = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        assert isinstance(said, list)
        found.append((tuple(said), settled(node)))

    run = hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")(keep)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors and exits by itself
    # Hydra's sweeper insists on a folder for itself: it gets one that nobody will miss.
    with (
        TemporaryDirectory() as scratch,
        _command_line(*words, f"hydra.sweep.dir='{scratch}'"),
        explained(),
    ):
        run()
    return found


def sweep(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], DictConfig]]:
    """Compose the jobs that `jobs` makes of `-m` and these overrides, each beside its own words.

    Words that sweep over nothing stay as they were written. Raises UserError.
    """
    with explained():
        yield from _composed(_combined(words, _values))


def _composed(jobs: Iterable[Sequence[str]]) -> Iterator[tuple[tuple[str, ...], DictConfig]]:
    """Compose jobs that sweep over nothing more, each beside its words.

    Files are composed once per choice of them, however many values are set on top, which makes the
    sweeps of a figure ten times as quick.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    for job in jobs:
        overrides = _parsed(job)
        if swept := [each for each in overrides if each.is_sweep_override()]:
            raise ValueError(f"{swept[0].input_line} sweeps")
        choices = [each for each in overrides if _chooses(each)]
        node = deepcopy(_chosen(tuple(str(each.input_line) for each in choices)))
        # Hydra's own way to set values, with its own complaints.
        ConfigLoaderImpl._apply_overrides_to_config(
            [each for each in overrides if each not in choices], node
        )
        yield tuple(job), settled(node)


def _combined(
    words: Sequence[str], spelled: Callable[[Override], list[str]]
) -> Iterator[tuple[str, ...]]:
    """Every combination of the values that overrides sweep over; of two for one key the last word holds."""
    values = {each.get_key_element(): spelled(each) for each in _parsed(words)}
    yield from product(*values.values())


@dataclass(frozen=True)
class Space:
    """A command line of which some values are still to be chosen."""

    words: tuple[str, ...]
    """The rest of it."""
    base: str
    """The configuration without them, as yaml whose references are open."""
    dimensions: tuple[str, ...]
    """Overrides that say what each may be, in Hydra's grammar."""

    @property
    def parsed(self) -> list[Override]:
        """The same as Hydra reads them."""
        return _parsed(self.dimensions)

    def at(self, words: Sequence[str]) -> DictConfig:
        """The configuration with values chosen: one override each. Raises UserError."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl

        register()
        with explained():
            node = OmegaConf.create(self.base)
            assert isinstance(node, DictConfig)
            OmegaConf.set_struct(node, True)
            ConfigLoaderImpl._apply_overrides_to_config(_parsed(words), node)
            return settled(node)


def space(words: Sequence[str]) -> Space:
    """Compose a command line for a search among the values that it sweeps over. Raises UserError."""
    parsed = _parsed([word for word in words if _is_override(word)])
    swept = [override for override in parsed if override.is_sweep_override()]
    if not swept:
        raise UserError(
            "hydra/sweeper=optuna has nothing to search; give it a range, as in"
            " 'algo.optim.lr=tag(log,interval(1e-6,1e-4))'."
        )
    for override in swept:
        if _chooses(override):
            raise UserError(
                f"{override.input_line} chooses a file, and hydra/sweeper=optuna searches values; give"
                " one file, or a sweep of its own to each."
            )
    fixed = [str(each.input_line) for each in parsed if each not in swept]
    more = flags(words)
    with explained():
        node = unsettled([*fixed, *_search_path(more)])
    return Space(
        (*more, *fixed),
        OmegaConf.to_yaml(node, resolve=False),
        tuple(str(each.input_line) for each in swept),
    )


def _search_path(others: Sequence[str]) -> list[str]:
    """`--config-dir DIR` as an override; there is no other flag that a search could heed."""
    match list(others):
        case []:
            return []
        case ["--config-dir" | "-cd", folder]:
            return [f"hydra.searchpath=['file://{os.path.abspath(folder)}']"]
    raise UserError(
        f"{' '.join(others)} cannot be heeded with hydra/sweeper=optuna; of Hydra's flags it takes"
        " --config-dir DIR alone."
    )


def _parsed(words: Sequence[str]) -> list[Override]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with explained():
        return OverridesParser.create().parse_overrides(list(words))


def _values(override: Override) -> list[str]:
    """An override once per value that it sweeps over."""
    return _respelled(override) if override.is_sweep_override() else [str(override.input_line)]


def _respelled(override: Override) -> list[str]:
    """The same as Hydra's sweeper spells it."""
    if not override.is_sweep_override():
        return [f"{override.get_key_element()}={override.get_value_element_as_str()}"]
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
    overrides = [word for word in words if _is_override(word)]
    others = [word for word in words if word not in overrides]
    before, sys.argv = sys.argv, ["rlhf", *overrides, *others]
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
    if MULTIRUN & set(words):
        return
    for word in words:
        if word.lstrip("+").startswith(("hydra/launcher=", "hydra/sweeper=")):
            raise UserError(f"{word} has no effect on a single run; add -m, or leave it out.")
