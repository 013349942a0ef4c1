"""`rlhf data check`: what it says of good data and of bad, and how it ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Rlhf

TAIL = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop.\n"


def write(name: str, rows: list[dict[str, Any]], tail: str = "") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}?", "chosen": " a\n", "rejected": " b"} for n in range(count)]


def test_good_data_are_counted_shown_and_ready_to_train_on(rlhf: Rlhf) -> None:
    rows = [*pairs(38), *pairs(2), {"prompt": "alone", "source": "web"}, {"prompt": "alone, too"}]
    write("my data/prefs.jsonl", rows)
    code, lines, err = rlhf("data", "check", "my data/prefs.jsonl", "data.name=prefs")
    assert (code, err) == (0, "")
    assert lines == [
        "prefs             training  held-out",
        "rows: preference        38         2",
        "rows: prompt             1         1",
        "demonstrations          36         2",
        "pairs                   38         2",
        "prompts                 37         3",
        "",
        "repeated: 2 of 38 training pairs",
        "not read: source",
        "",
        "the first one, as a run reads it",
        "prompt    'p0?'",
        "chosen    ' a\\n'",
        "rejected  ' b'",
        "next: rlhf train data=custom data.name=prefs 'data.path=my data/prefs.jsonl'",
    ]
    planned, out, _ = rlhf("plan", *shlex.split(lines[-1])[3:])
    assert planned == 0 and "rl/p3o_v2-prefs-nano-s1-" in "".join(out)


BAD: list[dict[str, Any]] = [
    *({"prompt": f"q{n}", "chosen": "a", "rejected": "a"} for n in range(5)),
    {"prompt": "r", "chosen": "a", "rejected": " "},
    {"prompt": "s", "completion": "a"},
]


def test_bad_data_are_listed_whole_and_end_as_a_run_would(rlhf: Rlhf) -> None:
    write("d/train.jsonl", [*pairs(40), *BAD], "{oops\n")
    write("d/test.jsonl", pairs(2))
    code, lines, err = rlhf("data", "check", "d")
    assert code == 2
    assert err == f"error: d/train.jsonl:41: chosen and rejected are the same{TAIL}"
    assert lines[:13] == [
        "custom            training  held-out",
        "rows: preference        38         2",
        "demonstrations          38         2",
        "pairs                   38         2",
        "prompts                 38         2",
        "",
        "left out                rows  where",
        "identical pair             5  d/train.jsonl:41, d/train.jsonl:42,",
        "                              d/train.jsonl:43, ...",
        "empty answer               1  d/train.jsonl:46",
        "missing column             1  d/train.jsonl:47",
        "invalid JSON               1  d/train.jsonl:48",
        "first turn is held out     2  d/train.jsonl:1, d/train.jsonl:2",
    ]
    assert not any(line.startswith("next:") for line in lines)
    code, dropped, err = rlhf("data", "check", "d", "data.on_bad_row=drop")
    assert (code, err, dropped[: len(lines)]) == (0, "", lines)
    assert dropped[-1] == "next: rlhf train data=custom data.on_bad_row=drop data.path=d"


def test_rows_on_held_out_turns_are_left_out_but_are_no_fault(rlhf: Rlhf) -> None:
    write("d/train.jsonl", pairs(4))
    write("d/test.jsonl", pairs(2))
    code, lines, err = rlhf("data", "check", "d")
    assert (code, err) == (0, "")
    assert "first turn is held out     2  d/train.jsonl:1, d/train.jsonl:2" in lines


def test_data_without_pairs_train_as_far_as_they_go(rlhf: Rlhf) -> None:
    write("demos.jsonl", [{"prompt": f"p{n}", "response": "x" * 300} for n in range(20)])
    code, lines, err = rlhf("data", "check", "demos.jsonl")
    assert (code, err) == (0, "")
    assert lines[6:8] == [
        "no training pairs: a reward model needs some; stage=sft does not",
        "no held-out pairs: a reward model needs some; stage=sft does not",
    ]
    assert lines[-1] == "next: rlhf train data=custom data.path=demos.jsonl stage=sft"
    assert max(map(len, lines)) <= 80


def test_data_that_no_run_can_begin_with_are_counted_all_the_same(rlhf: Rlhf) -> None:
    write("prompts.jsonl", [{"prompt": f"p{n}"} for n in range(20)])
    code, lines, err = rlhf("data", "check", "prompts.jsonl")
    assert code == 2 and "rows: prompt          19         1" in lines
    assert err == (
        "error: data.path=prompts.jsonl: no row of the training split has an answer to imitate, with"
        " which every run begins (SFT); add rows with prompt and response, with messages, or with chosen"
        " and rejected.\n"
    )


def test_where_every_row_is_bad_every_cause_is_listed(rlhf: Rlhf) -> None:
    write("bad.jsonl", BAD)
    code, lines, err = rlhf("data", "check", "bad.jsonl", "data.on_bad_row=drop")
    assert code == 2 and "identical pair     5  bad.jsonl:1, bad.jsonl:2, bad.jsonl:3, ..." in lines
    assert "no row is left for the training split (7 left out)" in err


def test_control_characters_of_the_data_do_not_reach_the_terminal(rlhf: Rlhf) -> None:
    row = {"prompt": "p\x1b[31m", "response": "\x9b2J", "no\x1bte": 1}
    write("rows.jsonl", [row, row | {"prompt": "q"}])
    code, lines, _ = rlhf("data", "check", "rows.jsonl")
    assert code == 0 and "not read: 'no\\x1bte'" in lines
    assert all(line.isprintable() for line in lines)


def test_other_data_are_checked_by_the_words_that_train_on_them(rlhf: Rlhf) -> None:
    said = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [{"chosen": said.format(n, "a"), "rejected": said.format(n, "b")} for n in range(4)]
    write("hh/helpful-base/train.jsonl", [*rows, {"chosen": "x", "rejected": "y"}])
    write("hh/helpful-base/test.jsonl", rows[:1])
    words = ["data=hh", "data.source=path", "data.path=hh"]
    code, lines, err = rlhf("data", "check", *words)
    assert (code, err) == (0, "")
    assert lines[:4] == [
        "hh              training  held-out",
        "demonstrations         3         1",
        "pairs                  3         1",
        "prompts                3         1",
    ]
    assert "broken role order          1  helpful-base/train.jsonl:5" in lines
    assert lines[-1] == f"next: rlhf train {' '.join(words)}"
    code, _, err = rlhf("data", "check", *words, "data.on_bad_row=error")
    assert code == 2 and err.startswith("error: helpful-base/train.jsonl:5: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["nowhere"],
            "data.path=nowhere is neither a file nor a folder that can be read; give one.",
        ),
        (["data=nope"], "data=nope is not a choice; choose one of custom, "),
        (["data=custom"], "data.path is not set; add data.path=FILE, or data.path=DIR."),
        (["x.jsonl", "y.jsonl"], "y.jsonl cannot be read as KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(rlhf: Rlhf, words: list[str], says: str) -> None:
    code, lines, err = rlhf("data", "check", *words)
    assert (code, lines) == (2, []) and says in err and err.count("\n") == 1


def test_help_shows_what_to_type(rlhf: Rlhf) -> None:
    code, lines, _ = rlhf("data", "check", "--help")
    assert code == 0
    assert "    rlhf data check chat.parquet data.template=transcript" in lines
    assert "  check    Read every row and list the bad ones." in rlhf("data", "--help")[1]
    assert (
        rlhf("data")[2] == "error: Missing command; `rlhf data --help` has the words there are.\n"
    )
