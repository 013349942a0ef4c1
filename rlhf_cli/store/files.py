"""Writing to a disk that may be full, read-only or pulled away half-way."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from rlhf_cli.errors import UserError

LEAST_FREE = 50 * 2**20
"""Bytes without which no run is begun: a nano run with its checkpoints takes about half of it."""

MB = 10**6
"""Bytes, where a sentence tells of a disk's room."""

_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than is allowed here (`ulimit -f`)",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a file of that name is in the way",
}


_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers tell of the system's refusals, in errors of their own kinds."""
_NUMPY = re.compile(r"Not enough free space|requested and \d+ written")
"""How numpy does, in an OSError without a number."""


@contextmanager
def disk(path: Path, key: str = "paths.runs", needed: int = 0) -> Iterator[None]:
    """Turn the disk's own refusals (full, read-only, forbidden) into one sentence about `path`.

    key: what chooses its folder; needed: bytes that are about to be written, if known. Other errors pass
    through: they are defects. Raises UserError.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number not in _CAUSES:
            raise
        cause = _CAUSES[number]
        if number == errno.ENOSPC:
            cause += _room(path, needed)
        raise UserError(
            f"cannot write {path}: {cause}; mend that, or choose another folder with {key}=DIR."
        ) from error


def nearest(path: Path) -> Path:
    """The path itself if it is there, else the folder above it that is."""
    whole = path.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def _number(error: Exception) -> int | None:
    """The system's number of what went wrong, whichever library says it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if told := _RUST.search(str(error)):
        return int(told[1])
    return errno.ENOSPC if isinstance(error, OSError) and _NUMPY.search(str(error)) else None


def _room(path: Path, needed: int) -> str:
    """What is left of a full disk, in brackets, where that explains why it is."""
    left = os.statvfs(nearest(path))
    if left.f_files and not left.f_favail:
        return " (no room for another file)"
    free = left.f_bavail * left.f_frsize
    if free > max(needed, LEAST_FREE):  # another disk's, or taken back meanwhile
        return ""
    asked = f", about {needed / MB:.1f} MB are needed" if needed else ""
    return f" ({free / MB:.1f} MB are left{asked})"


def atomic_write(path: Path, data: str | bytes) -> None:
    """Replace a file whole or not at all: a reader sees the old contents or the new, never a part.

    The bytes reach the disk before the name does, so a crash cannot leave an empty file either.
    Raises UserError if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # never through a link that someone has put there
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
    with (
        disk(root),
        TemporaryFile(dir=root) as trial,
    ):  # without a name: a kill leaves nothing of it
        trial.write(b"can this folder be written?\n")
        trial.flush()
        os.fsync(trial.fileno())
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
