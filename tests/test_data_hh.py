"""HH: what a row becomes, which rows are refused, and that no conversation is in both splits."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.config import compose, recipe
from rlhf_cli.data.corpus import BadRow, Corpus, Demo, Pair
from rlhf_cli.data.hh import last_answer, pair_of
from rlhf_cli.data.rows import SUFFIXES, Row
from rlhf_cli.data.transcript import first_turn
from rlhf_cli.errors import UserError
from tests.data_samples import COMMIT, HH_ROWS, TINY, chat, static, talk, write_rows

HOW_TO_GO_ON = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
PROMPTS = "chosen and rejected do not answer the same prompt"
CHOSEN, REJECTED = (f"the answer in column {name} is empty" for name in ("chosen", "rejected"))
TURNS = "Human and Assistant do not take turns in it, Human first and Assistant last"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder of 3 training rows and 1 held-out row."""
    write_rows(tmp_path / "helpful-base/train.jsonl.gz", [talk("a"), talk("b"), talk("c")])
    write_rows(tmp_path / "helpful-base/test.jsonl.gz", [talk("d")])
    return tmp_path


def load(folder: Path, **changes: object) -> Corpus:
    return replace(HH_ROWS, path=str(folder), **changes).load()  # type: ignore[arg-type]


def turns_of(corpus: Corpus) -> tuple[set[str | None], set[str | None]]:
    """First human turns of everything in the training split, and of everything in the held-out one."""
    train, heldout = (
        {first_turn(p) for p in split.prompts}
        | {first_turn(row.prompt) for row in (*split.demos, *split.pairs)}
        for split in (corpus.train, corpus.heldout)
    )
    return train, heldout


def test_a_row_becomes_a_prompt_and_two_answers_that_join_to_the_transcripts(folder):
    corpus = load(folder)
    assert corpus.title == "hh" and corpus.gold is None
    assert corpus.train.pairs[0] == Pair("\n\nHuman: a\n\nAssistant:", " good", " bad")
    assert corpus.train.demos[0] == Demo("\n\nHuman: a\n\nAssistant:", " good")
    assert corpus.heldout.prompts == ("\n\nHuman: d\n\nAssistant:",)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [talk, static])
def test_whole_transcripts_and_bare_answers_are_the_same_data_in_files_of_every_kind(
    folder, tmp_path_factory, shape, suffix
):
    other = tmp_path_factory.mktemp("other")
    write_rows(other / f"helpful-base/train{suffix}", [shape("a"), shape("b"), shape("c")])
    write_rows(other / f"helpful-base/test{suffix}", [shape("d")])
    assert load(other, on_bad_row="error").digest == load(folder).digest


def test_subsets_are_read_in_the_order_given(folder):
    for subset, words in ("harmless-base", "xyz"), ("helpful-online", "uvw"):
        *train, test = (talk(word) for word in words)
        write_rows(folder / f"{subset}/train.jsonl", train)
        write_rows(folder / f"{subset}/test.jsonl", [test])
    corpus = load(folder, subsets=("helpful-online", "helpful-base", "harmless-base"))
    assert [first_turn(p) for p in corpus.train.prompts] == [*"uvabcxy"]
    assert [first_turn(p) for p in corpus.heldout.prompts] == [*"wdz"]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("[helpful-bas]", "data.subsets.0=helpful-bas is not allowed: it must be 'helpful-base', "
         "'helpful-online', 'helpful-rejection-sampled' or 'harmless-base'; give another value."),
        ("[]", "data.subsets=[] is not allowed: it must name at least one subset, and each only "
         "once; give another value."),
        ("[helpful-base,helpful-base]", "data.subsets=['helpful-base', 'helpful-base'] is not "
         "allowed: it must name at least one subset, and each only once; give another value."),
    ],
)  # fmt: skip
def test_subsets_are_known_names_each_of_them_once(word, says):
    with pytest.raises(UserError) as error:
        recipe(compose([f"data.subsets={word}"]))
    assert str(error.value) == says


def test_the_shipped_configuration_leaves_faulty_rows_out_and_names_a_commit():
    data = recipe(compose(["data.source=hub"])).data
    assert data.on_bad_row == "drop"
    assert data.fingerprint() == f"Anthropic/hh-rlhf@{data.revision}"


