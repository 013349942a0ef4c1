"""Rows from files or from the hub, one at a time, each knowing where it stands.

What is wrong with a file as a whole is a UserError. What is wrong with one row is a BadRow, and whether
that ends the run or is counted is decided by the `Drops` that the reader is given.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from rlhf_cli import hub
from rlhf_cli.data.corpus import BadRow, Drops
from rlhf_cli.errors import UserError

LONGEST_LINE = 8 * 2**20
"""Bytes of a line beyond which a file is taken to be something else than rows of text."""
SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet", ".csv.gz", ".csv")
_SHARD = re.compile(r"-\d+-of-(\d+)(-\w+)?\.parquet")  # some writers put a hash behind the numbers


@dataclass(frozen=True)
class Row:
    """Values by column, and where they stand."""

    where: str
    """ "file:line", short enough for a list."""
    values: Mapping[str, object]

    def text(self, column: str) -> str:
        """The text in a column. Raises BadRow unless it is text that can be encoded again."""
        value = self.values.get(column)
        if value is None:
            raise self.bad("missing column", f"there is nothing in column {column}")
        return self.checked(value, f"column {column}")

    def checked(self, value: object, what: str) -> str:
        """`value`, if it is text that can be encoded again; else BadRow about `what`."""
        if not isinstance(value, str):
            raise self.bad("wrong type", f"{what} holds {_kind(value)}, not text")
        if "\0" in value:
            raise self.bad("not text", f"{what} holds a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.bad("not text", f"{what} holds bytes that are no UTF-8") from None
        return value

    def bad(self, cause: str, what: str) -> BadRow:
        """The complaint that `what` is wrong with this row, counted under `cause`."""
        return BadRow(cause, self.where, what)


Reader: TypeAlias = Callable[[Path, Drops], Iterator[Row]]


def locate(path: str | None, stems: Iterable[str]) -> list[list[Path]]:
    """For each stem ("helpful-base/train") its files under the folder `path`.

    One file with any of the suffixes, or parquet in shards: train-00000-of-00002.parquet. Raises
    UserError.
    """
    if path is None:
        raise UserError(
            "data.path is not set, but data.source=path reads local files; add data.path=DIR."
        )
    folder, stems = Path(path).expanduser(), list(stems)
    if not folder.is_dir():
        raise UserError(f"data.path={path} is not a folder that can be read; give an existing one.")
    found = [files_of(folder, stem) for stem in stems]
    for stem, files in zip(stems, found, strict=True):
        if not files:
            raise UserError(
                f"data.path={path} has no {stem}{SUFFIXES[0]} (nor {', '.join(SUFFIXES[1:])}); "
                f"a folder with {', '.join(stems)} in it is needed."
            )
    return found


def files_of(folder: Path, stem: str) -> list[Path]:
    """The files of one stem, none if there are none. Raises UserError if it is not clear which."""
    base = folder / stem
    whole = [file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
    shards = {
        file: int(match[1])
        for file in sorted(base.parent.glob("*.parquet"))
        if (match := _SHARD.fullmatch(file.name.removeprefix(base.name)))
    }
    either = [*whole, *list(shards)[:1]]
    if len(either) > 1:
        raise UserError(
            f"{either[0]} and {either[1].name} could both be meant; keep one of them in the folder."
        )
    if shards and {*shards.values()} != {len(shards)}:
        raise UserError(
            f"{either[0]} is one of {shards[either[0]]} files by its name, but {len(shards)} are there;"
            " complete the set."
        )
    return whole or list(shards)


def pinned(key: str, repository: str, revision: str | None) -> str:
    """The revision, if it is a commit. Raises UserError: branches move, but a key means one set of rows."""
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(
            f"{key}={revision or 'null'} is no commit of {repository}, whose rows may change; give the"
            f" 40 hexadecimal digits of one, as its page on the hub lists them, with {key}=COMMIT."
        )
    return revision


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes in the order given; their names and places do not matter."""
    sha = hashlib.sha256()
    for file in files:
        try:
            sha.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise _unreadable(file, error) from error
    return sha.hexdigest()


