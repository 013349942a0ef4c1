"""Plants errors in the mathematics, one at a time, and checks that the tests notice each.

The errors are listed in `mutants.txt`. Each gets a copy of the package with one piece of text
replaced, on which `tests/algos` and `tests/test_core.py` must fail. Run as `make mutants`; exits 1
if a mutant survives, if its text is no longer in the file, or if the tests fail without any mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")
COPIED = ("rlhf_cli", "conf", "tests")
TESTS = ("tests/test_core.py", "tests/algos")
AT_ONCE = 2
"""Copies tested at the same time, one thread each."""


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
    """Whether no test notices the error: those named after the algorithm are asked first."""
    return passes(mutant, _near(mutant)) and passes(mutant)


def _near(mutant: Mutant) -> list[str]:
    """Words that choose the tests in whose names the mutated file, or a yaml that uses it, appears."""
    path = Path(mutant.file)
    folder = ROOT / "conf" / "algo"
    target = f"{'.'.join(path.with_suffix('').parts)}."
    using = [yaml.stem for yaml in folder.glob("*.yaml") if target in yaml.read_text()]
    return ["-k", " or ".join([path.stem, *using])]


def passes(mutant: Mutant | None, only: Sequence[str] = ()) -> bool:
    """Whether the tests pass on a copy with this error, or on a faithful copy."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in COPIED:
            origin, copy = ROOT / name, Path(folder, name)
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant:
            Path(folder, "rlhf_cli", mutant.file).write_text(mutant.source())
        # PYTHONPATH precedes site-packages: the copy is imported, not an installed package.
        environment = os.environ | {
            "PYTHONPATH": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            *only,
            *TESTS,
        ]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    # 5: no test is named so.
    if done.returncode not in (0, 1, *([5] if only else [])):
        raise SystemExit(f"pytest could not run the tests:\n{done.stdout}{done.stderr}")
    return done.returncode != 1


def main() -> int:
    """Prints a line per mutant, killed/total and the survivors."""
    mutants = list(listed())
    for mutant in mutants:
        mutant.source()
    if not passes(None):
        print("the tests fail without any planted error: mend that first")
        return 1
    survivors = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, survived in zip(mutants, pool.map(survives, mutants), strict=True):
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
