"""What lies outside the machine: the Hugging Face hub and its cache, Weights & Biases."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from rlhf_cli import hub, track
from rlhf_cli.doctor.finding import Finding, sized
from rlhf_cli.recipes import Track

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
MOST_FILES = 20_000
"""Of the cache that are counted: more would take minutes on a file server."""


def hugging_face() -> Finding:
    """The cache, whether there is a token, and whether the hub answers."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    files = [path for path in islice(cache.rglob("*"), MOST_FILES) if not path.is_symlink()]
    size = sum(path.stat().st_size for path in files if path.is_file())
    offline = [name for name in OFFLINE if os.environ.get(name)]
    told = [
        f"cache {cache}{' at least' if len(files) == MOST_FILES else ''} {sized(size)}",
        f"token {'yes' if get_token() else 'no'}",
        f"offline by {', '.join(offline)}" if offline else "online",
    ]
    if not offline and hub.out_of_reach():
        return Finding(
            "Hugging Face",
            "; ".join([*told[:2], "the hub does not answer"]),
            "note",
            "use folders, or HF_HUB_OFFLINE=1 with a filled cache",
        )
    return Finding("Hugging Face", "; ".join(told))


def weights_and_biases(how: Track) -> Finding:
    """Whether a run would be mirrored online."""
    if how.kind == "off":
        return Finding("W&B", "off (track=off)")
    known = "yes" if track.has_credentials() else "no"
    return Finding("W&B", f"{track.mode(how)} (track.mode={how.mode}); credentials {known}")
