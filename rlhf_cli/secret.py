"""Keys and passwords: what a run writes down must hold none.

They belong in the environment, and a configuration names the variable (`key_env`), never its value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator

SHORTEST = 8
"""Characters below which a value is no secret worth the name, and would be found everywhere."""

_NAME = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE
)
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
"""Who asks, in an address: user and password."""
_QUERY = re.compile(
    r"([?&][\w.-]*(?:key|token|secret|password|signature)[\w.-]*=)[^&#\s]+", re.IGNORECASE
)


def names_one(variable: str) -> bool:
    """Whether a variable of the environment is called as secrets are."""
    return _NAME.search(variable) is not None


def held(text: str, further: Collection[str] = ()) -> str | None:
    """The variable of the environment whose secret is in the text, or None; further: more of those."""
    return next((name for name, value in _known(further) if value in text), None)


def in_address(text: str) -> bool:
    """Whether an address in the text says who asks, or carries a key."""
    return _USER.search(text) is not None or _QUERY.search(text) is not None


def masked(text: str) -> str:
    """The text with three stars in place of each secret in it."""
    for _, value in _known(()):
        text = text.replace(value, "***")
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


def _known(further: Collection[str]) -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if (name in further or names_one(name)) and len(value) >= SHORTEST:
            yield name, value
