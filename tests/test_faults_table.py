"""The table of faults: from what tests note of themselves to docs/faults.md."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from scripts.faults import Row, contradictions, page, rows, table
from tests.conftest import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_stopping" name="test_a_kill[1]"><properties>
  <property name="fault" value='["SIGKILL", "goes on", "4 steps"]'/></properties></testcase>
<testcase classname="tests.test_stopping" name="test_a_kill[2]"><properties>
  <property name="fault" value='["SIGKILL", "goes on", "4 steps"]'/></properties></testcase>
<testcase classname="tests.test_odd_ones" name="test_a_pipe"><properties>
  <property name="other" value="1"/>
  <property name="fault" value='["a | and a &lt;b&gt;", "one sentence", "nothing"]'/></properties></testcase>
<testcase classname="tests.test_faults_network" name="test_a_server_is_away">
  <failure message="no"/></testcase>
<testcase classname="tests.test_faults_network" name="test_it_cannot_begin">
  <error message="no"/></testcase>
<testcase classname="tests.test_faults_storage" name="test_a_full_disk">
  <skipped message="no mount"/></testcase>
<testcase classname="tests.test_stopping" name="test_that_notes_nothing"/>
</testsuite></testsuites>"""

PLANTED = """
import pytest

def test_noted(fault):
    fault("planted", "seen", lost="1 step")

def test_broken(fault):
    assert False

@pytest.mark.faults
def test_slow(fault):
    fault("planted slowly", "seen")

def test_of_something_else():
    assert False
"""


@pytest.fixture
def found(tmp_path: Path) -> list[Row]:
    (tmp_path / "report.xml").write_text(REPORT)
    return rows(tmp_path / "report.xml")


def test_every_fact_is_one_row_and_what_failed_or_was_left_out_says_so(found: list[Row]) -> None:
    assert found == [
        Row("Disks and damaged files", "a full disk", "not tested here: no mount", "unknown"),
        Row("Networks and services", "a server is away", "FAILED", "unknown"),
        Row("Networks and services", "it cannot begin", "FAILED", "unknown"),
        Row("Odd ones", "a | and a <b>", "one sentence", "nothing"),
        Row("Signals, kills and deadlines", "SIGKILL", "goes on", "4 steps"),
    ]


def test_two_rows_that_tell_different_things_of_one_fault_are_named(found: list[Row]) -> None:
    assert contradictions(found) == []
    other = Row("Signals, kills and deadlines", "SIGKILL", "goes on", "nothing")
    assert contradictions([*found, other]) == ["Signals, kills and deadlines: SIGKILL"]


def test_the_page_groups_them_and_names_its_command_and_commit(found: list[Row]) -> None:
    made = page(found, "make faults", "c0ffee0")
    head, *sections = made.split("\n## ")
    assert "exit code" in head and "`checkpoint.every`" in head
    assert [each.splitlines()[0] for each in sections] == [
        "Disks and damaged files",
        "Networks and services",
        "Odd ones",
        "Signals, kills and deadlines",
    ]
    assert r"| a \| and a &lt;b&gt; | one sentence | nothing |" in sections[2]
    assert made.endswith("\n5 faults, injected by `make faults` at commit c0ffee0.\n")


def test_the_terminal_shows_the_same_rows(found: list[Row]) -> None:
    console = Console(width=120)
    with console.capture() as shown:
        console.print(table(found))
    assert "a | and a <b>" in shown.get() and shown.get().count("FAILED") == 2


def test_make_faults_runs_whatever_asks_for_the_fixture_and_reads_what_it_notes(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_planted.py").write_text(PLANTED)
    report = tmp_path / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", ROOT / "pyproject.toml",
         "-p", "no:cacheprovider", "-m", "faults or injects", f"--junitxml={report}", tmp_path],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    assert rows(report) == [
        Row("Planted", "broken", "FAILED", "unknown"),
        Row("Planted", "planted", "seen", "1 step"),
        Row("Planted", "planted slowly", "seen", "nothing"),
    ]


def test_a_test_that_asks_for_the_fixture_is_marked(
    request: pytest.FixtureRequest, fault: Callable[..., None]
) -> None:
    assert request.node.get_closest_marker("injects")
