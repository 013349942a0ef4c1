"""A run directory: `runs/<stage>/<label>-<key>/`, whose manifest alone says how far the run came.

The manifest is written whole or not at all, and says `done` only after everything it lists is on
disk. Whoever builds a run holds its lock; the operating system lets go of it when the holder dies,
so a run that claims to be running while nobody holds its lock was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from rlhf_cli.errors import UserError
from rlhf_cli.secret import masked
from rlhf_cli.store.files import atomic_write, disk, sha256

Status = Literal["missing", "running", "interrupted", "failed", "done"]
_BESIDE = re.compile(r"\w+/[^./\\\0][^/\\\0]*")
"""A run directory in the folder of all runs, by stage and name."""


@dataclass(frozen=True)
class Run:
    """A directory and the files in it; holds no state of its own."""

    path: Path
    """Its name is <label>-<key>, its parent's name the stage."""

    @property
    def key(self) -> str:
        """The name for machines: what follows the last dash of the directory's name."""
        return self.path.name.rpartition("-")[2]

    @property
    def label(self) -> str:
        """The name for people: what precedes the key."""
        return self.path.name.rpartition("-")[0]

    @property
    def stage(self) -> str:
        """The folder the run is kept in: sft, reward or rl."""
        return self.path.absolute().parent.name

    @property
    def config_path(self) -> Path:
        """The composed configuration, frozen before launch."""
        return self.path / "config.yaml"

    @property
    def manifest_path(self) -> Path:
        """What the run is, where it came from and how far it got."""
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line; see `store.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def report_path(self) -> Path:
        """What a reward model is worth, in JSON; there is none in the other stages."""
        return self.path / "report.json"

    def weights(self) -> str:
        """SHA-256 over the digests of the finished model's weights, "" if the manifest lists none."""
        listed = self.manifest().get("outputs", {})
        found = [digest for name, digest in sorted(listed.items()) if name.endswith(".safetensors")]
        return hashlib.sha256("".join(found).encode()).hexdigest() if found else ""

    @property
    def stop_request(self) -> Path:
        """A file that asks whoever builds the run to stop between two steps."""
        return self.log / "stop"

    @property
    def samples(self) -> Path:
        """Folder of the responses of each evaluation."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Folder of what a resume needs, by step, and of the final model."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Folder of the finished model."""
        return self.checkpoints / "final"

    @property
    def log(self) -> Path:
        """Folder of each process's output."""
        return self.path / "log"

    def manifest(self) -> dict[str, Any]:
        """Read the manifest; {} if there is none. Raises UserError if it is damaged."""
        try:
            manifest = json.loads(self.manifest_path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(
                f"{self.manifest_path} cannot be read ({error.strerror}); make it readable, or"
                " choose another folder with paths.runs=DIR."
            ) from error
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict) or manifest.get("status") not in get_args(Status):
            raise UserError(
                f"{self.manifest_path} is damaged (not a JSON object with a status); delete"
                f" {self.path} and run the same command again to rebuild it."
            )
        self._check_parents(manifest.get("parent_runs", {}))
        return manifest

    def _check_parents(self, runs: object) -> None:
        """UserError unless all are run directories beside this one: what is read there is believed."""
        for at in runs.values() if isinstance(runs, Mapping) else [runs]:
            if not _BESIDE.fullmatch(str(at)):
                raise UserError(
                    f"{self.manifest_path} names {at} as a run that it started from, which must be"
                    f" STAGE/NAME in the same folder of runs; restore the file, or delete {self.path}."
                )

    def status(self) -> Status:
        """How far the run came, going by its manifest and its lock."""
        status: Status = self.manifest().get("status", "missing")
        return "interrupted" if status == "running" and not self._is_locked() else status

    def begin(self, config_yaml: str, manifest: Mapping[str, Any]) -> int:
        """Open a segment: make the folders, freeze the configuration, then say `running`.

        Returns the number of the segment, 1 for a new run. Call it while holding the lock.
        """
        before = self.manifest()
        segment = int(before.get("segment", 0)) + 1
        with disk(self.path):
            for folder in (self.samples, self.checkpoints, self.log):
                folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        atomic_write(self.config_path, config_yaml)
        self._write(
            {
                **manifest,
                "data": before.get("data", {}),
                "segment": segment,
                "started": before.get("started", _now()),
                "finished": None,
                "status": "running",
                "outputs": {},
            }
        )
        return segment

    def _tidy(self) -> None:
        """Remove what a killed segment was writing: it has no final name, so nobody reads it."""
        for left in list(self.path.rglob(".*")):
            if left.name.endswith(".partial") and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            elif left.name.endswith(".tmp"):
                left.unlink(missing_ok=True)

    def update(self, **fields: Any) -> None:
        """Replace some fields of the manifest."""
        self._write({**self.manifest(), **fields})

    def keep_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the evaluated responses of a step, one JSON object a line."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.samples.mkdir(exist_ok=True)
        atomic_write(self.samples / f"{step:06d}.jsonl", lines)

    def responses(self, step: int) -> list[dict[str, Any]]:
        """The evaluated responses of a step, as kept. Raises UserError if they are missing or damaged."""
        path = self.samples / f"{step:06d}.jsonl"
        try:
            # Not splitlines: a response may hold other line separators than the file's own.
            lines = path.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing, without which nothing is known of single prompts; copy the folder"
                f" samples of {self.path.name} back, or leave the run out."
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}); copy the folder samples of {self.path.name} back, or leave"
                " the run out."
            ) from error
        self.check(path.relative_to(self.path).as_posix())
        return rows

    def check(self, part: str) -> None:
        """Hold what the manifest lists below `part` (a file, or a folder) against what is on disk.

        About a second per GB. Raises UserError with the first file that is missing or is not as it was
        written; a model card may have been.
        """
        for name, digest in self.manifest().get("outputs", {}).items():
            path = self.path / name
            if not f"{name}/".startswith(f"{part}/") or path.suffix == ".md":
                continue
            if not path.is_file() or sha256(path) != digest:
                found = "is not as it was written" if path.is_file() else "is missing"
                raise UserError(
                    f"{path} {found}, by the digest in {self.manifest_path.name}; copy it back, or delete"
                    f" {self.path} and give its command again to have it built anew."
                )

    def check_final(self) -> None:
        """The same for the finished model, whose weights must be listed. Raises UserError."""
        if not self.weights():
            raise UserError(
                f"{self.manifest_path} lists no weights; delete {self.path} and give its command again to"
                " have it built anew."
            )
        self.check(self.final.relative_to(self.path).as_posix())

    def finish(self, **fields: Any) -> None:
        """Say `done`, with sha256 digests of the metrics, report, samples and final model."""
        made = [*sorted(self.samples.glob("*.jsonl")), *sorted(self.final.rglob("*"))]
        produced = [self.metrics_path, self.report_path, *made]
        outputs = {p.relative_to(self.path).as_posix(): sha256(p) for p in produced if p.is_file()}
        self.update(**fields, outputs=outputs, finished=_now(), status="done")

    def fail(self, reason: str) -> None:
        """Say `failed`, and why."""
        self.update(reason=masked(reason), finished=_now(), status="failed")

    @contextmanager
    def lock(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only one who builds this run; waits for another, of whom `on_wait` is told once.

        Who holds it stands beside the lock, for those who wait; the lock itself goes with its holder.
        """
        with disk(self._lock_path):
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock_path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if on_wait is not None:
                    on_wait(self._holder())
                lock.acquire()
        try:
            with suppress(UserError):  # a courtesy
                atomic_write(self._holder_path, _myself())
            yield
        finally:
            self._holder_path.unlink(missing_ok=True)
            lock.release()

    def _holder(self) -> str:
        try:
            return self._holder_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "another process"

    @property
    def _holder_path(self) -> Path:
        return self._lock_path.with_suffix(".holder")

    @property
    def _lock_path(self) -> Path:
        return self.path.absolute().parent.parent / ".locks" / f"{self.key}.lock"

    def _is_locked(self) -> bool:
        if not self._lock_path.exists():
            return False
        try:
            with FileLock(self._lock_path, timeout=0):
                return False
        except (Timeout, OSError):  # a lock we may not even open is someone else's
            return True

    def _write(self, manifest: Mapping[str, Any]) -> None:
        atomic_write(self.manifest_path, json.dumps(manifest, indent=2) + "\n")


def all_runs(root: Path) -> list[Run]:
    """Every run kept below `root`, by stage and name; none if the folder is missing."""
    return [Run(manifest.parent) for manifest in sorted(root.glob("[!.]*/*/manifest.json"))]


def find(root: Path, reference: str) -> Run:
    """Find the one run meant by a path, a directory's name, a key, or the beginning of either.

    A full name or key wins over beginnings. Raises UserError if no run or several are meant.
    """
    if (Path(reference) / "manifest.json").is_file():
        return Run(Path(reference))
    runs = all_runs(root)
    meant = [run for run in runs if reference in (run.path.name, run.key)] or [
        run
        for run in runs
        if reference and (run.path.name.startswith(reference) or run.key.startswith(reference))
    ]
    if not meant:
        raise UserError(
            f"no run in {root} is called {reference!r}; `rlhf runs` lists those there are."
        )
    if len(meant) > 1:
        names = ", ".join(run.path.name for run in meant)
        raise UserError(f"{reference!r} may mean {names}; give the key of one of them.")
    return meant[0]


def _myself() -> str:
    since = datetime.now().astimezone().isoformat(" ", "minutes")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since},"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
