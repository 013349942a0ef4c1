"""Rows of text columns from files in the hub's layout, or from the hub itself.

Whatever is wrong with the input is a UserError that names the file and, if there is one, the line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli import hub
from rlhf_cli.errors import UserError

SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class Row:
    """Text by column, and where it stands ("file:line")."""

    where: str
    text: Mapping[str, str]


def locate(path: str | None, stems: Iterable[str]) -> list[Path]:
    """The file of each stem ("helpful-base/train") under the folder `path`, compressed or not."""
    if path is None:
        raise UserError(
            "data.path is not set, but data.source=path reads local files; add data.path=DIR."
        )
    folder, stems = Path(path).expanduser(), list(stems)
    if not folder.is_dir():
        raise UserError(f"data.path={path} is not a folder that can be read; give an existing one.")
    files = []
    for stem in stems:
        found = [file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
        if not found:
            raise UserError(
                f"data.path={path} has no {stem}{SUFFIXES[0]} (or {SUFFIXES[1]}); "
                f"a folder with {', '.join(stems)} in it is needed."
            )
        files.append(found[0])
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of the files' bytes in the order given; their names and places do not matter."""
    sha = hashlib.sha256()
    for file in files:
        try:
            sha.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise _unreadable(file, error) from error
    return sha.hexdigest()


def read_file(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a JSON-lines file; columns not asked for are left out."""
    name = f"{file.parent.name}/{file.name}"
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Row(f"{name}:{number}", _columns(line, columns, f"{file}:{number}"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def read_hub(
    repository: str, revision: str, split: str, columns: Sequence[str], folder: str | None = None
) -> Iterator[Row]:
    """The rows of one split of a dataset on the hub, or of one folder of it, at a pinned commit."""
    if hub.out_of_reach():
        raise _no_hub(repository, "cannot be reached")
    import datasets

    try:
        table = datasets.load_dataset(repository, data_dir=folder, revision=revision, split=split)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated types, all meaning the same here
        raise _no_hub(repository, f"could not be loaded ({type(error).__name__})") from error
    name = "/".join(part for part in (repository, folder, split) if part)
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(
            f"{name} has no column {missing[0]}; data.hub must name a dataset with the columns "
            f"{', '.join(columns)}."
        )
    for number, row in enumerate(table.select_columns(list(columns)), 1):
        yield Row(f"{name}:{number}", row)


def _columns(line: str, columns: Sequence[str], where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg}); fix or delete the line."
        ) from error
    for column in columns:
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise UserError(
                f"{where} has no text in column {column}; every row needs {', '.join(columns)}: "
                "fix or delete the line."
            )
    return {column: row[column] for column in columns}


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"{file} cannot be read to its end ({reason}); replace it with a whole copy.")


def _no_hub(repository: str, what: str) -> UserError:
    return UserError(
        f"data.source=hub, but {repository} {what}: use data.source=path data.path=DIR for local "
        "files, data.source=embedded with model=nano for the built-in corpus, or HF_HUB_OFFLINE=1 "
        "with a filled cache."
    )
