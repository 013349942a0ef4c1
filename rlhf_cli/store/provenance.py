"""Where a number came from: the code, the packages and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_cli.store.files import sha256
from rlhf_cli.store.run import Run

PACKAGES = (
    "rlhf-cli",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "hydra-core",
    "wandb",
    "numpy",
    "scipy",
)


def provenance() -> dict[str, Any]:
    """Describe the present code and machine: {commit, patch, versions, machine}.

    commit is null unless this package is tracked by git; patch is a digest of the uncommitted
    changes to tracked files, null if there are none. Packages that are not installed are left out.
    """
    commit, patch = _revision()
    versions = {name: v for name in PACKAGES if (v := _version(name)) is not None}
    machine = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    return {"commit": commit, "patch": patch, "versions": versions, "machine": machine}


def origin(runs: Sequence[Run], command: str) -> dict[str, Any]:
    """What lies beside a figure or a table: which runs at which state, put together by which code."""
    return {
        "command": command,
        **provenance(),
        "runs": [
            {
                "key": run.key,
                "path": str(run.path),
                "status": run.status(),
                "parents": run.manifest().get("parents"),
                "commit": run.manifest().get("commit"),
                "metrics_sha256": sha256(run.metrics_path),
            }
            for run in runs
        ],
    }


def _revision() -> tuple[str | None, str | None]:
    # A package installed into a virtual environment may lie inside someone else's repository: only
    # a commit that contains this very file says anything about the code.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    head = _git("rev-parse", "HEAD")
    changes = _git("diff", "--binary", "HEAD")
    patch = hashlib.sha256(changes).hexdigest()[:10] if changes else None
    return head.decode().strip() if head else None, patch


def _git(*words: str) -> bytes | None:
    """Standard output of git in this file's folder; None if git is missing, fails or is slow."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