def read(file: Path, drops: Drops) -> Iterator[Row]:
    """The rows of a file by its suffix; unreadable rows go to `drops`. Raises UserError."""
    reader = next((how for suffix, how in READERS.items() if file.name.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{file} is of no kind that is read; give {', '.join(SUFFIXES)}.")
    empty, before = True, {cause: len(rows) for cause, rows in drops.causes.items()}
    try:
        for row in reader(file, drops):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error
    if empty:
        found = ((cause, rows[before.get(cause, 0) :]) for cause, rows in drops.causes.items())
        why = next((f" ({cause} at {new[0]})" for cause, new in found if new), "")
        raise UserError(f"{file} holds no usable row{why}; give a file with rows.")


def read_hub(
    repository: str, revision: str, split: str, columns: Sequence[str], folder: str | None = None
) -> Iterator[Row]:
    """The rows of one split of a dataset on the hub, or of one folder of it, at a pinned commit.

    columns: those without which the dataset is the wrong one; all columns are in the rows.
    """
    place = _on_hub(repository, revision)
    import datasets

    try:
        table = datasets.load_dataset(**place, data_dir=folder, split=split)
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
    for number, row in enumerate(table, 1):
        yield Row(f"{name}:{number}", row)


def hub_splits(repository: str, revision: str) -> list[str]:
    """What the splits of a dataset on the hub are called."""
    place = _on_hub(repository, revision)
    import datasets

    try:
        return list(datasets.get_dataset_split_names(**place))
    except Exception as error:  # as above
        raise _no_hub(repository, f"could not be loaded ({type(error).__name__})") from error


def _on_hub(repository: str, revision: str) -> dict[str, str]:
    """Where `datasets` is to look for a dataset: on the hub, or in its cache if the hub is out of reach.

    Left to itself without the hub, it would take whatever commit it had read last.
    """
    if not hub.is_offline() and not hub.out_of_reach():
        return {"path": repository, "revision": revision}
    folder = hub.cached_dataset(repository, revision)
    if folder is None:
        tried = "HF_HUB_OFFLINE=1" if hub.is_offline() else f"{hub.address()} does not answer"
        raise _no_hub(repository, f"is not in the cache at commit {revision} and {tried}")
    for file in sorted(folder.rglob("*.parquet")):
        if match := _SHARD.search(file.name):
            files_of(file.parent, file.name[: match.start()])  # half a set is no set
    hub.work_offline()
    return {"path": str(folder)}


def _json_lines(file: Path, drops: Drops) -> Iterator[Row]:
    with _opened(file) as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{short(file)}:{number}"
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST_LINE)
                drops.bad(
                    BadRow("line too long", where, f"it is longer than {LONGEST_LINE >> 20} MiB")
                )
            elif line.strip():
                try:
                    yield Row(where, _json_object(line.removeprefix(b"\xef\xbb\xbf"), where))
                except BadRow as bad:
                    drops.bad(bad)


def _json_object(line: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow("not text", where, f"byte {error.start + 1} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow("invalid JSON", where, f"it is not valid JSON ({error.msg})") from None
    except (RecursionError, ValueError):
        raise BadRow("invalid JSON", where, "it is not JSON that can be read") from None
    if not isinstance(value, dict):
        raise BadRow("wrong type", where, f"it holds {_kind(value)}, not an object with columns")
    return value


def _comma_separated(file: Path, drops: Drops) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    # Bytes that are no UTF-8 come through as lone surrogates, which `Row.text` refuses row by row.
    with _opened(file) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="")
        table = csv.reader(text, strict=True)
        columns: list[str] = []
        while True:
            where = f"{short(file)}:{table.line_num + 1}"
            try:
                values = next(table, None)
            except csv.Error as error:
                # A quote that is not closed takes in the rows behind it, and nobody knows how many.
                if not columns or where != f"{short(file)}:{table.line_num}":
                    raise UserError(
                        f"{where}: the row that begins here is not valid CSV ({error}), and without it"
                        " those behind it cannot be read; mend its quotes."
                    ) from error
                drops.bad(BadRow("invalid CSV", where, f"it is not valid CSV ({error})"))
                continue
            if values is None:
                return
            if not columns:
                columns = values
            elif len(values) > len(columns):
                drops.bad(BadRow("invalid CSV", where, "it has more values than the header names"))
            elif values:
                yield Row(where, dict(zip(columns, values, strict=False)))


def _parquet(file: Path, drops: Drops) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{short(file)}:{number}", values)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".parquet": _parquet,
    ".csv": _comma_separated,
    ".csv.gz": _comma_separated,
}


def _opened(file: Path) -> BinaryIO:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def short(file: Path) -> str:
    """A file's name with its folder's."""
    return "/".join(file.parts[-2:])


def _kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "nothing" if value is None else names.get(type(value), "an object")


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"{file} cannot be read to its end ({reason}); replace it with a whole copy.")


def _no_hub(repository: str, what: str) -> UserError:
    return UserError(
        f"data.source=hub, but {repository} {what}: use data.source=path data.path=DIR for local "
        "files, data.source=embedded with model=nano for the built-in corpus, or HF_HUB_OFFLINE=1 "
        "with a filled cache."
    )
