"""Reddit TL;DR (Stiennon et al. 2020, arXiv:2009.01325) and its embedded counterpart.

Demonstrations are posts with their authors' summaries, pairs are compared summaries; prompts for RL
are the posts of the demonstrations. Every post is rendered the same way, whatever the shape of its row,

    SUBREDDIT: r/<subreddit>\\n\\nTITLE: <title>\\n\\nPOST: <post>\\n\\nTL;DR:

and a response is one space and the summary. Comparisons come without a held-out file, so a tenth of
their prompts, picked by hash, is held out along with the posts of the validation file; a training
demonstration on a held-out post is left out and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.data import embedded_tldr, rows
from rlhf_cli.data.corpus import (
    Corpus,
    DatasetDefaults,
    Demo,
    Drops,
    OnBadRow,
    Pair,
    Split,
    require_rows,
    unique,
)
from rlhf_cli.data.embedded import fingerprint, generate
from rlhf_cli.data.gold_tldr import gold
from rlhf_cli.data.rows import Row
from rlhf_cli.recipes import STRICT, Count

PARTS = ("subreddit", "title", "post")
POST_MARK, END_MARK = "\n\nPOST: ", "\n\nTL;DR:"
HELD_OUT = 10
"""One in so many compared prompts is held out."""


@dataclass(frozen=True, config=STRICT)
class TLDR(DatasetDefaults):
    """Posts, summaries of them, and pairs of summaries, one preferred."""

    has_references: ClassVar[bool] = True

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
    revision: str | None
    """Its commit; null is refused where it is read."""
    pairs_hub: str
    """Repository of the pairs on the hub."""
    pairs_revision: str | None
    """Its commit; null is refused where it is read."""
    on_bad_row: OnBadRow
    """error: the first bad row ends it; drop: bad rows are left out and counted."""
    max_prompt_tokens: Count
    """Longest prompt in tokens."""
    max_response_tokens: Count
    """Longest response in tokens, the end token included."""
    embedded: embedded_tldr.Knobs
    """The generated corpus; read only if source is embedded."""

    @property
    def title(self) -> str:
        """`tldr`, or `tldr-embedded`, so that nobody takes one for the other."""
        return f"{self.name}-embedded" if self.source == "embedded" else self.name

    @property
    def has_gold(self) -> bool:
        """Only what the project generates has a known reward."""
        return self.source == "embedded"

    @property
    def repositories(self) -> Mapping[str, str]:
        """Those of the demonstrations and of the pairs, if any is read."""
        names = (self.hub, self.pairs_hub)
        return dict(zip(names, self._commits(), strict=True)) if self.source == "hub" else {}

    def load(self) -> Corpus:
        """Read or generate every row."""
        if self.source == "embedded":
            scenes = embedded_tldr.SCENES[: self.embedded.topics]
            pose = partial(embedded_tldr.pose, scenes=scenes)
            write = partial(embedded_tldr.write, made_up=embedded_tldr.key_facts(scenes))
            return generate(self.title, self.embedded, pose, write, gold)
        drops, ids = Drops(self.on_bad_row), dict[object, str]()
        heldout_demos = tuple(demo for _, demo in self._demos("valid", ids, drops))
        pairs = [pair for _, pair in self._pairs(drops)]
        # By the post alone: one that was put to two subreddits is in one split all the same.
        heldout = {_post(demo.prompt) for demo in heldout_demos}
        heldout |= {_post(pair.prompt) for pair in pairs if _picked(pair.prompt)}
        demos = []
        for row, demo in self._demos("train", ids, drops):
            if _post(demo.prompt) in heldout:
                drops.add("post is held out", row.where)
            else:
                demos.append(demo)
        corpus = Corpus(
            self.title,
            _split(tuple(demos), tuple(p for p in pairs if _post(p.prompt) not in heldout)),
            _split(heldout_demos, tuple(p for p in pairs if _post(p.prompt) in heldout)),
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
            return rows.fingerprint(chain.from_iterable(rows.locate(self.path, stems)))
        demos, pairs = self._commits()
        return f"{self.hub}@{demos} {self.pairs_hub}@{pairs}"

    def shorter(self, prompt: str) -> str | None:
        """The prompt with its post cut at the last newline, or else at the last space.

        As Huang et al. 2024 (arXiv:2403.17031) prepare their queries, who without a newline cut
        characters. None where nothing of the post is left.
        """
        head, mark, post = prompt.removesuffix(END_MARK).partition(POST_MARK)
        if not post:
            return None
        kept = post.rpartition("\n")[0].rstrip() or post.rpartition(" ")[0].rstrip()
        return f"{head}{mark}{kept}{END_MARK}"

    def _commits(self) -> tuple[str, str]:
        """Of the demonstrations and of the pairs on the hub."""
        return (
            rows.pinned("data.revision", self.hub, self.revision),
            rows.pinned("data.pairs_revision", self.pairs_hub, self.pairs_revision),
        )

    def _file(self, stem: str, drops: Drops) -> Iterator[Row]:
        for file in chain.from_iterable(rows.locate(self.path, [stem])):
            yield from rows.read(file, drops)

    def _demos(
        self, split: Literal["train", "valid"], ids: dict[object, str], drops: Drops
    ) -> Iterator[tuple[Row, Demo]]:
        if self.source == "path":
            found = self._file(f"sft/{split}", drops)
        else:
            name = {"train": "train", "valid": "validation"}[split]
            found = rows.read_hub(self.hub, self._commits()[0], name, columns=())
        return drops.parsed(found, partial(new_demo, ids))

    def _pairs(self, drops: Drops) -> Iterator[tuple[Row, Pair]]:
        if self.source == "path":
            found = self._file(f"{self.comparisons}/train", drops)
        else:
            found = rows.read_hub(self.pairs_hub, self._commits()[1], "train", columns=())
        return drops.parsed(found, pair_of)


def demo_of(row: Row) -> Demo:
    """The demonstration in a row of a post's parts, or of prompt and completion (trl-lib/tldr).

    Raises BadRow.
    """
    if row.values.get("prompt") is None:
        prompt = _prompt(row, *(row.text(part) for part in PARTS))
        summary = _bare(row.text("summary"))
    else:
        prompt, summary = _rendered(row), _bare(row.text("completion"))
    if not summary:
        raise row.bad("empty summary", "its summary is empty")
    return Demo(prompt, f" {summary}", row.where)


def pair_of(row: Row) -> Pair:
    """The pair in a row of prompt, chosen and rejected, or in a comparison as OpenAI wrote it.

    Raises BadRow.
    """
    if "summaries" in row.values:
        prompt, chosen, rejected = _judged(row)
    else:
        prompt, chosen, rejected = _rendered(row), row.text("chosen"), row.text("rejected")
    chosen, rejected = _bare(chosen), _bare(rejected)
    if chosen == rejected:
        raise row.bad("identical pair", "its two summaries are the same")
    if not (chosen and rejected):
        raise row.bad("empty summary", "one of its two summaries is empty")
    return Pair(prompt, f" {chosen}", f" {rejected}", where=row.where)


def new_demo(ids: dict[object, str], row: Row) -> Demo:
    """The demonstration in a row, whose id must be none of `ids`: id -> where it stands."""
    demo, name = demo_of(row), row.values.get("id")
    if not isinstance(name, str | int | None):
        raise row.bad("wrong type", "column id holds neither text nor a number")
    if name in ids:
        raise row.bad("repeated id", f"its id is that of {ids[name]}")
    if name is not None:
        ids[name] = row.where
    return demo


def _prompt(row: Row, subreddit: str, title: str, post: str) -> str:
    """The one rendering of a post."""
    subreddit, title, post = subreddit.strip(), title.strip(), post.strip()
    if not post:
        raise row.bad("not a post", "its post is empty")
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}{POST_MARK}{post}{END_MARK}"


def _rendered(row: Row) -> str:
    """A post that is already rendered, with one newline between its parts or two, rendered anew."""
    head, _, rest = row.text("prompt").strip().partition("\nTITLE:")
    title, found, post = rest.partition("\nPOST:")
    subreddit = head.removeprefix("SUBREDDIT: r/")
    if subreddit == head or not found:
        raise row.bad("not a post", "column prompt is not SUBREDDIT: r/, TITLE: and POST: in order")
    return _prompt(row, subreddit, title, post.strip().removesuffix("TL;DR:"))


def _judged(row: Row) -> tuple[str, str, str]:
    """Prompt, preferred summary and the other one of a comparison as OpenAI wrote it."""
    info, summaries, choice = (row.values.get(name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, Mapping):
        raise row.bad("wrong type", "column info holds no object")
    if info.get("post") is None:  # a news article of CNN/DM, which OpenAI compared summaries of too
        raise row.bad("not a post", "column info holds no post")
    if not isinstance(summaries, list) or [isinstance(s, Mapping) for s in summaries] != [True] * 2:
        raise row.bad("wrong type", "column summaries does not hold two objects")
    if type(choice) is not int or choice not in (0, 1):
        raise row.bad("wrong type", "column choice holds neither 0 nor 1")
    texts = [row.checked(summary.get("text"), "text in column summaries") for summary in summaries]
    parts = (row.checked(info.get(part), f"{part} in column info") for part in PARTS)
    return _prompt(row, *parts), texts[choice], texts[1 - choice]


def _bare(summary: str) -> str:
    """A summary without the mark that some files put before it."""
    return summary.strip().removeprefix("TL;DR:").strip()


def _post(prompt: str) -> str:
    """What stands after the title."""
    return prompt.partition(POST_MARK)[2]


def _picked(prompt: str) -> bool:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % HELD_OUT == 0


def _split(demos: tuple[Demo, ...], pairs: tuple[Pair, ...]) -> Split:
    return Split(demos, pairs, unique(demo.prompt for demo in demos))
