"""Rows from files and the hub: what is read, what is left out and why, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli import hub
from rlhf_cli.data import rows
from rlhf_cli.data.corpus import BadRow, Drops
from rlhf_cli.errors import UserError
from tests.data_samples import COMMIT, HH_ROWS, TLDR_ROWS, talk, write_bytes, write_rows

HOW_TO_GO_ON = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
FOUND = [
    {"a": "plain", "b": "1"},
    {"a": "lines\n\nand, commas", "b": 'and "quotes"'},
    {"a": "é€😀", "b": " "},
]


def texts(files: list[Path], drops: Drops | None = None) -> list[dict[str, str]]:
    """What stands in columns a and b."""
    drops = drops or Drops("error")
    found = (row for file in files for row in rows.read(file, drops))
    return [made for _, made in drops.parsed(found, lambda row: {c: row.text(c) for c in "ab"})]


@pytest.mark.parametrize("suffix", rows.SUFFIXES)
def test_a_file_of_every_kind_gives_the_same_rows(tmp_path, suffix):
    write_rows(tmp_path / f"x/train{suffix}", FOUND)
    [files] = rows.locate(str(tmp_path), ["x/train"])
    assert texts(files) == FOUND


def test_parquet_in_shards_is_read_in_their_order(tmp_path):
    for place, name in enumerate(("00000-of-00003", "00001-of-00003", "00002-of-00003-9f3ac")):
        write_rows(tmp_path / f"x/train-{name}.parquet", FOUND[place : place + 1])
    write_rows(tmp_path / "x/trainer-00000-of-00001.parquet", FOUND)
    [files] = rows.locate(str(tmp_path), ["x/train"])
    assert texts(files) == FOUND
    assert [row.where for row in rows.read(files[1], Drops("error"))] == [
        "x/train-00001-of-00003.parquet:1"
    ]


def test_an_incomplete_set_of_shards_is_refused(tmp_path):
    for number in (0, 2):
        write_rows(tmp_path / f"train-0000{number}-of-00003.parquet", FOUND)
    with pytest.raises(UserError) as error:
        rows.locate(str(tmp_path), ["train"])
    assert str(error.value) == (
        f"{tmp_path}/train-00000-of-00003.parquet is one of 3 files by its name, but 2 are there; "
        "complete the set."
    )


@pytest.mark.parametrize("other", ["train.csv", "train-00000-of-00001.parquet"])
def test_two_files_of_which_either_could_be_meant_are_refused(tmp_path, other):
    write_rows(tmp_path / "train.jsonl", FOUND)
    write_rows(tmp_path / other, FOUND)
    with pytest.raises(UserError) as error:
        rows.locate(str(tmp_path), ["train"])
    assert str(error.value) == (
        f"{tmp_path}/train.jsonl and {other} could both be meant; keep one of them in the folder."
    )


def test_a_path_that_is_missing_or_lacks_a_file_is_refused(tmp_path):
    for path, says in (
        (None, "data.path is not set, but data.source=path reads local files; add data.path=DIR."),
        (
            f"{tmp_path}/nowhere",
            f"data.path={tmp_path}/nowhere is not a folder that can be read; give an existing one.",
        ),
        (
            str(tmp_path),
            f"data.path={tmp_path} has no a/train.jsonl.gz (nor .jsonl, .parquet, .csv.gz, .csv); "
            "a folder with a/train, a/test in it is needed.",
        ),
    ):
        with pytest.raises(UserError) as error:
            rows.locate(path, ["a/train", "a/test"])
        assert str(error.value) == says


def test_blank_lines_a_byte_order_mark_and_carriage_returns_are_no_fault(tmp_path):
    lines = b"\xef\xbb\xbf" + b"\r\n  \n\r\n".join(json.dumps(row).encode() for row in FOUND)
    file = write_bytes(tmp_path / "train.jsonl", lines)
    assert texts([file]) == FOUND
    assert [row.where.rpartition(":")[2] for row in rows.read(file, Drops("error"))] == [*"147"]


def test_a_row_of_csv_stands_where_it_begins(tmp_path):
    file = write_bytes(tmp_path / "x/train.csv", b'a,b\n"1\n2",3\n4,5\n')
    found = [(row.where, row.text("a")) for row in rows.read(file, Drops("error"))]
    assert found == [("x/train.csv:2", "1\n2"), ("x/train.csv:4", "4")]


LONG = b"x" * (10 * 2**20)
GOOD = b'{"a": "1", "b": "2"}'
PROPERTY = "Expecting property name enclosed in double quotes"
BAD_LINES = {
    "broken": (b"{oops", "invalid JSON", f"it is not valid JSON ({PROPERTY})"),
    "cut": (GOOD[:-1], "invalid JSON", "it is not valid JSON (Expecting ',' delimiter)"),
    "nested": (b"[" * 100_000, "invalid JSON", "it is not JSON that can be read"),
    "not UTF-8": (b'{"a": "\xff", "b": "2"}', "not text", "byte 8 is no UTF-8"),
    "UTF-16": (GOOD.decode().encode("utf-16-le"), "invalid JSON", f"it is not valid JSON ({PROPERTY})"),
    "10 MB": (b'{"a": "' + LONG + b'", "b": "2"}', "line too long", "it is longer than 8 MiB"),
    "a list": (b'["1", "2"]', "wrong type", "it holds a list, not an object with columns"),
    "a number": (b"17", "wrong type", "it holds a number, not an object with columns"),
    "null": (b"null", "wrong type", "it holds nothing, not an object with columns"),
    "no column": (b'{"a": "1"}', "missing column", "there is nothing in column b"),
    "null in it": (b'{"a": "1", "b": null}', "missing column", "there is nothing in column b"),
    "number in it": (b'{"a": 1, "b": "2"}', "wrong type", "column a holds a number, not text"),
    "bool in it": (b'{"a": true, "b": ""}', "wrong type", "column a holds true or false, not text"),
    "list in it": (b'{"a": ["1"], "b": "2"}', "wrong type", "column a holds a list, not text"),
    "object in it": (b'{"a": {}, "b": "2"}', "wrong type", "column a holds an object, not text"),
    "NUL": (b'{"a": "1\\u0000", "b": "2"}', "not text", "column a holds a NUL character"),
    "bare NUL": (GOOD[:-2] + b'\0"}', "invalid JSON", "it is not valid JSON (Invalid control character at)"),
    "half a pair": (b'{"a": "\\ud83d"}', "not text", "column a holds bytes that are no UTF-8"),
}  # fmt: skip
LIMIT = "field larger than field limit (8388608)"
BAD_RECORDS = {
    "too many": (b"1,2,3", "invalid CSV", "it has more values than the header names"),
    "too few": (b"1", "missing column", "there is nothing in column b"),
    "quote": (b'"1"x,2', "invalid CSV", "it is not valid CSV (',' expected after '\"')"),
    "not UTF-8": (b"1,\xff", "not text", "column b holds bytes that are no UTF-8"),
    "NUL": (b"1,\0", "not text", "column b holds a NUL character"),
    "10 MB": (LONG + b",2", "invalid CSV", f"it is not valid CSV ({LIMIT})"),
}


def refused_or_counted(file: Path, before: bytes, good: bytes, bad: tuple[bytes, str, str]) -> None:
    """A file of a good row, a bad one in line 3 and a good one."""
    line, cause, what = bad
    write_bytes(file, b"\n".join((before, line, good)))
    where = f"x/{file.name}:3"
    drops = Drops("drop")
    assert texts([file], drops) == [{"a": "1", "b": "2"}] * 2
    assert drops.causes == {cause: [where]}
    with pytest.raises(BadRow) as error:
        texts([file], Drops("error"))
    assert str(error.value) == f"{where}: {what}{HOW_TO_GO_ON}"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_json_is_refused_in_one_sentence_or_left_out(tmp_path, suffix, bad):
    refused_or_counted(tmp_path / f"x/train{suffix}", GOOD + b"\n", GOOD, bad)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("bad", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_line_of_csv_is_refused_in_one_sentence_or_left_out(tmp_path, suffix, bad):
    refused_or_counted(tmp_path / f"x/train{suffix}", b"a,b\n1,2", b"1,2", bad)


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (b'a,b\n1,2\n3,"4\n5,6\n', 3, "unexpected end of data"),
        (b'a,b\n1,2\n"3\n4"x,5\n6,7\n', 3, "',' expected after '\"'"),
        (b'"a"x,b\n1,2\n', 1, "',' expected after '\"'"),
    ],
)
def test_csv_of_which_the_rest_cannot_be_read_is_a_fault_of_the_file(
    tmp_path, policy, text, line, why
):
    file = write_bytes(tmp_path / "x/train.csv", text)
    with pytest.raises(UserError) as error:
        texts([file], Drops(policy))
    assert str(error.value) == (
        f"x/train.csv:{line}: the row that begins here is not valid CSV ({why}), and without it those "
        "behind it cannot be read; mend its quotes."
    )


def torn(why: str) -> str:
    return f"cannot be read to its end ({why}); replace it with a whole copy."


CUT = torn("Compressed file ended before the end-of-stream marker was reached")
CODES = torn("Error -3 while decompressing data: invalid code lengths set")
UTF8 = torn("'utf-8' codec can't decode byte 0xff in position 2: invalid start byte")
EMPTY = "holds no usable row; give a file with rows."
KINDS = "is of no kind that is read; give .jsonl.gz, .jsonl, .parquet, .csv.gz, .csv."


@pytest.mark.parametrize("policy", ["error", "drop"])
@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("t.jsonl.gz", lambda whole: whole[:-12], CUT),
        ("t.jsonl.gz", lambda whole: b"not compressed", torn("Not a gzipped file (b'no')")),
        ("t.jsonl.gz", lambda whole: whole[:12] + b"\xff\xff\xff" + whole[15:], CODES),
        ("t.csv.gz", lambda whole: whole[:-12], CUT),
        ("t.jsonl", lambda whole: b"", EMPTY),
        ("t.jsonl", lambda whole: b"\n \n", EMPTY),
        ("t.csv", lambda whole: b"", EMPTY),
        ("t.csv", lambda whole: b"a,b\n", EMPTY),
        ("t.parquet", lambda whole: b"", torn("Parquet file size is 0 bytes")),
        ("t.parquet", lambda whole: whole.replace(b"plain", b"pl\xffin"), UTF8),
        ("t.txt", lambda whole: whole, KINDS),
    ],
)
def test_a_file_that_is_bad_as_a_whole_is_refused_whatever_is_done_about_rows(
    tmp_path, policy, name, spoil, says
):
    file = write_rows(tmp_path / name, FOUND * 20)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError) as error:
        texts([file], Drops(policy))
    assert str(error.value) == f"{file} {says}" and not isinstance(error.value, BadRow)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    file = write_rows(tmp_path / "t.parquet", FOUND)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"t\.parquet cannot be read to its end \(Parquet magic"):
        texts([file])


def test_a_folder_that_cannot_be_read_as_a_file_is_refused(tmp_path):
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(UserError, match=r"t\.jsonl cannot be read to its end \(Is a directory\)"):
        texts([tmp_path / "t.jsonl"])


def test_a_file_of_nothing_but_bad_rows_is_not_taken_for_an_empty_success(tmp_path):
    file = write_bytes(tmp_path / "t.jsonl", b"{oops\n{oops\n")
    drops = Drops("drop")
    with pytest.raises(
        UserError, match=r"holds no usable row \(invalid JSON at .*t\.jsonl:1\); give a"
    ):
        texts([file], drops)
    assert {cause: len(found) for cause, found in drops.causes.items()} == {"invalid JSON": 2}


def test_the_fingerprint_sees_bytes_and_order_and_not_the_place(tmp_path):
    first = write_bytes(tmp_path / "a", b"1")
    second = write_bytes(tmp_path / "b", b"2")
    moved = write_bytes(tmp_path / "elsewhere/c", b"1")
    seen = rows.fingerprint([first, second])
    assert rows.fingerprint([moved, second]) == seen
    assert rows.fingerprint([second, first]) != seen
    write_bytes(first, b"12")
    write_bytes(second, b"")
    assert rows.fingerprint([first, second]) != seen  # where one file ends and the next begins


@pytest.mark.parametrize(
    "revision", [None, "main", "v1.0", COMMIT[:7], COMMIT.upper(), COMMIT + "\n"]
)
def test_only_a_whole_commit_pins_the_rows_of_the_hub(revision):
    assert rows.pinned("data.revision", "a/b", COMMIT) == COMMIT
    with pytest.raises(UserError) as error:
        rows.pinned("data.revision", "a/b", revision)
    assert str(error.value) == (
        f"data.revision={revision or 'null'} is no commit of a/b, whose rows may change; give the 40 "
        "hexadecimal digits of one, as its page on the hub lists them, with data.revision=COMMIT."
    )


@pytest.mark.parametrize("dataset", [HH_ROWS, TLDR_ROWS], ids=["hh", "tldr"])
def test_a_branch_is_refused_by_the_plan_and_by_the_reader_before_the_hub_is_asked(
    dataset, monkeypatch
):
    monkeypatch.setattr(rows, "read_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    loose = replace(dataset, source="hub", revision="main")
    for act in (loose.fingerprint, loose.load):
        with pytest.raises(UserError, match=r"^data\.revision=main is no commit of "):
            act()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of HH: 3 training rows and 1 held-out row."""
    write_rows(tmp_path / "helpful-base/train.jsonl.gz", [talk("a"), talk("b"), talk("c")])
    write_rows(tmp_path / "helpful-base/test.jsonl.gz", [talk("d")])
    return tmp_path


