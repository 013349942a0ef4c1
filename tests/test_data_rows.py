"""Rows from files and the hub: what is kept, what is left out and why, and what is refused."""

from __future__ import annotations

import gzip
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli import hub
from rlhf_cli.data.corpus import Demo, Pair
from rlhf_cli.data.embedded import Embedded
from rlhf_cli.data.hh import HH, fault, first_turn, last_answer
from rlhf_cli.data.tldr import TLDR
from rlhf_cli.errors import UserError

TINY = Embedded(prompts=4, demos=3, pairs=2, heldout=2, temperature=1.0, seed=0)
HH_ROWS = HH(
    name="hh",
    source="path",
    path=None,
    hub="Anthropic/hh-rlhf",
    revision="09be8c5",
    subsets=("helpful-base",),
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
    revision="abc",
    pairs_hub="some/pairs",
    pairs_revision="def",
    max_prompt_tokens=112,
    max_response_tokens=32,
    embedded=TINY,
)


def chat(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def row(first: str, chosen: str = "good", rejected: str = "bad") -> dict[str, str]:
    return {"chosen": chat(first, chosen), "rejected": chat(first, rejected)}


def write_rows(file: Path, found: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in found)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        file.write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of 3 training rows and 1 held-out row."""
    write_rows(tmp_path / "helpful-base/train.jsonl.gz", [row("a"), row("b"), row("c")])
    write_rows(tmp_path / "helpful-base/test.jsonl.gz", [row("d")])
    return tmp_path


def load(folder: Path):
    return replace(HH_ROWS, path=str(folder)).load()


def test_a_row_becomes_a_prompt_and_two_answers_that_join_to_the_transcripts(folder):
    corpus = load(folder)
    assert corpus.title == "hh" and corpus.gold is None
    assert corpus.train.pairs[0] == Pair("\n\nHuman: a\n\nAssistant:", " good", " bad")
    assert corpus.train.demos[0] == Demo("\n\nHuman: a\n\nAssistant:", " good")
    assert corpus.heldout.prompts == ("\n\nHuman: d\n\nAssistant:",)


@pytest.mark.parametrize(
    ("chosen", "rejected", "cause"),
    [
        (chat("q", "x"), chat("q", "y"), None),
        (chat("q", "x", "r", "y"), chat("q", "x", "r", "z"), None),
        (chat("q", "x"), chat("p", "y"), "prompts differ"),
        (chat("q", "x"), chat("q", "x", "r", "y"), "prompts differ"),
        (chat("q", "x"), chat("q", "x"), "identical pair"),
        (chat("q", "x"), chat("q", " "), "empty answer"),
        (
            chat("q", "") + "\n\nAssistant: x",
            chat("q", "") + "\n\nAssistant: y",
            "broken role order",
        ),
        (chat("q", "x", "r"), chat("q", "x", "s"), "broken role order"),
        ("Well" + chat("q", "x"), "Well" + chat("q", "y"), "broken role order"),
        ("no turns", "at all", "broken role order"),
    ],
)
def test_a_pair_of_transcripts_is_kept_or_left_out_for_one_cause(chosen, rejected, cause):
    assert fault(chosen, rejected) == cause


def test_left_out_rows_are_counted_by_cause_with_file_and_line(folder):
    bad = [row("e", rejected="good"), row("f"), row("g", rejected=""), row("d", "other")]
    write_rows(folder / "helpful-base/train.jsonl.gz", bad)
    corpus = load(folder)
    assert corpus.drops == {
        "identical pair": ("helpful-base/train.jsonl.gz:1",),
        "empty answer": ("helpful-base/train.jsonl.gz:3",),
        "first turn is held out": ("helpful-base/train.jsonl.gz:4",),
    }
    assert [first_turn(p) for p in corpus.train.prompts] == ["f"]


def test_the_digest_sees_every_row_and_their_order(folder):
    digests = {load(folder).digest}
    for found in ([row("a"), row("c"), row("b")], [row("a"), row("b"), row("c", "better")]):
        write_rows(folder / "helpful-base/train.jsonl.gz", found)
        digests.add(load(folder).digest)
    assert len(digests) == 3


def test_the_fingerprint_sees_the_bytes_and_not_the_place(folder, tmp_path_factory):
    here = replace(HH_ROWS, path=str(folder)).fingerprint()
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    for split in ("train", "test"):
        file = copy / f"helpful-base/{split}.jsonl.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((folder / f"helpful-base/{split}.jsonl.gz").read_bytes())
    assert replace(HH_ROWS, path=str(copy)).fingerprint() == here
    write_rows(copy / "helpful-base/test.jsonl.gz", [row("x")])
    assert replace(HH_ROWS, path=str(copy)).fingerprint() != here


def test_fingerprints_of_generator_and_hub_name_what_determines_the_rows():
    embedded = replace(HH_ROWS, source="embedded")
    noisier = replace(embedded, embedded=replace(TINY, temperature=2.0))
    assert embedded.title == "hh-embedded" and embedded.load().title == "hh-embedded"
    assert embedded.fingerprint() != noisier.fingerprint()
    assert replace(HH_ROWS, source="hub").fingerprint() == "Anthropic/hh-rlhf@09be8c5"
    assert replace(TLDR_ROWS, source="hub").fingerprint() == "some/posts@abc some/pairs@def"


def test_plain_jsonl_is_read_where_there_is_no_compressed_file(folder):
    (folder / "helpful-base/test.jsonl.gz").unlink()
    write_rows(folder / "helpful-base/test.jsonl", [row("plain")])
    assert load(folder).heldout.prompts == ("\n\nHuman: plain\n\nAssistant:",)


def spoil_path(folder: Path) -> str:
    return str(folder / "nowhere")


def spoil_layout(folder: Path) -> str:
    (folder / "helpful-base/test.jsonl.gz").unlink()
    return str(folder)


def spoil_column(folder: Path) -> str:
    write_rows(folder / "helpful-base/train.jsonl.gz", [row("a"), {"chosen": chat("b", "x")}])
    return str(folder)


def spoil_type(folder: Path) -> str:
    write_rows(folder / "helpful-base/train.jsonl.gz", [row("a"), row("b") | {"rejected": 3}])  # type: ignore[dict-item]
    return str(folder)


def spoil_json(folder: Path) -> str:
    file = folder / "helpful-base/train.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row("a")).encode() + b"\n{oops\n"))
    return str(folder)


def spoil_gzip(folder: Path) -> str:
    file = folder / "helpful-base/train.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-12])
    return str(folder)


def spoil_magic(folder: Path) -> str:
    (folder / "helpful-base/train.jsonl.gz").write_text("not compressed")
    return str(folder)


def spoil_split(folder: Path) -> str:
    write_rows(folder / "helpful-base/test.jsonl.gz", [])
    return str(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_path, ("data.path=", "nowhere", "not a folder")),
        (spoil_layout, ("data.path=", "no helpful-base/test.jsonl.gz")),
        (spoil_column, ("train.jsonl.gz:2", "no text in column rejected", "chosen, rejected")),
        (spoil_type, ("train.jsonl.gz:2", "no text in column rejected")),
        (spoil_json, ("train.jsonl.gz:2", "not valid JSON")),
        (spoil_gzip, ("train.jsonl.gz", "cannot be read to its end")),
        (spoil_magic, ("train.jsonl.gz", "cannot be read to its end")),
        (spoil_split, ("held-out split", "no demos", "data.path=")),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_place(folder, spoil, words):
    with pytest.raises(UserError) as error:
        replace(HH_ROWS, path=spoil(folder)).load()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_a_path_that_was_never_given_is_asked_for():
    for dataset in (HH_ROWS, TLDR_ROWS):
        with pytest.raises(UserError, match=r"data\.path is not set.*add data\.path=DIR"):
            dataset.fingerprint()


def test_without_a_network_the_hub_fails_within_4_seconds_and_names_three_ways_out(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "_connects", lambda: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        replace(HH_ROWS, source="hub").load()
    assert time.monotonic() - start < 4
    for way in ("data.source=path data.path=DIR", "data.source=embedded", "HF_HUB_OFFLINE=1"):
        assert way in str(error.value)


def test_a_refused_connection_counts_as_no_network(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert not hub._connects()


def test_the_hub_is_asked_for_one_folder_at_the_pinned_commit_and_gives_the_rows_of_files(
    folder, monkeypatch
):
    asked = []

    class Table(list):  # what the library hands back, as far as it is used
        column_names = ("chosen", "rejected")

        def select_columns(self, names):
            return self

    def load_dataset(repository, data_dir, revision, split):
        asked.append((repository, data_dir, revision, split))
        with gzip.open(folder / data_dir / f"{split}.jsonl.gz", "rt") as lines:
            return Table(json.loads(line) for line in lines)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = replace(HH_ROWS, source="hub").load()
    assert corpus.digest == load(folder).digest
    assert asked == [
        ("Anthropic/hh-rlhf", "helpful-base", "09be8c5", "test"),
        ("Anthropic/hh-rlhf", "helpful-base", "09be8c5", "train"),
    ]
    Table.column_names = ("prompt", "response")
    with pytest.raises(UserError, match=r"helpful-base/test has no column chosen"):
        replace(HH_ROWS, source="hub").load()


def test_an_empty_cache_offline_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nbecause it is offline")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"could not be loaded \(ConnectionError\)") as error:
        replace(HH_ROWS, source="hub").load()
    assert "\n" not in str(error.value)


def post(n: int) -> dict[str, str]:
    return {"subreddit": "x", "title": f"t{n}", "post": f"p{n}\n", "summary": f"s{n}"}


def compared(n: int, head: str = "\n\n", tail: str = "\n\nTL;DR:") -> dict[str, str]:
    prompt = f"SUBREDDIT: r/x{head}TITLE: t{n}{head}POST: p{n}{tail}"
    return {"prompt": prompt, "chosen": f"TL;DR:  good {n}", "rejected": f"  bad {n}"}


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """100 training posts, 3 of validation, 100 compared posts in two styles."""
    write_rows(tmp_path / "sft/train.jsonl.gz", [post(n) for n in range(100)])
    write_rows(tmp_path / "sft/valid.jsonl.gz", [post(n) for n in (200, 201, 7)])
    styles = [compared(n) if n % 2 else compared(n, "\n", "") for n in range(100)]
    write_rows(tmp_path / "comparisons_ai/train.jsonl.gz", styles)
    return tmp_path


def test_posts_are_rendered_alike_whatever_the_style_of_the_file(posts):
    corpus = replace(TLDR_ROWS, path=str(posts)).load()
    assert corpus.train.demos[0] == Demo("SUBREDDIT: r/x\n\nTITLE: t0\n\nPOST: p0\n\nTL;DR:", " s0")
    assert corpus.train.pairs[0] == Pair(corpus.train.demos[0].prompt, " good 0", " bad 0")
    assert {p.prompt for p in corpus.train.pairs} == set(corpus.train.prompts)


def test_a_tenth_of_the_compared_posts_and_those_of_validation_are_held_out(posts):
    corpus = replace(TLDR_ROWS, path=str(posts)).load()
    # 100 posts at one in ten: 10 +- 3, give or take three standard deviations of 3.
    assert 1 <= len(corpus.heldout.pairs) <= 19
    assert len(corpus.heldout.pairs) + len(corpus.train.pairs) == 100
    train = {r.prompt for r in (*corpus.train.demos, *corpus.train.pairs)}
    held = {r.prompt for r in (*corpus.heldout.demos, *corpus.heldout.pairs)}
    assert train.isdisjoint(held)
    assert any("POST: p7\n" in prompt for prompt in held)
    assert len(corpus.drops["post is held out"]) == 100 - len(corpus.train.demos)
    assert "sft/train.jsonl.gz:8" in corpus.drops["post is held out"]


def test_faulty_comparisons_and_summaries_are_left_out_by_cause(posts):
    write_rows(posts / "sft/valid.jsonl.gz", [post(200), post(201) | {"summary": " "}])
    odd = [
        compared(1) | {"prompt": "Just some text"},
        compared(2) | {"chosen": "TL;DR: same", "rejected": " same"},
        compared(3) | {"rejected": "TL;DR:"},
    ]
    write_rows(posts / "comparisons_ai/train.jsonl.gz", odd + [compared(n) for n in range(90)])
    drops = replace(TLDR_ROWS, path=str(posts)).load().drops
    assert drops["not a post"] == ("comparisons_ai/train.jsonl.gz:1",)
    assert drops["identical pair"] == ("comparisons_ai/train.jsonl.gz:2",)
    assert drops["empty summary"] == (
        "sft/valid.jsonl.gz:2",
        "comparisons_ai/train.jsonl.gz:3",
    )


def test_helpful_base_has_exactly_15_planted_rows_and_4_with_a_turn_taken_twice(shared_data):
    corpus = load(shared_data / "hh-rlhf")
    name = "helpful-base/train.jsonl.gz"
    assert {cause: len(found) for cause, found in corpus.drops.items()} == {
        "prompts differ": 9,
        "empty answer": 4,
        "identical pair": 2,
        "broken role order": 4,
    }
    assert corpus.drops["identical pair"] == (f"{name}:518", f"{name}:1560")
    assert corpus.drops["empty answer"] == tuple(f"{name}:{n}" for n in (81, 528, 862, 1479))
    assert corpus.drops["broken role order"] == tuple(f"{name}:{n}" for n in (246, 700, 963, 1330))
    assert (len(corpus.train.pairs), len(corpus.heldout.pairs)) == (1686 - 19, 203)


def test_real_transcripts_are_put_together_again_byte_for_byte(shared_data):
    pairs = iter(load(shared_data / "hh-rlhf").heldout.pairs)
    with gzip.open(shared_data / "hh-rlhf/helpful-base/test.jsonl.gz", "rt") as lines:
        for line, pair in zip(lines, pairs, strict=True):
            found = json.loads(line)
            assert pair.prompt + pair.chosen == found["chosen"]
            assert pair.prompt + pair.rejected == found["rejected"]
            assert last_answer(found["chosen"]) == (pair.prompt, pair.chosen)


def test_real_posts_and_comparisons_share_prompts(shared_data):
    dataset = replace(TLDR_ROWS, path=str(shared_data / "tldr"))
    corpus = dataset.load()
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == 788
    assert {p.prompt for p in corpus.train.pairs} <= set(corpus.train.prompts)
    assert len(corpus.heldout.prompts) == 202
    human = replace(dataset, comparisons="comparisons_human").load()
    assert len(human.train.pairs) + len(human.heldout.pairs) == 100
