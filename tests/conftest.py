"""What every test may ask for."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported anywhere: tensors this small are slower on more threads, and pytest-xdist
# already occupies the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Not the user's own cache; the processes of pytest-xdist share it.
CACHE = os.environ.setdefault("RLHF_CACHE", tempfile.mkdtemp(prefix="rlhf-cache-"))

ROOT = Path(__file__).resolve().parents[1]
Typed = Callable[..., tuple[int, str, str]]
"""Words to exit code, stdout and stderr."""
Rlhf = Callable[..., tuple[int, list[str], str]]
"""Words to exit code, lines of stdout and stderr."""


@pytest.hookimpl(
    tryfirst=True
)  # before words such as -m "faults or injects" choose among the items
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test that injects a fault, by its asking for the fixture that notes it."""
    for item in items:
        if "fault" in getattr(item, "fixturenames", ()):
            item.add_marker("injects")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache once all processes are through."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real rows beside the repository; without it, tests that ask for it are skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("NOT TESTED on real rows: ../shared/data is not beside the repository")
    return folder


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    from rlhf_cli.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_RUNS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(words)
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


@pytest.fixture
def rlhf(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> Rlhf:
    """The same at 80 columns, and stdout line by line."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> tuple[int, list[str], str]:
        code, out, err = typed(*words)
        return code, [line.rstrip() for line in out.splitlines()], err

    return run


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Notes a fault that a test has injected, what came of it and what it cost: a row of docs/faults.md."""

    def note(injected: str, outcome: str, lost: str = "nothing") -> None:
        record_property("fault", json.dumps([injected, outcome, lost]))

    return note
