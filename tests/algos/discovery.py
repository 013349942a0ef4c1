"""The algorithms under test are the files in conf/algo: a new one is tested the day it is added."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_cli.config import compose, recipe

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "algo"

NAMES = sorted(
    str(path.relative_to(FOLDER).with_suffix(""))
    for path in FOLDER.rglob("*.yaml")
    if not path.name.startswith("_")
)


@cache
def shipped(name: str) -> Any:
    """The algorithm with the hyperparameters of its yaml."""
    return recipe(compose([f"algo={name}"])).algo


def tuned(name: str, **changes: Any) -> Any:
    """The algorithm with some hyperparameters set, so that no literal here depends on a yaml."""
    return replace(shipped(name), **changes)


def oracle(name: str) -> ModuleType:
    """The oracle of the algorithm's module."""
    module = type(shipped(name)).__module__.rsplit(".", 1)[-1]
    return import_module(f"tests.algos.oracles.{module}")
