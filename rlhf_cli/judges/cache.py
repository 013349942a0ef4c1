"""The answers of judges, one JSON object per line, by what was asked.

What is kept is the answer, not the verdict read from it, so that a table can be scored again, and read
by people. A line is appended by a single write: processes may share the file, and an interrupted one
leaves at most a part of a line, which nobody takes for an answer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.store.files import disk
from rlhf_cli.store.key import canonical

FILE = "judge.jsonl"


@dataclass(frozen=True)
class Question:
    """Which of two responses to a prompt is the better one, asked of one judge in one wording."""

    model: str
    version: str
    """Of the wording."""
    prompt: str
    first: str
    """Shown as A."""
    second: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hex."""
        parts = [self.model, self.version, self.prompt, self.first, self.second]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()


class Answers:
    """Those of a file, and those that are added to it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._said: dict[str, str] = {}
        with disk(folder, "judge.cache"):
            folder.mkdir(parents=True, exist_ok=True)
            found = self._path.read_bytes() if self._path.exists() else b""
        if found and not found.endswith(b"\n"):
            self._append(b"\n")  # what follows half a line must not become a part of it
        for line in found.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # half a line
                continue
            self._said[row["key"]] = row["said"]

    def get(self, question: Question) -> str | None:
        """What was answered, if it was asked before."""
        return self._said.get(question.digest)

    def add(self, question: Question, said: str) -> None:
        """Keep an answer for good. Raises UserError if the disk refuses."""
        row = {"key": question.digest, "model": question.model, "prompt": question.version}
        self._append(f"{json.dumps({**row, 'said': said})}\n".encode())
        self._said[question.digest] = said

    def _append(self, line: bytes) -> None:
        with disk(self._path, "judge.cache"), self._path.open("ab", buffering=0) as file:
            file.write(line)
