"""Who may import whom: the plan of the house, held against every file of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "rlhf_cli"
SOURCE = Path(__file__).resolve().parents[1] / PACKAGE

EVERYONE = {"dotted", "errors", "printable", "recipes", "secret", "trust"}
"""Rooms any other may import."""

ROOMS: dict[str, str] = {
    "__init__": "",
    "__main__": "cli",
    "dotted": "",
    "errors": "",
    "printable": "",
    "recipes": "",
    "secret": "",
    "trust": "",
    "hub": "store",
    "neighbours": "",
    "packing": "",
    "core": "",
    "algos": "core",
    "data": "core hub store",
    "models": "core packing",
    "remote": "",
    "rewards": "models remote",
    "judges": "remote store",
    "store": "",
    "engine": "core ds_config models packing remote store",
    "evals": "core store",
    "figures": "complaints judges store evals",
    "track": "store",
    "complaints": "",
    "checks": "devices ds_config hosts shapes store",
    "config": "checks complaints core data store",
    "shapes": "hub store",
    "devices": "",
    "ds_config": "",
    "hosts": "",
    "cost": "devices hosts packing shapes",
    "memory": "checks cost devices hosts packing",
    "plan": "config core cost devices hosts hub memory shapes store",
    "words": "config",
    "gallery": "complaints config figures plan store words",
    "campaign": "config engine launch neighbours plan store worker",
    "sweeps": "campaign config figures launch listing plan store words",
    "best_of": "figures remeasure store",
    "listing": "evals store",
    "catalogue": "config",
    "stages": "core cost shapes data models rewards store engine evals figures track config",
    "tools": "config data engine evals figures judges models store",
    "report": "evals figures store tools",
    "resume": "config plan store",
    "doctor": "config cost data devices hosts hub memory models plan shapes store track words",
    "remeasure": "config data engine models stages store tools worker",
    "worker": "config core data engine stages store track",
    "launch": "config data engine hosts neighbours plan store worker",
    "cli": "campaign catalogue complaints config doctor evals figures gallery neighbours "
    "launch listing plan remeasure report resume store sweeps tools words",
}
"""Room -> the rooms it may import beside itself, at any depth of the file, types included.

