"""Rows of HH and TL;DR made for tests, and the files they stand in."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cli.data.hh import HH
from rlhf_cli.data.tldr import TLDR

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY: Any = {
    **{"prompts": 4, "demos": 3, "pairs": 2, "heldout": 2},
    **{"temperature": 1.0, "noise": 0.0, "topics": None, "seed": 0},
}
HH_ROWS = HH(
    name="hh",
    source="path",
    path=None,
    hub="Anthropic/hh-rlhf",
    revision=COMMIT,
    subsets=("helpful-base",),
    on_bad_row="drop",
    max_prompt_tokens=96,
    max_response_tokens=48,
    embedded=TINY,
)
TLDR_ROWS = TLDR(
    name="tldr",
    source="path",
    path=None,
    comparisons="comparisons_ai",
    hub="some/posts",
    revision=COMMIT,
    pairs_hub="some/pairs",
    pairs_revision=COMMIT[::-1],
    on_bad_row="drop",
    max_prompt_tokens=112,
    max_response_tokens=32,
    embedded=TINY,
)


def chat(*turns: str) -> str:
    """Turns of Human and Assistant, one after the other."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def talk(first: str, chosen: str = "good", rejected: str = "bad") -> dict[str, object]:
    """A row of HH: one question and two answers, as whole transcripts."""
    return {"chosen": chat(first, chosen), "rejected": chat(first, rejected)}


def static(first: str, chosen: str = " good", rejected: str = " bad") -> dict[str, object]:
    """The same as rm-static has it: the answers stand alone."""
    prompt = chat(first) + "\n\nAssistant:"
    return {"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected}


def post(n: int) -> dict[str, object]:
    """A demonstration by the parts of its post."""
    parts = {"subreddit": "x", "title": f"t{n}", "post": f"p{n}\n"}
    return {"id": f"id{n}", **parts, "summary": f"s{n}"}


def completed(n: int) -> dict[str, object]:
    """The same with its post rendered already."""
    prompt = f"SUBREDDIT: r/x\n\nTITLE: t{n}\n\nPOST: p{n}\n\nTL;DR:"
    return {"prompt": prompt, "completion": f" s{n}"}


def compared(n: int, head: str = "\n\n", tail: str = "\n\nTL;DR:") -> dict[str, object]:
    """Two summaries of a post, the better one first."""
    prompt = f"SUBREDDIT: r/x{head}TITLE: t{n}{head}POST: p{n}{tail}"
    return {"prompt": prompt, "chosen": f"TL;DR:  good {n}", "rejected": f"  bad {n}"}


def judged(n: int, choice: object = 0) -> dict[str, object]:
    """Two summaries of a post as OpenAI published them."""
    texts = [f" good {n}", f" bad {n}"]
    return {
        "info": {"id": f"id{n}", "post": f"p{n}", "title": f"t{n}", "subreddit": "x"},
        "summaries": [
            {"text": text, "policy": "sup2"} for text in (texts[::-1] if choice else texts)
        ],
        "choice": choice,
        "worker": "w",
    }


def write_rows(file: Path, found: Sequence[Mapping[str, object]]) -> Path:
    """The rows in a file of the kind that its suffix says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in found]), file)
        return file
    if kind == "csv":
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(found[0]))
        table.writeheader()
        table.writerows(found)
        lines = text.getvalue()
    else:
        lines = "".join(json.dumps(row) + "\n" for row in found)
    return write_bytes(file, lines.encode())


def write_bytes(file: Path, text: bytes) -> Path:
    """The bytes in a file, compressed where its suffix says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)
    return file
