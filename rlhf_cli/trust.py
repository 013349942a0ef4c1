"""What files of strangers may do: say values, and run no code.

Yaml comes in two kinds. A run's frozen `config.yaml` holds plain values, so there nothing is
resolved and no code is imported but this project's own and what the user has named himself: his command,
or RLHF_IMPORTS. A folder of yaml that the user names is composed, and so its references are counted first:
a dozen lines that each refer twice to the next would take all memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import yaml

from rlhf_cli.errors import UserError

IMPORTS = "RLHF_IMPORTS"
"""Variable of the environment: modules, with commas between, that the configuration of a run may name."""
OURS = ("rlhf_cli.algos.", "rlhf_cli.data.")
"""Where the classes are that anyone may name."""
CODE = ("_target_", "call")
"""Keys whose value is imported."""
RESOLVERS = ("hydra", "oc.env", "rlhf.pick", "rlhf.source")
"""Functions that a reference may call; others could build further references, which nobody counts."""
MOST_REFERENCES = 10_000
"""The shipped configuration takes a few hundred."""
LONGEST = 2**20
"""Bytes of a frozen configuration; a real one has a few thousand."""

Path: TypeAlias = tuple[str, ...]
_CALL = re.compile(r"\$\{\s*([^{}:$\s]+)\s*:")
_REFERENCE = re.compile(r"\$\{\s*([^{}:$\s]+)\s*\}")
_REFERENCE_IN_NAME = re.compile(r"\$\{[^{}:]*\$\{")


def refuse_code(whose: str, error: Exception) -> None:
    """UserError if transformers gave up because the model in `whose` ("key=name") brings code of its own."""
    if "custom code" in str(error):
        raise UserError(
            f"{whose} needs code of its own (auto_map in its json files), which rlhf-cli never runs; choose"
            " a model that transformers knows by itself."
        ) from error


def leaves(values: Any, prefix: Path = ()) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that holds no further keys."""
    if isinstance(values, Mapping | list):
        for key, value in _items(values):
            yield from leaves(value, (*prefix, key))
    else:
        yield ".".join(prefix), values


def check_text(text: str) -> None:
    """Raises ValueError for yaml that could grow beyond its own length: copies of parts, or sheer size."""
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST >> 20} MiB")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
        raise ValueError("it repeats a part of itself by an alias")


def check_frozen(values: Any, whose: str) -> None:
    """UserError if a run's configuration holds a reference, or names code that nobody has vouched for."""
    for key, value in leaves(values):
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{whose} has {key}={value}, but a run's configuration holds values only; delete the run's"
                " folder and run again."
            )
    for key, target in _code(values):
        module = target.rpartition(".")[0]
        if not _vouched(module):
            raise UserError(
                f"{whose} has {key}={target}, which would be imported and is no part of rlhf-cli; if you"
                f" trust that code, say so with {IMPORTS}={module} in the environment."
            )


def vouch(values: Any) -> None:
    """Let this process and its children import what a configuration names: the user gave it himself."""
    for _, target in _code(values):
        module = target.rpartition(".")[0]
        if not _vouched(module):
            os.environ[IMPORTS] = ",".join(filter(None, [os.environ.get(IMPORTS), module]))


def check_references(values: Any) -> None:
    """UserError if references go in a circle, or would be followed more than `MOST_REFERENCES` times."""
    known: dict[Path, int] = {}
    if _References(values, known).under(()) > MOST_REFERENCES:
        # The innermost of those that are too many: what is above only passes it on.
        worst = min((n, path) for path, n in known.items() if n > MOST_REFERENCES)[1]
        raise UserError(
            f"{'.'.join(worst) or 'the configuration'} stands for more than {MOST_REFERENCES} references,"
            " each of which stands for others; write the value out."
        )


class _References:
    """How often references are followed to resolve what stands at a path."""

    def __init__(self, values: Any, known: dict[Path, int]) -> None:
        self._values = values
        self._known = known
        self._open: set[Path] = set()

    def under(self, path: Path) -> int:
        """The number for one value, or for all below it."""
        if path in self._open:
            raise UserError(f"{'.'.join(path)} refers to itself; give it a value of its own.")
        if path not in self._known:
            self._open.add(path)
            self._known[path] = self._count(path)
            self._open.discard(path)
        return self._known[path]

    def _count(self, path: Path) -> int:
        value = self._at(path)
        if isinstance(value, Mapping | list):
            return sum(self.under((*path, key)) for key, _ in _items(value))
        if not isinstance(value, str) or "${" not in value:
            return 0
        key = ".".join(path)
        if _REFERENCE_IN_NAME.search(value):
            raise UserError(
                f"{key}={value} is not allowed: the name in a reference may hold no other; write it out."
            )
        for name in _CALL.findall(value):
            if name not in RESOLVERS:
                raise UserError(
                    f"{key}={value} is not allowed: ${{{name}:...}} is none of {', '.join(RESOLVERS)};"
                    " write the value out."
                )
        return sum(1 + self.under(self._meant(path, name)) for name in _REFERENCE.findall(value))

    def _meant(self, path: Path, name: str) -> Path:
        """The path that is referred to, as far as it can be followed without resolving anything."""
        words = name.lstrip(".")
        up = len(name) - len(words)
        start = path[: len(path) - up] if up else ()
        whole = (*start, *filter(None, re.split(r"[.\[\]]+", words)))
        for end in range(len(start), len(whole)):
            if isinstance(self._at(whole[:end]), str):
                return whole[:end]
        return whole

    def _at(self, path: Path) -> Any:
        value = self._values
        for part in path:
            value = dict(_items(value)).get(part) if isinstance(value, Mapping | list) else None
        return value


def _items(values: Mapping[Any, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return ((str(key), value) for key, value in pairs)


def _code(values: Any) -> Iterator[tuple[str, str]]:
    """Keys whose value is imported, but for this project's own classes."""
    for key, value in leaves(values):
        last = key.rpartition(".")[2]
        if last in CODE and not (last == "_target_" and str(value).startswith(OURS)):
            yield key, str(value)


def _vouched(module: str) -> bool:
    """Whether the user has named this module, or a package that it is in."""
    named = filter(None, map(str.strip, os.environ.get(IMPORTS, "").split(",")))
    return any(module == name or module.startswith(f"{name}.") for name in named)
