"""Reddit TL;DR (Stiennon et al. 2020, arXiv:2009.01325) and its embedded counterpart.

Demonstrations are posts with their authors' summaries, pairs are compared summaries; prompts for RL
are the posts of the demonstrations. Every post is rendered the same way,

    SUBREDDIT: r/<subreddit>\\n\\nTITLE: <title>\\n\\nPOST: <post>\\n\\nTL;DR:

and a response is one space and the summary. Comparisons come without a held-out file, so a tenth of
their posts, picked by hash, is held out along with the posts of the validation file; a training
demonstration on a held-out post is left out and counted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.data import embedded_tldr, rows
from rlhf_cli.data.corpus import Corpus, Demo, Drops, Pair, Split, require_rows, unique
from rlhf_cli.data.embedded import Embedded, fingerprint, generate
from rlhf_cli.data.gold_tldr import gold
from rlhf_cli.recipes import STRICT, Count

DEMO_COLUMNS = ("subreddit", "title", "post", "summary")
PAIR_COLUMNS = ("prompt", "chosen", "rejected")
HELD_OUT = 10
"""One in so many compared posts is held out."""
_POST = re.compile(
    r"SUBREDDIT: r/(.*?)\s*\n+TITLE: (.*?)\s*\n+POST: (.*?)\s*(?:TL;DR:)?\s*", re.DOTALL
)


@dataclass(frozen=True, config=STRICT)
class TLDR:
    """Posts, summaries of them, and pairs of summaries, one preferred."""

    name: str
    """The word for the data in run names."""
    source: Literal["embedded", "path", "hub"]
    """embedded: generated; path: files under `path`; hub: downloaded."""
    path: str | None
    """Folder with sft/train, sft/valid and <comparisons>/train; read only if source is path."""
    comparisons: str
    """Folder of the pairs under `path`."""
    hub: str
    """Repository of the demonstrations on the hub; read only if source is hub."""
    revision: str
    """Its commit."""
    pairs_hub: str
    """Repository of the pairs on the hub."""
    pairs_revision: str
    """Its commit."""
    max_prompt_tokens: Count
    """Longest prompt in tokens."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included."""
    embedded: Embedded
    """The generated corpus; read only if source is embedded."""

    pays: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """`tldr`, or `tldr-embedded`, so that nobody takes one for the other."""
        return f"{self.name}-embedded" if self.source == "embedded" else self.name

    def load(self) -> Corpus:
        """Read or generate every row."""
        if self.source == "embedded":
            world = embedded_tldr
            return generate(self.title, self.embedded, world.pose, world.write, gold)
        drops = Drops()
        heldout_demos = tuple(demo for _, demo in self._demos("valid", drops))
        pairs = list(self._pairs(drops))
        heldout = {demo.prompt for demo in heldout_demos}
        heldout |= {pair.prompt for pair in pairs if _picked(pair.prompt)}
        demos = []
        for where, demo in self._demos("train", drops):
            if demo.prompt in heldout:
                drops.add("post is held out", where)
            else:
                demos.append(demo)
        corpus = Corpus(
            self.title,
            _split(tuple(demos), tuple(p for p in pairs if p.prompt not in heldout)),
            _split(heldout_demos, tuple(p for p in pairs if p.prompt in heldout)),
            drops.frozen(),
            gold=None,
        )
        require_rows(
            corpus, f"data.path={self.path}" if self.source == "path" else "data.source=hub"
        )
        return corpus

    def fingerprint(self) -> str:
        """The generator and its knobs, the bytes of the files, or the commits on the hub."""
        if self.source == "embedded":
            return fingerprint(embedded_tldr.REVISION, self.embedded)
        if self.source == "path":
            stems = ("sft/train", "sft/valid", f"{self.comparisons}/train")
            return rows.fingerprint(rows.locate(self.path, stems))
        return f"{self.hub}@{self.revision} {self.pairs_hub}@{self.pairs_revision}"

    def _file(self, stem: str, columns: tuple[str, ...]) -> Iterator[rows.Row]:
        return rows.read_file(rows.locate(self.path, [stem])[0], columns)

    def _demos(self, split: Literal["train", "valid"], drops: Drops) -> Iterator[tuple[str, Demo]]:
        if self.source == "path":
            found = self._file(f"sft/{split}", DEMO_COLUMNS)
        else:
            name = {"train": "train", "valid": "validation"}[split]
            found = rows.read_hub(self.hub, self.revision, name, DEMO_COLUMNS)
        for row in found:
            subreddit, title, post, summary = (row.text[column].strip() for column in DEMO_COLUMNS)
            if summary:
                yield row.where, Demo(render(subreddit, title, post), f" {summary}")
            else:
                drops.add("empty summary", row.where)

    def _pairs(self, drops: Drops) -> Iterator[Pair]:
        if self.source == "path":
            found = self._file(f"{self.comparisons}/train", PAIR_COLUMNS)
        else:
            found = rows.read_hub(self.pairs_hub, self.pairs_revision, "train", PAIR_COLUMNS)
        for row in found:
            post = _POST.fullmatch(row.text["prompt"])
            chosen, rejected = summary_of(row.text["chosen"]), summary_of(row.text["rejected"])
            if post is None:
                drops.add("not a post", row.where)
            elif chosen == rejected:
                drops.add("identical pair", row.where)
            elif not (chosen and rejected):
                drops.add("empty summary", row.where)
            else:
                yield Pair(render(*post.groups()), f" {chosen}", f" {rejected}")


def render(subreddit: str, title: str, post: str) -> str:
    """The prompt of a post."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def summary_of(text: str) -> str:
    """A compared summary without the mark some files put before it."""
    return text.strip().removeprefix("TL;DR:").strip()


def _picked(prompt: str) -> bool:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT == 0


def _split(demos: tuple[Demo, ...], pairs: tuple[Pair, ...]) -> Split:
    return Split(demos, pairs, unique(demo.prompt for demo in demos))
