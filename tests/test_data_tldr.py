"""TL;DR: one rendering for posts of every shape, which rows are refused, and what is held out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli.config import compose, recipe
from rlhf_cli.data.corpus import BadRow, Corpus, Demo, Pair
from rlhf_cli.data.rows import SUFFIXES, Row
from rlhf_cli.data.tldr import demo_of, pair_of
from rlhf_cli.errors import UserError
from tests.data_samples import (
    COMMIT,
    TLDR_ROWS,
    compared,
    completed,
    judged,
    post,
    write_rows,
)

HOW_TO_GO_ON = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
PROMPT = "SUBREDDIT: r/x\n\nTITLE: t{n}\n\nPOST: p{n}\n\nTL;DR:"


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """100 training posts, 3 of validation, 100 compared posts in two styles."""
    write_rows(tmp_path / "sft/train.jsonl.gz", [post(n) for n in range(100)])
    heldout = [post(200) | {"id": 200}, post(201), post(7) | {"id": None}]
    write_rows(tmp_path / "sft/valid.jsonl.gz", heldout)
    styles = [compared(n) if n % 2 else compared(n, "\n", "") for n in range(100)]
    write_rows(tmp_path / "comparisons_ai/train.jsonl.gz", styles)
    return tmp_path


def load(folder: Path, **changes: object) -> Corpus:
    return replace(TLDR_ROWS, path=str(folder), **changes).load()  # type: ignore[arg-type]


def bodies_of(corpus: Corpus) -> tuple[set[str], set[str]]:
    """The posts of everything in the training split, and of everything in the held-out one."""
    train, heldout = (
        {row.prompt.partition("\n\nPOST: ")[2] for row in (*split.demos, *split.pairs)}
        | {prompt.partition("\n\nPOST: ")[2] for prompt in split.prompts}
        for split in (corpus.train, corpus.heldout)
    )
    return train, heldout


@pytest.mark.parametrize("shape", [post, completed])
def test_a_demonstration_of_either_shape_is_rendered_alike(shape):
    assert demo_of(Row("f:1", shape(3))) == Demo(PROMPT.format(n=3), " s3")


@pytest.mark.parametrize(
    "row",
    [
        compared(3),
        compared(3, "\n", ""),
        compared(3, "\n", "\nTL;DR:"),
        compared(3, "  \n\n", "\n\nTL;DR: "),
        compared(3) | {"chosen": " good 3", "rejected": " bad 3"},
        judged(3, 0),
        judged(3, 1),
    ],
)
def test_a_comparison_of_every_shape_is_rendered_alike(row):
    assert pair_of(Row("f:1", row)) == Pair(PROMPT.format(n=3), " good 3", " bad 3")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_data_come_out_of_files_of_every_kind(posts, tmp_path_factory, suffix):
    other = tmp_path_factory.mktemp("other")
    write_rows(other / f"sft/train{suffix}", [completed(n) for n in range(100)])
    write_rows(other / f"sft/valid{suffix}", [completed(n) for n in (200, 201, 7)])
    write_rows(other / f"comparisons_ai/train{suffix}", [compared(n) for n in range(100)])
    corpus = load(other, on_bad_row="error")
    assert corpus.digest == load(posts).digest
    assert corpus.train.demos[0] == Demo(PROMPT.format(n=0), " s0")
    assert corpus.train.pairs[0] == Pair(PROMPT.format(n=0), " good 0", " bad 0")
    assert {pair.prompt for pair in corpus.train.pairs} == set(corpus.train.prompts)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_comparisons_as_openai_wrote_them_are_the_same_data(posts, suffix):
    write_rows(posts / f"comparisons_own/train{suffix}", [judged(n, n % 2) for n in range(100)])
    assert load(posts, comparisons="comparisons_own").digest == load(posts).digest


def test_a_tenth_of_the_compared_posts_and_those_of_validation_are_held_out(posts):
    corpus = load(posts, on_bad_row="error")
    # 100 posts at one in ten: 10 +- 3, give or take three standard deviations of 3.
    assert 1 <= len(corpus.heldout.pairs) <= 19
    assert len(corpus.heldout.pairs) + len(corpus.train.pairs) == 100
    train, heldout = bodies_of(corpus)
    assert train.isdisjoint(heldout)
    assert "p7\n\nTL;DR:" in heldout
    assert len(corpus.drops["post is held out"]) == 100 - len(corpus.train.demos)
    assert "sft/train.jsonl.gz:8" in corpus.drops["post is held out"]


def test_a_post_put_to_two_subreddits_is_in_one_split(posts):
    twice = post(200) | {"id": "again", "subreddit": "y", "title": "another title"}
    write_rows(posts / "sft/train.jsonl.gz", [post(0), twice])
    prompt = "SUBREDDIT: r/z\n\nTITLE: and another\n\nPOST: p201\n\nTL;DR:"
    write_rows(
        posts / "comparisons_ai/train.jsonl.gz",
        [compared(n) for n in range(100)] + [compared(1) | {"prompt": prompt}],
    )
    corpus = load(posts)
    assert "sft/train.jsonl.gz:2" in corpus.drops["post is held out"]
    assert prompt in {pair.prompt for pair in corpus.heldout.pairs}


ORDER = "column prompt is not SUBREDDIT: r/, TITLE: and POST: in order"
NO_TEXT = "its post is empty"
NO_SUMMARY = "its summary is empty"
BAD_DEMOS = {
    "blank": (post(1) | {"summary": " "}, "empty summary", NO_SUMMARY),
    "mark alone": (completed(1) | {"completion": "TL;DR: "}, "empty summary", NO_SUMMARY),
    "no text": (post(1) | {"post": "\n"}, "not a post", NO_TEXT),
    "some text": (completed(1) | {"prompt": "Hello"}, "not a post", ORDER),
    "no title": (post(1) | {"title": None}, "missing column", "there is nothing in column title"),
    "number": (post(1) | {"summary": 5}, "wrong type", "column summary holds a number, not text"),
    "odd id": (post(1) | {"id": ["a"]}, "wrong type", "column id holds neither text nor a number"),
    "id": (post(1) | {"id": "id0"}, "repeated id", "its id is that of sft/train.jsonl:1"),
    "validation": (post(1) | {"id": 200}, "repeated id", "its id is that of sft/valid.jsonl.gz:1"),
}


@pytest.mark.parametrize(("row", "cause", "what"), BAD_DEMOS.values(), ids=BAD_DEMOS)
def test_a_faulty_demonstration_is_named_in_one_sentence_or_left_out(posts, row, cause, what):
    (posts / "sft/train.jsonl.gz").unlink()
    write_rows(posts / "sft/train.jsonl", [post(0), row, post(2)])
    write_rows(posts / "comparisons_ai/train.jsonl.gz", [compared(n) for n in range(90)])
    drops = dict(load(posts).drops)
    drops.pop("post is held out", None)
    assert drops == {cause: ("sft/train.jsonl:2",)}
    with pytest.raises(BadRow) as error:
        load(posts, on_bad_row="error")
    assert str(error.value) == f"sft/train.jsonl:2: {what}{HOW_TO_GO_ON}"


NEWS = {"article": "News", "post": None}
UNTITLED = {"subreddit": "x", "title": None, "post": "p"}
SAME = "its two summaries are the same"
TWO = "column summaries does not hold two objects"
CHOICE = "column choice holds neither 0 nor 1"


def parts(subreddit: str, title: str, text: str) -> dict[str, object]:
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {text}\nTL;DR:"
    return compared(1) | {"prompt": prompt}


def told(*summaries: object) -> dict[str, object]:
    return judged(1) | {"summaries": list(summaries)}


def text(summary: str) -> dict[str, str]:
    return {"text": summary}


BAD_PAIRS = {
    "some text": (compared(1) | {"prompt": "Hello"}, "not a post", ORDER),
    "order": (compared(1) | {"prompt": "SUBREDDIT: r/x\nPOST: p\nTITLE: t"}, "not a post", ORDER),
    "no text": (parts("x", "t", ""), "not a post", NO_TEXT),
    "same": (compared(1) | {"chosen": "TL;DR: s", "rejected": " s"}, "identical pair", SAME),
    "blank": (compared(1) | {"rejected": "TL;DR:"}, "empty summary", "one of its two summaries is empty"),
    "no prompt": (compared(1) | {"prompt": None}, "missing column", "there is nothing in column prompt"),
    "number": (compared(1) | {"chosen": 1}, "wrong type", "column chosen holds a number, not text"),
    "article": (judged(1) | {"info": NEWS}, "not a post", "column info holds no post"),
    "no info": (judged(1) | {"info": "p"}, "wrong type", "column info holds no object"),
    "title": (judged(1) | {"info": UNTITLED}, "wrong type", "title in column info holds nothing, not text"),
    "one": (told(text("s")), "wrong type", TWO),
    "three": (told(text("a"), text("b"), text("c")), "wrong type", TWO),
    "bare texts": (told("a", "b"), "wrong type", TWO),
    "untold": (told(text("a"), {}), "wrong type", "text in column summaries holds nothing, not text"),
    "third": (judged(1) | {"choice": 2}, "wrong type", CHOICE),
    "minus": (judged(1) | {"choice": -1}, "wrong type", CHOICE),
    "true": (judged(1) | {"choice": True}, "wrong type", CHOICE),
    "unchosen": (judged(1) | {"choice": None}, "wrong type", CHOICE),
    "judged same": (told(text("a"), text(" a ")), "identical pair", SAME),
}  # fmt: skip


@pytest.mark.parametrize(("row", "cause", "what"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_faulty_comparison_is_named_in_one_sentence_or_left_out(posts, row, cause, what):
    (posts / "comparisons_ai/train.jsonl.gz").unlink()
    found = [compared(0), row, *(judged(n) for n in range(2, 90))]
    write_rows(posts / "comparisons_ai/train.jsonl", found)
    corpus = load(posts)
    assert corpus.drops[cause] == ("comparisons_ai/train.jsonl:2",)
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == 89
    with pytest.raises(BadRow) as error:
        load(posts, on_bad_row="error")
    assert str(error.value) == f"comparisons_ai/train.jsonl:2: {what}{HOW_TO_GO_ON}"


def test_the_shipped_configuration_does_not_read_the_hub_before_both_commits_are_named(monkeypatch):
    def asked(*_, **__):
        pytest.fail("the hub was asked")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=asked))
    for words, key in (
        ([], "data.revision"),
        ([f"data.revision={COMMIT}"], "data.pairs_revision"),
    ):
        data = recipe(compose(["data=tldr", "data.source=hub", *words])).data
        for act in (data.fingerprint, data.load):
            with pytest.raises(UserError) as error:
                act()
            message = str(error.value)
            assert message.startswith(f"{key}=null is no commit of ")
            assert message.endswith(f"with {key}=COMMIT.") and "\n" not in message


def test_the_fingerprint_on_the_hub_is_both_commits():
    assert replace(TLDR_ROWS, source="hub").fingerprint() == (
        f"some/posts@{COMMIT} some/pairs@{COMMIT[::-1]}"
    )


def test_the_hub_gives_the_rows_of_files(posts, monkeypatch):
    files = {
        ("some/posts", COMMIT, "train"): [post(n) for n in range(100)],
        ("some/posts", COMMIT, "validation"): [post(n) | {"id": None} for n in (200, 201, 7)],
        ("some/pairs", COMMIT[::-1], "train"): [judged(n) for n in range(100)],
    }

    class Table(list):  # what the library hands back, as far as it is used
        column_names = ()

    def load_dataset(path, data_dir, revision, split):
        assert data_dir is None
        return Table(files[path, revision, split])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("rlhf_cli.hub.out_of_reach", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert replace(TLDR_ROWS, source="hub").load().digest == load(posts).digest


def test_a_post_gets_shorter_line_by_line_then_word_by_word_until_nothing_is_left():
    prompt = "SUBREDDIT: r/x\n\nTITLE: a title\n\nPOST: {}\n\nTL;DR:"
    post = "one two\n\nthree four\nfive"
    cuts, cut = [], prompt.format(post)
    while (cut := TLDR_ROWS.shorter(cut)) is not None:
        cuts.append(cut)
    said = ["one two\n\nthree four", "one two", "one", ""]
    assert cuts == [prompt.format(text) for text in said]


def test_real_posts_and_comparisons_share_prompts(shared_data):
    corpus = load(shared_data / "tldr", on_bad_row="error")
    assert corpus.drops.keys() == {"post is held out"}
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == 788
    assert {pair.prompt for pair in corpus.train.pairs} <= set(corpus.train.prompts)
    assert (len(corpus.train.demos), len(corpus.heldout.prompts)) == (1762 - 78, 202)
    human = load(shared_data / "tldr", comparisons="comparisons_human", on_bad_row="error")
    assert len(human.train.pairs) + len(human.heldout.pairs) == 100
    assert (len(human.train.demos), human.drops) == (1762, {})


@pytest.mark.parametrize("comparisons", ["comparisons_ai", "comparisons_human"])
def test_real_splits_share_no_post(shared_data, comparisons):
    corpus = load(shared_data / "tldr", comparisons=comparisons)
    train, heldout = bodies_of(corpus)
    assert len(train) > 1600 and len(heldout) > 200 and train.isdisjoint(heldout)
    assert len(set(corpus.heldout.prompts)) == len(corpus.heldout.prompts)


def test_real_posts_get_shorter_and_stay_posts(shared_data):
    for prompt in load(shared_data / "tldr").heldout.prompts:
        head, last = prompt.partition("POST: ")[0], prompt
        while (cut := TLDR_ROWS.shorter(last)) is not None:
            assert cut.startswith(f"{head}POST: ") and cut.endswith("\n\nTL;DR:")
            assert len(cut) < len(last)
            last = cut
        assert last == f"{head}POST: \n\nTL;DR:"
