"""Writing to a disk that may be full, read-only or pulled away half-way."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_cli.errors import UserError

LEAST_FREE = 50 * 2**20
"""Bytes without which no run is begun: a nano run with its checkpoints takes about half of it."""

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a file of that name is in the way",
}


@contextmanager
def disk(path: Path, key: str = "paths.runs") -> Iterator[None]:
    """Turn the disk's own refusals (full, read-only, forbidden) into one sentence about `path`.

    key: what chooses its folder. Other errors pass through: they are defects. Raises UserError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _CAUSES:
            raise
        raise UserError(
            f"cannot write {path}: {_CAUSES[error.errno]}; mend that, or choose"
            f" another folder with {key}=DIR."
        ) from error


def atomic_write(path: Path, data: str | bytes) -> None:
    """Replace a file whole or not at all: a reader sees the old contents or the new, never a part.

    The bytes reach the disk before the name does, so a crash cannot leave an empty file either.
    Raises UserError if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def to_disk(folder: Path) -> None:
    """Bring the files of a folder, and their names, to the disk itself, so that a crash finds them whole."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(root: Path) -> None:
    """Make sure that runs can be kept in `root`, by writing there; creates the folder.

    Raises UserError if it cannot be written or has less than `LEAST_FREE` bytes left.
    """
    try:
        with disk(root):
            root.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # of /proc, say
        raise UserError(
            f"paths.runs={root} cannot be created; choose another folder with paths.runs=DIR."
        ) from error
    trial = root / f".trial.{os.getpid()}"
    atomic_write(trial, "can this folder be written?\n")
    trial.unlink()
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE:
        raise UserError(
            f"paths.runs={root} has {free // 2**20} MB of disk left, a run needs at least"
            f" {LEAST_FREE // 2**20} MB; free some space, or choose another folder with"
            " paths.runs=DIR."
        )


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
