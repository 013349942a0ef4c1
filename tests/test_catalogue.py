"""What `rlhf algos` and docs/algorithms say: of every algorithm everything, and nothing stale."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from rlhf_cli import catalogue, cli
from rlhf_cli.catalogue import Entry
from scripts.algorithms import pages
from tests.algos.discovery import NAMES, shipped
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    return {name: catalogue.entry(name) for name in catalogue.names()}


def test_every_algorithm_is_listed(entries: dict[str, Entry]) -> None:
    assert list(entries) == NAMES and len(NAMES) >= 37


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is_where_it_is_from_and_what_each_field_means(
    entries: dict[str, Entry], name: str
) -> None:
    one = entries[name]
    assert one.line.endswith(".") and 10 < len(one.line) < 120
    assert "arXiv:" in one.paper and one.paper.split(",")[0][-4:].isdigit()
    assert "=" in one.mathematics  # an equation
    told = {f.name for f in one.fields}
    assert told == {f.name for f in fields(shipped(name))} - {"update", "optim", "guide"}
    for f in one.fields:
        assert f.meaning, f"{name}.{f.name} has no meaning"
        assert f.source, f"{name}.{f.name} has no source"


def test_the_columns_are_those_of_the_yaml(entries: dict[str, Entry]) -> None:
    (beta,) = (f for f in entries["p3o_v2"].fields if f.name == "beta")
    assert beta.values == {"nano": 0.2, "paper": 0.05}
    assert beta.meaning.startswith("KL coefficient") and "authors' HH code" in beta.source


@pytest.mark.parametrize(
    ("name", "policy"),
    [("p3o_v2", "on"), ("dpo", "off"), ("xpo", "mixed"), ("aihf", "mixed"), ("remax", "on")],
)
def test_on_and_off_policy_follow_from_the_sources(
    entries: dict[str, Entry], name: str, policy: str
) -> None:
    assert entries[name].policy == policy


def test_the_pages_in_docs_are_what_make_algorithms_would_write() -> None:
    folder = ROOT / "docs" / "algorithms"
    written = pages()
    assert {path.name for path in folder.glob("*.md")} == set(written)
    stale = [n for n, text in written.items() if (folder / n).read_text("utf-8") != text]
    assert stale == [], "run `make algorithms`"


def test_the_command_prints_the_table_a_page_and_plain_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["algos"], ["algos", "dpo"], ["algos", "dpo", "--json"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert not end.value.code
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)
    assert "log sigma" in out and "next: rlhf algos NAME" in out
    (plain,) = json.loads(out[out.rindex("\n[\n") :])
    assert plain["name"] == "dpo" and plain["needs"] == ["ref"]


def test_an_unknown_name_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["algos", "nope"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: nope is no algorithm; choose one of aihf")
