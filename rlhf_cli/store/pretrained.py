"""Folders of pretrained models: whether one is whole, and what is in it, without loading it."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from rlhf_cli.errors import UserError
from rlhf_cli.store.files import sha256

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PARTS = {"config.json": ("config.json",), "weights": WEIGHTS, "tokenizer": TOKENIZERS}
"""What a model's folder holds, and what each part may be called."""
READ = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"})
"""Endings of files that a library reads; a model card may change without making another model."""
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_local(name: str) -> bool:
    """Whether a model's name stands for a folder on this machine rather than a repository."""
    return Path(name).is_dir()


def fault(key: str, name: str, revision: str | None) -> str | None:
    """Say in one sentence why `key`=`name` can be no model, or None.

    A folder must hold a configuration, weights and a tokenizer; anything else must at least look
    like the name of a repository, and come with a revision.
    """
    folder = Path(name)
    if not is_local(name):
        if _REPOSITORY.fullmatch(name):
            return (
                None
                if revision
                else (
                    f"{key}={name} is a repository whose weights may change; name a commit of it with"
                    f" {key.rpartition('.')[0]}.revision=COMMIT."
                )
            )
        return (
            f"{key}={name} is no folder that can be read; give an existing one, or a Hugging Face"
            " repository as OWNER/NAME."
        )
    if part := missing(folder):
        files = "" if PARTS[part] == (part,) else f" ({', '.join(PARTS[part])})"
        return (
            f"{key}={name} has no {part}{files}; give a folder as `save_pretrained` leaves it,"
            " for the model and its tokenizer both."
        )
    return None


def missing(folder: Path) -> str | None:
    """The first of `PARTS` that a model's folder lacks."""
    for part, patterns in PARTS.items():
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            return part
    return None


@cache
def contents(name: str) -> str:
    """SHA-256 over the names and bytes of a model folder's files, wherever the folder lies.

    Read once per process: a sweep names the same folder many times. Raises UserError.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(Path(name).iterdir()):
            if file.suffix in READ and file.is_file() and not file.name.startswith("."):
                digest.update(f"{file.name} {sha256(file)}\n".encode())
    except OSError as error:
        raise UserError(
            f"model.name={name} cannot be read ({error.strerror}); give a folder whose files can."
        ) from error
    return digest.hexdigest()