Nobody but a yaml's `_target_` names an algorithm: no room lists `algos`.
"""

TYPES: dict[str, str] = {"checks": "config", "cost": "config", "memory": "config"}
"""Room -> rooms it may name under `if TYPE_CHECKING` alone, which makes no cycle at run time."""

LIBRARIES: dict[str, str] = {
    "__init__": "",
    "__main__": "",
    "dotted": "",
    "errors": "",
    "printable": "",
    "recipes": "pydantic",
    "secret": "",
    "trust": "yaml",
    "hub": "huggingface_hub",
    "neighbours": "psutil",
    "packing": "",
    "core": "torch numpy pydantic",
    "algos": "torch pydantic",
    "data": "datasets filelock numpy pyarrow pydantic tokenizers torch transformers",
    "models": "peft safetensors tokenizers torch transformers",
    "remote": "httpx",
    "rewards": "torch transformers",
    "judges": "",
    "store": "filelock",
    "engine": "deepspeed numpy safetensors torch transformers vllm",
    "evals": "numpy scipy torch",
    "figures": "matplotlib numpy pydantic scipy",
    "track": "psutil wandb",
    "complaints": "hydra omegaconf pydantic yaml",
    "checks": "torch",
    "config": "hydra omegaconf pydantic yaml",
    "shapes": "",
    "devices": "",
    "ds_config": "",
    "hosts": "",
    "cost": "",
    "memory": "",
    "plan": "omegaconf rich",
    "words": "hydra omegaconf",
    "gallery": "omegaconf pydantic rich",
    "campaign": "omegaconf rich torch",
    "sweeps": "hydra omegaconf optuna pydantic rich submitit",
    "best_of": "",
    "listing": "rich",
    "catalogue": "omegaconf rich",
    "stages": "numpy rich torch transformers",
    "tools": "numpy rich torch transformers",
    "report": "jinja2 rich",
    "resume": "",
    "doctor": "filelock huggingface_hub packaging psutil rich torch",
    "remeasure": "",
    "worker": "omegaconf psutil rich torch transformers",
    "launch": "deepspeed omegaconf rich torch",
    "cli": "hydra omegaconf rich typer",
}
"""Room -> third-party packages it may import; those needed for types alone are free."""

HEAVY = {"torch", "transformers", "datasets", "hydra", "wandb", "deepspeed", "matplotlib", "scipy"}

LATE: dict[str, set[str]] = {
    "cli": HEAVY,
    "__main__": HEAVY,
    "campaign": {"torch"},
    "checks": {"torch"},
    "hub": {"huggingface_hub"},
    "config": {"hydra"},
    "data": {"torch", "transformers", "datasets"},
    "doctor": {"torch", "huggingface_hub", "packaging", "psutil"},
    "engine": {"vllm"},
    "launch": {"torch", "deepspeed"},
    "sweeps": {"hydra", "optuna", "submitit"},
    "words": {"hydra"},
    "track": {"wandb"},
}
"""Room -> packages it may import inside functions only, so that importing the room stays quick."""


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str
    line: int
    late: bool
    """Inside a function: not run when the file is imported."""
    typing: bool
    """Under `if TYPE_CHECKING`: never run."""


def imports(
    tree: ast.AST, package: str, late: bool = False, typing: bool = False
) -> Iterator[Import]:
    """All imports of a file whose package is `package` (dotted), relative ones spelled out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late, typing)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            origin = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from rlhf_cli import plan` names a room only in its second half.
            for alias in node.names:
                name = f"{origin}.{alias.name}" if origin == PACKAGE else origin
                yield Import(name, node.lineno, late, typing)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from imports(ast.Module([child], []), package, late, typing=True)
        else:
            yield from imports(node, package, late or inside, typing)


def room_of(path: Path, source: Path) -> str:
    """The first part of a file's path: a folder or a module of the package."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def complaint(room: str, found: Import) -> str | None:
    """What is wrong with an import, or None."""
    top, *rest = found.module.split(".")
    if top == PACKAGE:
        target = rest[0] if rest and not rest[0].startswith("__") else "__init__"
        allowed = {room, "__init__", *EVERYONE, *ROOMS[room].split()}
        if found.typing:
            allowed |= {*TYPES.get(room, "").split()}
        return None if target in allowed else f"{room} may not import {target}"
    if top in sys.stdlib_module_names or found.typing:
        return None
    if top not in LIBRARIES[room].split():
        return f"{room} may not import {top}"
    if top in LATE.get(room, set()) and not found.late:
        return f"{room} may import {top} inside functions only"
    return None


def violations(source: Path) -> list[str]:
    """Every import of the tree that the tables do not allow, as path:line: reason."""
    wrong = []
    for path in sorted(source.rglob("*.py")):
        room = room_of(path, source)
        if room not in ROOMS:
            wrong.append(f"{path.name}: the room {room} has no line in the table")
            continue
        package = ".".join([PACKAGE, *path.relative_to(source).parts[:-1]])
        for found in imports(ast.parse(path.read_text()), package):
            if reason := complaint(room, found):
                wrong.append(f"{path.relative_to(source)}:{found.line}: {reason}")
    return wrong


def test_every_import_of_the_package_is_in_the_table() -> None:
    assert violations(SOURCE) == []
    assert ROOMS.keys() == LIBRARIES.keys()


def test_nobody_but_its_own_yaml_knows_an_algorithm() -> None:
    assert [room for room, others in ROOMS.items() if "algos" in others.split()] == []


def test_no_two_rooms_may_import_each_other() -> None:
    reach = {room: set(others.split()) for room, others in ROOMS.items()}
    for _ in ROOMS:
        for room in reach:
            reach[room] |= {far for near in reach[room] for far in reach[near]}
    assert [room for room in reach if room in reach[room]] == []


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("algos/new.py", "from rlhf_cli.engine.world import World", "algos may not import engine"),
        ("algos/new.py", "from ..engine import world", "algos may not import engine"),
        ("engine/new.py", "def f():\n    import rlhf_cli.algos.p3o", "engine may not import algos"),
        ("core/new.py", "from rlhf_cli import plan", "core may not import plan"),
        ("core/new.py", "if TYPE_CHECKING:\n    from rlhf_cli.plan import Plan", "import plan"),
        ("figures/new.py", "def f():\n    import torch.nn", "figures may not import torch"),
        ("figures/new.py", "import wandb", "figures may not import wandb"),
        ("store/new.py", "import numpy as np", "store may not import numpy"),
        ("core/new.py", "import transformers", "core may not import transformers"),
        ("cli.py", "try:\n    import hydra\nfinally:\n    pass", "hydra inside functions only"),
        ("cli.py", "import torch", "cli may not import torch"),
        ("data/new.py", "class A:\n    import torch", "torch inside functions only"),
        ("checks.py", "from rlhf_cli import config", "checks may not import config"),
        ("attic/new.py", "import os", "the room attic has no line"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("algos/new.py", "from ..core.masked import whiten\nfrom . import p3o\nimport torch"),
        ("cli.py", "def f():\n    import hydra\n    from rlhf_cli.figures import frontier"),
        ("data/new.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizerBase"),
        ("store/new.py", "import json\nfrom rlhf_cli.errors import UserError"),
    ],
)
def test_an_allowed_import_is_not_called_a_violation(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", HEAVY),
        ("cost", HEAVY),
        ("data.corpus", {"torch", "transformers"}),
        ("doctor.examination", HEAVY),
        ("evals.comparison", {"torch", "transformers", "wandb", "matplotlib"}),
        ("figures.frontier", {"torch", "wandb"}),
        ("figures.kinds.curves", {"torch", "wandb"}),
        ("figures.kinds.frontier", {"torch", "wandb"}),
        ("figures.kinds.overoptimisation", {"torch", "wandb"}),
        ("figures.kinds.credit", {"torch", "wandb"}),
        ("figures.kinds.exploration", {"torch", "wandb"}),
        ("figures.kinds.traces", {"torch", "wandb"}),
        ("figures.kinds.table", {"torch", "wandb"}),
        ("figures.kinds.winrate", {"torch", "wandb"}),
        ("gallery", {"torch", "hydra", "wandb"}),
        ("listing", HEAVY),
        ("plan", {"torch", "hydra", "wandb"}),
        ("report.page", {"torch", "transformers", "wandb"}),
        ("store.run", HEAVY),
        ("sweeps.carry_out", HEAVY),
        ("tools.winrate", {"torch", "transformers", "wandb", "matplotlib"}),
        ("track", {"torch", "wandb"}),
    ],
)
def test_importing_it_brings_none_of_these_even_through_others(
    module: str, absent: set[str]
) -> None:
    code = f"import sys, {PACKAGE}.{module}; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert absent & set(done.stdout.split()) == set()
