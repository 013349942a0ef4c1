"""Whether the Hugging Face hub answers, found out before libraries that would retry for minutes."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 3.0
"""Seconds in which the hub must take a connection."""


def out_of_reach() -> bool:
    """Whether the hub takes no connection within `PATIENCE` seconds.

    Never so under HF_HUB_OFFLINE=1: there the cache answers, or the library says at once that it
    cannot.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    # A thread, because looking up a name has no timeout of its own.
    reached: list[bool] = []
    knock = Thread(target=lambda: reached.append(_connects()), daemon=True)
    knock.start()
    knock.join(PATIENCE)
    return not any(reached)


def is_cached(repository: str, revision: str | None) -> bool:
    """Whether a model's configuration at this revision lies in the local cache of the hub."""
    return cached_config(repository, revision) is not None


def cached_config(repository: str, revision: str | None) -> Path | None:
    """A model's configuration at this revision in the local cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision or "main")
    return Path(found) if isinstance(found, str) else None


def fetch_config(repository: str, revision: str | None) -> None:
    """Bring a model's configuration into the local cache of the hub. Raises what the library raises."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repository, "config.json", revision=revision or "main")


def _connects() -> bool:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urlsplit(getproxies().get("https", endpoint))
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
