"""Complaints of other libraries (pydantic, Hydra, OmegaConf, yaml) said in one sentence of ours.

A sentence names the key, the value, what is allowed and the fix. Errors of any other origin are
defects and are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from rlhf_cli.errors import UserError

KEYS = {
    "train": "`rlhf train --cfg job` prints every key there is",
    "winrate": "`rlhf winrate --help` names those there are",
}
"""Where to look for keys, by the list of defaults they are composed from."""


def of_values(
    error: ValidationError, prefix: str, values: Mapping[Any, Any], root: str = "train"
) -> UserError:
    """Say the first fault that pydantic found in the values under the key `prefix`."""
    fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in (prefix, *_keys(fault["loc"], values)) if part != "")
    value = "null" if fault["input"] is None else fault["input"]
    match fault["type"]:
        case "union_tag_invalid":
            tag, allowed = fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "")
            return UserError(f"{key}.kind={tag} is not allowed: choose one of {allowed}.")
        case "union_tag_not_found":
            return UserError(f"{key}.kind is missing; give it a value with {key}.kind=VALUE.")
        case "missing" | "missing_argument":
            return UserError(f"{key} is missing; give it a value with {key}=VALUE.")
        case "unexpected_keyword_argument":
            given = key if isinstance(value, dict) else f"{key}={value}"
            return UserError(f"{given} is not a key of the configuration; {KEYS[root]}.")
        case "tuple_type" | "list_type":
            must = f"be a list, as in {key}=[A,B]"
        case "dataclass_type":
            must = "be a group of keys"
        case "value_error" | "assertion_error":
            must = str(fault["ctx"]["error"]).rstrip(".")
        case _:
            must = fault["msg"].removeprefix("Input should ").partition(", unable")[0]
    return UserError(f"{key}={value} is not allowed: it must {must}; give another value.")


def _keys(path: Sequence[int | str], values: Any) -> Iterator[int | str]:
    """The keys on the way to a fault: pydantic also names the kind that it took a group of keys for."""
    for part in path:
        if isinstance(values, Mapping) and part not in values and values.get("kind") == part:
            continue
        yield part
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]


def of_composition(error: Exception, root: str = "train") -> UserError | None:
    """Say what Hydra, OmegaConf or the yaml parser refused; None if the error is none of theirs."""
    # Hydra's classes are looked up here: a worker explains yaml without ever importing Hydra.
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    if isinstance(error, UserError):
        return error
    line = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    if isinstance(error, MissingConfigException) and (missing := error.missing_cfg_file):
        group, _, choice = str(missing).rpartition("/")
        choices = [option for option in error.options or () if not option.startswith("_")]
        allowed = (
            f"choose one of {', '.join(choices)}" if choices else f"there is no {group} to choose"
        )
        return UserError(f"{group}={choice} is not a choice; {allowed}.")
    if isinstance(error, OverrideParseException):
        return UserError(
            f"{error.override} cannot be read as KEY=VALUE ({line}); put quotes around a value with"
            " spaces, commas, brackets or equals signs."
        )
    # A few of Hydra's complaints are bare ValueErrors.
    if isinstance(error, (HydraException, ValueError)) and not isinstance(
        error, OmegaConfBaseException
    ):
        if match := re.search(r"Could not (?:override|delete\S*(?: \S+)*) '([^']+)'", line):
            return UserError(f"{match[1]} is not a key of the configuration; {KEYS[root]}.")
        if match := re.search(r"Ambiguous value for argument '(.+)'", line):
            return UserError(f"{match[1]} names several values; add -m to run one after the other.")
        return UserError(f"the configuration cannot be composed: {line}.")
    if isinstance(error, OmegaConfBaseException):
        # Our own resolvers refuse a value by a whole UserError, which OmegaConf wraps.
        ours = "UserError raised while resolving interpolation: "
        if line.startswith(ours):
            return UserError(f"{line.removeprefix(ours)}.")
        where = re.search(r"full_key: (\S+)", str(error))
        return UserError(f"{where[1]}: {line}." if where else f"{line}.")
    if isinstance(error, YAMLError):
        return UserError(f"a yaml file cannot be read: {' '.join(str(error).split())}.")
    return None
