"""The name of a run is a hash of what determines its numbers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def canonical(obj: object) -> str:
    """Write a value as JSON in the one way that equal values share.

    Keys are sorted, there is no white space, floats are written by `repr`. A whole float is
    written as an integer, since yaml may say 1, 1.0 or 1e0 and mean the same number; true and 1
    stay apart. Raises TypeError for a type JSON lacks and for keys that are not strings,
    ValueError for nan and inf.
    """
    return json.dumps(
        _plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def key(science: Mapping[str, Any]) -> str:
    """Hash a description of a run to its name: 10 hex digits of sha256 of its canonical JSON."""
    return hashlib.sha256(canonical(science).encode()).hexdigest()[:10]


def _plain(obj: object) -> object:
    match obj:
        case float() if math.isfinite(obj) and obj.is_integer():
            return int(obj)
        case None | bool() | int() | float() | str():
            return obj
        case Mapping():
            if strangers := [k for k in obj if not isinstance(k, str)]:
                raise TypeError(f"keys must be strings, got {strangers[0]!r}")
            return {k: _plain(v) for k, v in obj.items()}
        case Sequence() if not isinstance(obj, bytes):
            return [_plain(v) for v in obj]
    raise TypeError(f"{type(obj).__name__} has no canonical JSON: {obj!r}")
