"""`rlhf data check` on genuine rows of HH and TL;DR: every count, and every row that is left out.

The numbers are those of the samples' own description, which was written from the files without any code of
the project, and of a count of role marks by hand.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Rlhf

HELPFUL = {
    "prompts differ": [115, 245, 399, 530, 680, 718, 826, 926, 1032],
    "empty answer": [81, 528, 862, 1479],
    "identical pair": [518, 1560],
}
"""The 15 faulty rows of helpful-base/train, by line."""
TWO_IN_A_ROW = [246, 700, 963, 1330]
"""Its rows in which the assistant speaks twice running."""
HARMLESS = {
    "prompts differ": [882, 1166, 1347, 1349, 1408],
    "empty answer": [68, 370, 661, 784],
}


def named(lines: list[str]) -> dict[str, list[str]]:
    """Cause to the rows that the table of rows left out names, each counted as the table counts them."""
    start = next((i for i, line in enumerate(lines) if line.startswith("left out")), len(lines))
    found: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    cause = ""
    for line in lines[start + 1 :]:
        if not line:
            break
        if head := re.match(r"(\S.*?) +(\d+)  (?=\S)", line):
            cause = head[1]
            counts[cause] = int(head[2])
            found[cause] = []
            line = line[head.end() :]
        found[cause] += re.findall(r"[^\s,]+", line)
    assert counts == {cause: len(rows) for cause, rows in found.items()}
    return found


def at(file: str, *numbers: int) -> list[str]:
    return [f"{file}.jsonl.gz:{number}" for number in numbers]


def read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def counts(lines: list[str]) -> dict[str, tuple[int, int]]:
    """What is counted, in the training split and in the held-out one."""
    found = (re.fullmatch(r"(demonstrations|pairs|prompts) +(\d+) +(\d+)", line) for line in lines)
    return {match[1]: (int(match[2]), int(match[3])) for match in found if match}


def test_of_helpful_base_15_faulty_rows_and_4_out_of_turn_are_named_and_no_other(
    rlhf: Rlhf, shared_data: Path
) -> None:
    words = ["data=hh", "data.source=path", f"data.path={shared_data}/hh-rlhf"]
    code, lines, err = rlhf("data", "check", *words, "--all")
    assert (code, err) == (0, "")
    assert sum(map(len, HELPFUL.values())) == 15 and len(TWO_IN_A_ROW) == 4
    assert counts(lines) == {  # 1686 - 15 - 4
        "demonstrations": (1667, 203),
        "pairs": (1667, 203),
        "prompts": (1667, 203),
    }
    train = "helpful-base/train"
    assert named(lines) == {
        **{cause: at(train, *numbers) for cause, numbers in HELPFUL.items()},
        "broken role order": at(train, *TWO_IN_A_ROW),
    }
    assert lines[-1] == f"next: rlhf train {' '.join(words)}"


def test_without_all_three_rows_of_a_cause_are_named(rlhf: Rlhf, shared_data: Path) -> None:
    words = ["data=hh", "data.source=path", f"data.path={shared_data}/hh-rlhf"]
    _, lines, _ = rlhf("data", "check", *words)
    start = lines.index("prompts differ        9  helpful-base/train.jsonl.gz:115,")
    assert [line.strip() for line in lines[start + 1 : start + 3]] == [
        "helpful-base/train.jsonl.gz:245,",
        "helpful-base/train.jsonl.gz:399, ...",
    ]


def test_where_bad_rows_are_an_error_the_first_of_helpful_base_is_said_with_its_line(
    rlhf: Rlhf, shared_data: Path
) -> None:
    words = ["data=hh", "data.source=path", f"data.path={shared_data}/hh-rlhf"]
    code, lines, err = rlhf("data", "check", *words, "data.on_bad_row=error")
    assert code == 2 and not any(line.startswith("next:") for line in lines)
    assert err == (
        "error: helpful-base/train.jsonl.gz:81: the answer in column rejected is empty; mend or delete"
        " the row, or leave such rows out with data.on_bad_row=drop.\n"
    )


def test_of_harmless_base_9_faulty_rows_and_3_out_of_turn_are_named_and_no_text_is_shown(
    rlhf: Rlhf, shared_data: Path
) -> None:
    folder = f"data.path={shared_data}/hh-rlhf"
    words = ["data=hh", "data.source=path", folder, "data.subsets=[harmless-base]"]
    code, lines, err = rlhf("data", "check", *words, "--all")
    assert (code, err) == (0, "")
    assert counts(lines) == {  # 1603 - 9 - 2 and 250 - 1; two training prompts occur twice
        "demonstrations": (1592, 249),
        "pairs": (1592, 249),
        "prompts": (1590, 249),
    }
    train, test = "harmless-base/train", "harmless-base/test"
    assert named(lines) == {
        **{cause: at(train, *numbers) for cause, numbers in HARMLESS.items()},
        "broken role order": at(test, 199) + at(train, 550, 922),
    }
    assert "rows of harmless-base are not shown: they were written to provoke" in lines
    assert not any("Human:" in line for line in lines)


def test_the_two_subsets_of_hh_together_are_the_sum_of_both(rlhf: Rlhf, shared_data: Path) -> None:
    folder = f"data.path={shared_data}/hh-rlhf"
    subsets = "data.subsets=[helpful-base,harmless-base]"
    code, lines, err = rlhf(
        "data", "check", "data=hh", "data.source=path", folder, subsets, "--all"
    )
    assert (code, err) == (0, "")
    assert counts(lines)["pairs"] == (1667 + 1592, 203 + 249)
    assert {cause: len(rows) for cause, rows in named(lines).items()} == {
        "prompts differ": 9 + 5,
        "empty answer": 4 + 4,
        "identical pair": 2,
        "broken role order": 4 + 3,
    }


@pytest.mark.parametrize(("folder", "rows"), [("comparisons_ai", 788), ("comparisons_human", 100)])
def test_of_tldr_every_row_is_used_or_named_as_held_out(
    rlhf: Rlhf, shared_data: Path, folder: str, rows: int
) -> None:
    place = f"data.path={shared_data}/tldr"
    words = ["data=tldr", "data.source=path", place, f"data.comparisons={folder}"]
    code, lines, err = rlhf("data", "check", *words, "--all")
    assert (code, err) == (0, "")
    found, left_out = counts(lines), named(lines)
    assert left_out.keys() <= {"post is held out"}
    held_out = left_out.get("post is held out", [])
    assert found["demonstrations"] == (1762 - len(held_out), 202)
    assert found["prompts"] == found["demonstrations"]
    assert sum(found["pairs"]) == rows
    assert lines[-1] == f"next: rlhf train {' '.join(words)}"


def test_the_78_demonstrations_of_tldr_that_are_left_out_are_on_posts_of_held_out_pairs(
    rlhf: Rlhf, shared_data: Path
) -> None:
    place = f"data.path={shared_data}/tldr"
    _, lines, _ = rlhf("data", "check", "data=tldr", "data.source=path", place, "--all")
    numbers = [int(where.rpartition(":")[2]) for where in named(lines)["post is held out"]]
    posts = [row["post"].strip() for row in read(shared_data / "tldr/sft/train.jsonl.gz")]
    compared = " ".join(
        row["prompt"] for row in read(shared_data / "tldr/comparisons_ai/train.jsonl.gz")
    )
    assert len(numbers) == 78 and all(posts[number - 1] in compared for number in numbers)
