"""A disk of its own that is full at the very moment at which a process opens, makes or renames a given file.

Standard library alone: it is also loaded into launched processes, before anything else (`SITE`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FILLER = ".filler"
VARIABLE = "FULL_WHEN"
"""`EVENT PART DISK`: what a launched process waits for."""
SITE = f"import os, runpy\nif {VARIABLE!r} in os.environ:\n    runpy.run_path({__file__!r})['listen']()\n"
"""For a `sitecustomize.py`."""


def fill(disk: Path, left: int = 0) -> None:
    """Writes until so many bytes are left."""
    block = bytes(2**16)
    with (disk / FILLER).open("ab", buffering=0) as file:
        try:
            while left == 0 or free(disk) > left:
                if not file.write(block):
                    return
        except OSError:
            return


def free(disk: Path) -> int:
    """Bytes."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def clear(disk: Path) -> None:
    """Makes room again."""
    (disk / FILLER).unlink()


class Trigger:
    """Fills the disk when an audited event first names a path with a part in it.

    event: open, os.mkdir or os.rename, before it is carried out.
    """

    def __init__(self) -> None:
        self.event, self.part, self.disk, self.skip = "", "", Path(), 0
        sys.addaudithook(self._hear)  # for good: Python has no way to take it back

    def set(self, event: str, part: str, disk: Path, skip: int = 0) -> None:
        """skip: how many times to let it pass."""
        self.part, self.disk, self.skip, self.event = part, disk, skip, event

    def _hear(self, event: str, given: tuple[object, ...]) -> None:
        if event != self.event or not self.event or self.part not in str(given[0]):
            return
        if self.skip:
            self.skip -= 1
            return
        self.event = ""
        fill(self.disk)


def listen() -> None:
    """As the environment says."""
    event, part, disk = os.environ[VARIABLE].split(" ")
    Trigger().set(event, part, Path(disk))