PROMPT = "\n\nHuman: q\n\nAssistant:"
ASKED, TWICE = chat("q", "x"), chat("q", "") + "\n\nAssistant:"
BAD_TRANSCRIPTS = {
    "other prompt": ((ASKED, chat("p", "y")), "prompts differ", PROMPTS),
    "longer": ((ASKED, chat("q", "x", "r", "y")), "prompts differ", PROMPTS),
    "same": ((ASKED, ASKED), "identical pair", "chosen and rejected are the same"),
    "no chosen": ((chat("q", ""), ASKED), "empty answer", CHOSEN),
    "no rejected": ((ASKED, chat("q", " \n")), "empty answer", REJECTED),
    "twice": ((TWICE + " x", TWICE + " y"), "broken role order", TURNS),
    "human last": ((chat("q", "x", "r"), chat("q", "x", "s")), "broken role order", TURNS),
    "text first": (("Well" + ASKED, "Well" + chat("q", "y")), "broken role order", TURNS),
    "assistant first": ((ASKED[10:], chat("q", "y")[10:]), "broken role order", TURNS),
    "no turns": (("no turns", "at all"), "broken role order", TURNS),
    "no column": ((ASKED, None), "missing column", "there is nothing in column rejected"),
    "a list": (([ASKED], ASKED), "wrong type", "column chosen holds a list, not text"),
}
BAD_ANSWERS = {
    "same": ((PROMPT, " x", " x"), "identical pair", "chosen and rejected are the same"),
    "no chosen": ((PROMPT, " ", " x"), "empty answer", CHOSEN),
    "no rejected": ((PROMPT, " x", ""), "empty answer", REJECTED),
    "no mark": (("\n\nHuman: q", " x", " y"), "broken role order", TURNS),
    "text behind it": ((PROMPT + " Yes", " x", " y"), "broken role order", TURNS),
    "twice": ((TWICE, " x", " y"), "broken role order", TURNS),
    "goes on": ((PROMPT, " x\n\nHuman: r\n\nAssistant: y", " z"), "broken role order", TURNS),
    "no prompt": (("", " x", " y"), "broken role order", TURNS),
    "a number": ((1, " x", " y"), "wrong type", "column prompt holds a number, not text"),
}
BAD_ROWS = {
    f"{columns[0]} {name}": (dict(zip(columns, found, strict=True)), *why)
    for columns, bad in (
        (("chosen", "rejected"), BAD_TRANSCRIPTS),
        (("prompt", "chosen", "rejected"), BAD_ANSWERS),
    )
    for name, (found, *why) in bad.items()
}


