"""Whether the Hugging Face hub answers, found out before libraries that would retry for minutes.

What its cache holds serves without it, at the commit that is asked for and no other.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

from rlhf_cli.store import pretrained

PATIENCE = 10.0
"""Seconds in which the hub must answer."""
OFFLINE = "HF_HUB_OFFLINE"
"""Variable of the environment: its libraries read the cache alone."""


def is_offline() -> bool:
    """Whether the user, or `work_offline`, has said to do without the hub."""
    return os.environ.get(OFFLINE, "").upper() in {"1", "ON", "YES", "TRUE"}


def work_offline() -> None:
    """Has this process and those it starts read the cache alone, where each file would be tried for."""
    from huggingface_hub import constants

    os.environ[OFFLINE] = "1"
    constants.HF_HUB_OFFLINE = True  # which was read when it was imported


def address() -> str:
    """Where the hub is."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def out_of_reach() -> bool:
    """Whether the hub does not answer within `PATIENCE` seconds, or with a fault of its own.

    Never so when offline: there the cache answers, or the library says at once that it cannot.
    """
    if is_offline():
        return False
    # A thread, because looking up a name has no timeout of its own.
    reached: list[bool] = []
    knock = Thread(target=lambda: reached.append(_answers()), daemon=True)
    knock.start()
    knock.join(PATIENCE)
    return not any(reached)


def is_cached(repository: str, revision: str | None) -> bool:
    """Whether a model at this revision lies in the local cache of the hub, with weights and tokenizer."""
    config = cached_config(repository, revision)
    return config is not None and pretrained.missing(config.parent) is None


def cached_config(repository: str, revision: str | None) -> Path | None:
    """A model's configuration at this revision in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision or "main")
    return Path(found) if isinstance(found, str) else None


def cached_dataset(repository: str, revision: str) -> Path | None:
    """What the local cache of the hub has of a dataset at this revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def fetch_config(repository: str, revision: str | None) -> None:
    """Bring a model's configuration into the local cache of the hub. Raises what the library raises."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repository, "config.json", revision=revision or "main")


def _answers() -> bool:
    from huggingface_hub import get_session

    try:
        return get_session().head(address(), timeout=PATIENCE).status_code < 500
    except Exception:  # of the client that this version of the library has
        return False
