"""What a dotted path in the configuration names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rlhf_cli.errors import UserError


def named(key: str, path: str, kind: str) -> Any:
    """What `key`=`path` names, a class or a function as `kind` says. Raises UserError if it is not there."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{key}={path} cannot be imported ({first}); give the dotted path of a {kind} in an installed"
            " module or in the working directory."
        ) from error
