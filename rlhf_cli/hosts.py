"""Where the workers of a run are started: this host, or those of a hostfile and what of it is used.

The hostfile is DeepSpeed's, a line `NAME slots=N` for each host, and so is the way to choose among its
slots: `NAME[:SLOT[,SLOT...]][@NAME...]`. Read here as well, because a plan has to know how many processes
there will be, and because a mistake is to be told before anything is started.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Launch

HERE = "localhost"
"""The host of a run that has no hostfile."""

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def slots(launch: Launch) -> dict[str, int]:
    """How many workers each host starts, in the order of their ranks. Raises UserError."""
    if launch.hostfile is None:
        return {HERE: launch.processes}
    whole = {host: set(range(count)) for host, count in _listed(launch.hostfile).items()}
    if launch.include:
        used = _chosen("launch.include", launch.include, whole)
    else:
        out = _chosen("launch.exclude", launch.exclude, whole) if launch.exclude else {}
        used = {host: some - out.get(host, set()) for host, some in whole.items()}
    left = {host: len(used[host]) for host in whole if used.get(host)}
    if not left:
        raise UserError(
            f"launch.exclude={launch.exclude} leaves no slot of {launch.hostfile}; exclude fewer."
        )
    return left


def workers(launch: Launch) -> int:
    """How many processes there are, over all hosts. Raises UserError."""
    return sum(slots(launch).values())


def _listed(path: str) -> dict[str, int]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(
            f"launch.hostfile={path} cannot be read ({reason}); name a file with a line `NAME slots=N` for"
            " each host."
        ) from None
    found: dict[str, int] = {}
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or int(match[2]) == 0:
            raise UserError(
                f"launch.hostfile={path} has the line {line!r}; each must be `NAME slots=N`, N at least 1."
            )
        if match[1] in found:
            raise UserError(f"launch.hostfile={path} names {match[1]} twice; give it one line.")
        found[match[1]] = int(match[2])
    if not found:
        raise UserError(
            f"launch.hostfile={path} names no host; give it a line `NAME slots=N` for each."
        )
    return found


def _chosen(key: str, words: str, whole: dict[str, set[int]]) -> dict[str, set[int]]:
    """The slots that some words mean."""
    found: dict[str, set[int]] = {}
    for word in words.split("@"):
        host, _, numbers = word.partition(":")
        if host not in whole:
            raise UserError(
                f"{key}={words} names {host or 'no host'}, but the hostfile has {', '.join(whole)}; choose"
                " among these."
            )
        if not all(number.isdecimal() for number in numbers.split(",")) and numbers:
            raise UserError(
                f"{key}={words} is not allowed; write HOST:SLOT,SLOT@HOST, as host:0,1."
            )
        some = {int(number) for number in numbers.split(",")} if numbers else whole[host]
        if missing := some - whole[host]:
            raise UserError(
                f"{key}={words} names slot {min(missing)} of {host}, which has 0 to {max(whole[host])};"
                " choose among these."
            )
        found[host] = found.get(host, set()) | some
    return found