def test_without_a_network_the_hub_fails_within_4_seconds_and_names_three_ways_out(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "_answers", lambda: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        replace(HH_ROWS, source="hub").load()
    assert time.monotonic() - start < 4
    for way in ("data.source=path data.path=DIR", "data.source=embedded", "HF_HUB_OFFLINE=1"):
        assert way in str(error.value)


def test_a_refused_connection_counts_as_no_network(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert not hub._answers()


def test_the_hub_is_asked_for_one_folder_at_the_pinned_commit_and_gives_the_rows_of_files(
    folder, monkeypatch
):
    asked = []

    class Table(list):  # what the library hands back, as far as it is used
        column_names = ("chosen", "rejected")

    def load_dataset(path, data_dir, revision, split):
        asked.append((path, data_dir, revision, split))
        with gzip.open(folder / data_dir / f"{split}.jsonl.gz", "rt") as lines:
            return Table(json.loads(line) for line in lines)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "out_of_reach", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = replace(HH_ROWS, source="hub").load()
    assert corpus.digest == replace(HH_ROWS, path=str(folder)).load().digest
    assert asked == [
        ("Anthropic/hh-rlhf", "helpful-base", COMMIT, "test"),
        ("Anthropic/hh-rlhf", "helpful-base", COMMIT, "train"),
    ]
    write_rows(folder / "helpful-base/train.jsonl.gz", [talk("a"), talk("b", rejected="")])
    corpus = replace(HH_ROWS, source="hub").load()
    assert corpus.drops == {"empty answer": ("Anthropic/hh-rlhf/helpful-base/train:2",)}
    Table.column_names = ("prompt", "response")
    with pytest.raises(UserError, match=r"helpful-base/test has no column chosen"):
        replace(HH_ROWS, source="hub").load()


def test_an_empty_cache_offline_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        replace(HH_ROWS, source="hub").load()
    assert str(error.value).startswith(
        f"data.source=hub, but Anthropic/hh-rlhf is not in the cache at commit {COMMIT} and"
        " HF_HUB_OFFLINE=1: use data.source=path data.path=DIR"
    )
    assert "\n" not in str(error.value)