@pytest.mark.parametrize(("row", "cause", "what"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_faulty_row_is_named_in_one_sentence_or_left_out_for_one_cause(folder, row, cause, what):
    file = write_rows(folder / "helpful-base/train.jsonl", [talk("a"), row, talk("b")])
    file.with_suffix(".jsonl.gz").unlink()
    corpus = load(folder)
    assert corpus.drops == {cause: ("helpful-base/train.jsonl:2",)}
    assert [first_turn(p) for p in corpus.train.prompts] == ["a", "b"]
    with pytest.raises(BadRow) as error:
        load(folder, on_bad_row="error")
    assert str(error.value) == f"helpful-base/train.jsonl:2: {what}{HOW_TO_GO_ON}"


@pytest.mark.parametrize("row", [talk("q"), static("q"), static("q") | {"response": None}])
def test_a_sound_row_of_either_shape_is_a_pair(row):
    assert pair_of(Row("f:1", row)) == Pair(PROMPT, " good", " bad")


def test_left_out_rows_are_counted_by_cause_with_file_and_line(folder):
    bad = [talk("e", rejected="good"), talk("f"), talk("g", rejected=""), talk("d", "other")]
    write_rows(folder / "helpful-base/train.jsonl.gz", bad)
    corpus = load(folder)
    assert corpus.drops == {
        "identical pair": ("helpful-base/train.jsonl.gz:1",),
        "empty answer": ("helpful-base/train.jsonl.gz:3",),
        "first turn is held out": ("helpful-base/train.jsonl.gz:4",),
    }
    assert [first_turn(p) for p in corpus.train.prompts] == ["f"]


def test_a_conversation_goes_to_one_split_however_it_goes_on_and_that_is_no_fault(folder):
    write_rows(folder / "harmless-base/test.jsonl", [talk("b"), talk("b", "other")])
    longer = {"chosen": chat("d", "x", "more", "y"), "rejected": chat("d", "x", "more", "z")}
    spaced = talk("  b ")
    write_rows(folder / "harmless-base/train.jsonl", [longer, talk("e"), talk("e", "c"), spaced])
    corpus = load(folder, subsets=("helpful-base", "harmless-base"), on_bad_row="error")
    train, heldout = turns_of(corpus)
    assert (train, heldout) == ({*"ace"}, {*"bd"})
    assert corpus.drops == {
        "first turn is held out": (
            "helpful-base/train.jsonl.gz:2",
            "harmless-base/train.jsonl:1",
            "harmless-base/train.jsonl:4",
        )
    }
    # Prompts are distinct, pairs are all there.
    assert len(corpus.train.pairs) == 4 and len(corpus.train.prompts) == 3
    assert len(corpus.heldout.pairs) == 3 and len(corpus.heldout.prompts) == 2


def test_a_split_without_a_usable_row_is_refused_with_the_commonest_cause(folder):
    columns = [{"question": "d", "answer": "e"}] * 3
    write_rows(folder / "helpful-base/test.jsonl.gz", [talk("d", rejected=""), *columns])
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value) == (
        f"data.path={folder}: the held-out split of hh has no demos (rows left out: 4, above all for "
        "'missing column' as at helpful-base/test.jsonl.gz:2); give files with usable rows or choose "
        "another data.source."
    )


def test_a_split_that_loses_every_row_to_the_other_says_so(folder):
    write_rows(folder / "helpful-base/train.jsonl.gz", [talk("d")])
    with pytest.raises(UserError, match=r"training split .* for 'first turn is held out' as at "):
        load(folder)


def test_the_digest_sees_every_row_and_their_order(folder):
    digests = {load(folder).digest}
    for found in ([talk("a"), talk("c"), talk("b")], [talk("a"), talk("b"), talk("c", "better")]):
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
    write_rows(copy / "helpful-base/test.jsonl.gz", [talk("x")])
    assert replace(HH_ROWS, path=str(copy)).fingerprint() != here


def test_fingerprints_of_generator_and_hub_name_what_determines_the_rows():
    embedded = replace(HH_ROWS, source="embedded")
    noisier = replace(embedded, embedded=TINY | {"temperature": 2.0})
    assert embedded.title == "hh-embedded" and embedded.load().title == "hh-embedded"
    assert embedded.fingerprint() != noisier.fingerprint()
    assert replace(HH_ROWS, source="hub").fingerprint() == f"Anthropic/hh-rlhf@{COMMIT}"


def test_a_prompt_gets_shorter_by_its_oldest_exchange_until_one_turn_is_left():
    prompt = chat("a", "b\n\nc", "d", "e", "f") + "\n\nAssistant:"
    cuts = []
    while prompt is not None:
        cuts.append(prompt)
        prompt = HH_ROWS.shorter(prompt)
    assert cuts[1:] == [chat("d", "e", "f") + "\n\nAssistant:", chat("f") + "\n\nAssistant:"]


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


def test_harmless_base_has_12_faulty_rows(shared_data):
    corpus = load(shared_data / "hh-rlhf", subsets=("harmless-base",))
    name = "harmless-base/train.jsonl.gz"
    assert corpus.drops == {
        "prompts differ": tuple(f"{name}:{n}" for n in (882, 1166, 1347, 1349, 1408)),
        "empty answer": tuple(f"{name}:{n}" for n in (68, 370, 661, 784)),
        "broken role order": ("harmless-base/test.jsonl.gz:199", f"{name}:550", f"{name}:922"),
    }
    assert (len(corpus.train.pairs), len(corpus.heldout.pairs)) == (1603 - 11, 250 - 1)


def test_real_splits_share_no_first_turn(shared_data):
    corpus = load(shared_data / "hh-rlhf", subsets=("helpful-base", "harmless-base"))
    train, heldout = turns_of(corpus)
    assert len(train) > 3000 and len(heldout) > 400 and train.isdisjoint(heldout)
    assert len(set(corpus.heldout.prompts)) == len(corpus.heldout.prompts)


def test_real_rows_under_error_stop_at_the_first_faulty_one(shared_data):
    with pytest.raises(BadRow) as error:
        load(shared_data / "hh-rlhf", on_bad_row="error")
    assert str(error.value) == (
        f"helpful-base/train.jsonl.gz:81: the answer in column rejected is empty{HOW_TO_GO_ON}"
    )


def test_real_transcripts_are_put_together_again_byte_for_byte(shared_data):
    pairs = iter(load(shared_data / "hh-rlhf").heldout.pairs)
    with gzip.open(shared_data / "hh-rlhf/helpful-base/test.jsonl.gz", "rt") as lines:
        for line, pair in zip(lines, pairs, strict=True):
            found = json.loads(line)
            assert pair.prompt + pair.chosen == found["chosen"]
            assert pair.prompt + pair.rejected == found["rejected"]
            assert last_answer(found["chosen"]) == (pair.prompt, pair.chosen)


def test_real_prompts_get_shorter_turn_by_turn_and_stay_prompts(shared_data):
    corpus = load(shared_data / "hh-rlhf", subsets=("helpful-base", "harmless-base"))
    for prompt in corpus.train.prompts:
        exchanges = prompt.count("\n\nHuman:")
        last = first = prompt
        while (cut := HH_ROWS.shorter(last)) is not None:
            assert cut.startswith("\n\nHuman:") and cut.endswith("\n\nAssistant:")
            assert first.endswith(cut) and cut.count("\n\nHuman:") == exchanges - 1
            last, exchanges = cut, exchanges - 1
        assert exchanges == 1
