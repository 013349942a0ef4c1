"""Plants errors in the mathematics, one at a time, and checks that the tests notice each.

The errors are listed in `mutants.txt`. Each gets a copy of the package with one piece of text
replaced, on which `tests/algos` and `tests/test_core.py` must fail. Run as `make mutants`; exits 1
if a mutant survives, if its text is no longer in the file, or if the tests fail without any mutant.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.dont_write_bytecode = True

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")
COPIED = ("rlhf_cli", "conf", "tests")
FIRST = ("tests/test_core.py", "tests/algos/test_oracles.py")
TESTS = (*FIRST, "tests/algos")
PAGES, YAMLS = ROOT / "rlhf_cli" / "algos", ROOT / "conf" / "algo"
AT_ONCE = 2
"""Copies tested at the same time, one thread each."""
SLOW = ("torch", "numpy", "pydantic", "hydra", "omegaconf", "transformers")


@dataclass(frozen=True)
class Mutant:
    """One planted error; `old` must occur in the file exactly once."""

    file: str
    error: str
    old: str
    new: str

    def source(self) -> str:
        """The file with the error in it; raises SystemExit if `old` is not there once."""
        text = (ROOT / "rlhf_cli" / self.file).read_text()
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file}: found {text.count(self.old)} times: {self.old!r}")
        return text.replace(self.old, self.new)


def listed() -> Iterator[Mutant]:
    """The mutants of the list, in its order; the paragraph before the first file is its preface."""
    file = ""
    for paragraph in LIST.read_text().strip().split("\n\n"):
        first, *rest = paragraph.splitlines()
        if first.startswith("== "):
            file = first[3:]
        elif file:
            old, new = ("\n".join(x[2:] for x in rest if x[0] == sign) for sign in "-+")
            yield Mutant(file, first, old, new)


def survives(mutant: Mutant) -> bool:
    """Whether no test notices the error; the likeliest to notice, and quickest to load, are asked first."""
    near = _near(mutant)
    with copied(mutant):
        return passes(FIRST, near) and passes(TESTS, near) and passes(TESTS)


def _near(mutant: Mutant) -> list[str]:
    """Words that choose the tests in whose names the mutated page, or a yaml that uses it, appears.

    Of what pages share, all pages that import it are near.
    """
    path = Path(mutant.file)
    pages = {path.stem}
    if path.parts[0] == "core":
        module = f"rlhf_cli.core.{path.stem} "
        pages |= {page.stem for page in PAGES.glob("*.py") if module in page.read_text()}
    yamls = {yaml.stem: yaml.read_text() for yaml in YAMLS.glob("*.yaml")}
    using = {name for name, text in yamls.items() if any(f".algos.{p}." in text for p in pages)}
    return ["-k", " or ".join(sorted(pages | using))]


@contextmanager
def copied(mutant: Mutant | None) -> Iterator[None]:
    """Makes a copy with this error, or a faithful one, what this process imports the package from."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            origin, copy = ROOT / name, Path(folder, name)
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant:
            Path(folder, "rlhf_cli", mutant.file).write_text(mutant.source())
        # What precedes site-packages is imported, not an installed package.
        sys.path.insert(0, folder)
        os.chdir(folder)
        yield
        os.chdir(ROOT)


def passes(tests: Sequence[str], only: Sequence[str] = ()) -> bool:
    """Whether these tests of the working directory pass."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *only, *tests])
    # 5: no test is named so.
    if code not in (0, 1, *([5] if only else [])):
        raise RuntimeError(f"pytest could not run the tests:\n{said.getvalue()}")
    return code != 1


def faithful_copy_passes() -> bool:
    """Whether the tests pass without any error, in a process of their own."""
    with copied(None):
        return passes(TESTS)


def pool() -> Pool:
    """Processes that serve once each: a mutant needs modules that nobody imported before it.

    They are forks of this one, which has done the slow imports that no mutant changes.
    """
    for library in SLOW:
        import_module(library)
    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    return get_context("fork").Pool(AT_ONCE, maxtasksperchild=1)


def main() -> int:
    """Prints a line per mutant, killed/total and the survivors."""
    mutants = list(listed())
    for mutant in mutants:
        mutant.source()
    survivors = []
    with pool() as workers:
        if not workers.apply(faithful_copy_passes):
            print("the tests fail without any planted error: mend that first")
            return 1
        for mutant, survived in zip(mutants, workers.imap(survives, mutants), strict=True):
            verdict = "SURVIVED" if survived else "killed"
            print(f"{verdict:8} {mutant.file}: {mutant.error}", flush=True)
            if survived:
                survivors.append(mutant)
    print(f"{len(mutants) - len(survivors)}/{len(mutants)} killed")
    for mutant in survivors:
        print(f"survivor {mutant.file}: {mutant.error}: {mutant.old!r} -> {mutant.new!r}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
