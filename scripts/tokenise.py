"""Times how long pairs take to become tokens, and to be opened again.

    python scripts/tokenise.py FOLDER [ROWS]

FOLDER holds HH in the layout of the hub. Its pairs are taken again and again, each time under another
number, until there are ROWS (160,000) that differ. The tokenizer is a byte-level BPE of 50,000 entries at
most, trained on them; the limits are those of `data=hh` from the hub.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from rlhf_cli.config import compose, recipe
from rlhf_cli.data.corpus import Pair
from rlhf_cli.data.hh import HUMAN
from rlhf_cli.data.tokens import Encoder, encoded
from rlhf_cli.models.tokenizer import train_tokenizer

VOCAB, CONTEXT = 50_000, 2048
"""As in GPT-NeoX."""
LIMITS = ["data.max_prompt_tokens=512", "data.max_response_tokens=128"]


def numbered(pairs: Sequence[Pair]) -> Iterator[tuple[str, str, str]]:
    """Prompt, chosen and rejected of the pairs, over and over, no two alike."""
    for number in count():
        for pair in pairs:
            prompt = f"{HUMAN} {number}.{pair.prompt.removeprefix(HUMAN)}"
            yield prompt, f" {number}.{pair.chosen}", f" {number}.{pair.rejected}"


def main(folder: str, rows: int = 160_000) -> None:
    """Print seconds and sizes."""
    data = recipe(compose(["data=hh", "data.source=path", f"data.path={folder}", *LIMITS])).data
    pairs = data.load().train.pairs
    made = list(islice(numbered(pairs), rows))
    tokenizer = train_tokenizer((pair.prompt + pair.chosen for pair in pairs), VOCAB, CONTEXT)
    encoder = Encoder.of(tokenizer, data)
    characters = sum(len(text) for row in made for text in row)
    print(f"{rows:,} pairs, {characters / 1e6:.0f} million characters, BPE of {len(tokenizer):,}")
    with tempfile.TemporaryDirectory() as cache:
        for what in ("encoded", "opened again"):
            began = time.perf_counter()
            found = encoded(encoder, made, Path(cache), lambda done, total: None)
            print(f"{what}: {time.perf_counter() - began:.1f} s")
    tokens = int(found.lengths.sum())
    print(
        f"{tokens / 1e6:.0f} million tokens; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
