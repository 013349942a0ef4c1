"""`rlhf data inspect`: every number on rows that can be counted by hand, and what is never shown."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.corpus import Corpus, Demo, Drops, Pair, Split
from rlhf_cli.data.custom_rows import Example
from rlhf_cli.data.custom_split import split_of
from rlhf_cli.data.odd import common_ending, odd_rows
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.evals.lengths import Lengths, ends
from rlhf_cli.figures import lengths as figure
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.tools import data_inspect
from tests.conftest import Rlhf
from tests.data_samples import HH_ROWS, TLDR_ROWS, chat, compared, post, talk, write_rows

BYTES = train_tokenizer([], vocab=258, context=640)
"""A token per byte, so that lengths can be counted on the page."""


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's tokenizer reads bytes."""
    monkeypatch.setattr(data_inspect, "tokenizer_of", lambda model, texts: BYTES)


def row(n: int, chosen: str, rejected: str, end: str = " A:") -> dict[str, Any]:
    return {"prompt": f"Q{n:02}?{end}", "chosen": chosen, "rejected": rejected}


ROWS = [
    *(row(n, " yes", " no") for n in range(16)),
    row(16, " a\n\n\nb", " no"),
    row(17, " yes", " no" + "o" * 9),
    row(18, " yes", " n\x07"),
    row(19, " ja.", " nej", end=""),
]
"""In train.jsonl, lines 1 to 20."""


# --- numbers


def test_lengths_are_told_by_the_texts_that_have_them() -> None:
    lengths = Lengths("chosen", (1, 2, 2, 3, 4, 4, 5, 9, 16, 17), limit=16, total=10)
    assert (lengths.mean, lengths.over) == (6.3, 0.1)
    assert [lengths.quantile(share) for share in (0.05, 0.5, 0.51, 0.9, 1.0)] == [1, 4, 4, 16, 17]
    assert lengths.shares([2, 4, 16]) == [0.3, 0.3, 0.3, 0.1]


def test_bins_reach_to_the_limit_and_are_never_empty_of_numbers() -> None:
    assert ends(48) == [6, 12, 18, 24, 30, 36, 42, 48]
    assert ends(53) == [7, 14, 20, 27, 34, 40, 47, 53]
    assert ends(3) == [1, 2, 3] and ends(1) == [1]


def corpus_of(*pairs: Pair, demos: tuple[Demo, ...] = ()) -> Corpus:
    prompts = tuple(dict.fromkeys(each.prompt for each in (*pairs, *demos)))
    held = Split((Demo("h", "x"),), (), ("h",))
    return Corpus("x", Split(demos, pairs, prompts), held, {}, gold=None)


def measured(corpus: Corpus, tokenizer: Any = BYTES, prompt: int = 9, response: int = 9) -> Any:
    encoder = Encoder(tokenizer, prompt, response, shorter=lambda text: None)
    return data_inspect.measure(corpus, encoder, "x")


def test_an_answer_counts_its_end_token_and_a_prompt_has_none() -> None:
    found = measured(corpus_of(Pair("1234", "12", "é"), demos=(Demo("123456789 ", "12345678"),)))
    chosen, rejected, demos = found.answers
    assert (chosen.tokens, rejected.tokens) == ((3,), (3,))
    # Nine tokens fit: eight bytes and the end. A prompt of ten loses its first.
    assert (sorted(demos.tokens), demos.over) == ([2, 9], 0.0)
    assert (sorted(found.prompts.tokens), found.prompts.over) == ([1, 4, 10], 1 / 3)


def test_longer_and_equal_answers_are_counted_among_the_pairs() -> None:
    pairs = [Pair(f"p{n}", "aa", "a") for n in range(3)]
    pairs += [Pair("q", "a", "aa"), Pair("r", "a", "b")]
    found = measured(corpus_of(*pairs, demos=(Demo("p", "a"),)))
    assert (found.pairs, found.longer, found.equal) == (5, 3, 1)


def test_a_boundary_that_a_merge_would_cross_is_seen() -> None:
    merging = train_tokenizer(["1234"] * 9, vocab=261, context=640)  # 12, 34 or 23, then 1234
    pairs = [Pair("12", "34", "99"), Pair("x", "34", "y")]
    found = measured(corpus_of(*pairs, demos=(Demo("12", "34"),)), merging)
    assert (found.joined, found.moved) == (2 + 4, 2)
    assert measured(corpus_of(*pairs, demos=(Demo("12", "34"),))).moved == 0


def test_of_many_rows_some_are_encoded_evenly_spread_and_that_is_said(
    rlhf: Rlhf, by_bytes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_inspect, "SAMPLE", 4)
    demos = tuple(Demo(f"{n}", "a" * n) for n in range(1, 9))
    (told,) = measured(corpus_of(demos=demos)).answers
    assert (told.tokens, told.total) == ((2, 4, 6, 8), 9)  # the ninth is the held-out one
    write_rows(Path("d/train.jsonl"), ROWS)
    write_rows(Path("d/test.jsonl"), [{"prompt": "held", "response": "x"}])
    _, lines, _ = rlhf("data", "inspect", "d")
    said = "sample            4 of 21 prompts, 4 of 20 chosen, 4 of 20 rejected, 4 of 21"
    assert said in lines and lines[lines.index(said) + 1].strip() == "demonstrations"


# --- odd rows


def test_what_is_odd_is_named_by_its_place() -> None:
    pairs = [Pair(f"p{n}:", " ok", " ko", where=f"d/x.jsonl:{n}") for n in range(20)]
    pairs += [
        Pair("20", " ok", " ko", where="d/x.jsonl:20"),
        Pair("p21:", " o\tk\n\nk", " " + "k" * 9),
        Pair("p22:", " o\u200bk", " ko\n \n\nko"),
        Pair("p23:", " ok", " " + "ko" * 16),
        Pair("p" * 10 + ":", " ok", " ko", where="d/x.jsonl:24"),
    ]
    assert odd_rows(corpus_of(*pairs)) == {
        "answer of over 10 times the median": ("training pair 24",),
        "characters that do not print": ("training pair 23",),
        "three line breaks in a row": ("training pair 23",),
        "a character 10 times in a row": ("d/x.jsonl:24",),
        "prompt that ends otherwise": ("d/x.jsonl:20", "held-out demonstration 1"),
    }


def test_prompts_without_rows_are_looked_at_too() -> None:
    split = Split((Demo("a:", "b"),), (), ("a:", *(f"{n}:" for n in range(9)), "oh\r"))
    corpus = Corpus("x", split, Split((), (), ()), {}, gold=None)
    assert odd_rows(corpus) == {
        "characters that do not print": ("training prompt 11",),
        "prompt that ends otherwise": ("training prompt 11",),
    }


@pytest.mark.parametrize(
    ("texts", "ending"),
    [
        ([], ""),
        (["same"], "same"),
        ([f"{n}\n\nA:" for n in range(10)], "\n\nA:"),
        ([*(f"{n} A:" for n in range(9)), "9"], " A:"),
        ([*(f"{n} A:" for n in range(8)), "8", "9"], ""),
        (["x" * 40] * 3, "x" * 32),
    ],
)
def test_the_common_ending_is_that_of_nine_texts_in_ten(texts: list[str], ending: str) -> None:
    assert common_ending(texts) == ending


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    write_rows(tmp_path / "helpful-base/train.jsonl", [talk("a"), talk("b")])
    write_rows(tmp_path / "helpful-base/test.jsonl", [talk("c")])
    hh = replace(HH_ROWS, path=str(tmp_path)).load()
    assert [each.where for each in (hh.train.demos[1], hh.train.pairs[1], hh.heldout.pairs[0])] == [
        *["helpful-base/train.jsonl:2"] * 2,
        "helpful-base/test.jsonl:1",
    ]
    for file, rows in (("sft/train", [post(98)]), ("sft/valid", [post(99)])):
        write_rows(tmp_path / f"{file}.jsonl", rows)
    write_rows(tmp_path / "comparisons_ai/train.csv", [compared(n) for n in range(20)])
    tldr = replace(TLDR_ROWS, path=str(tmp_path)).load()
    assert tldr.train.demos[0].where == "sft/train.jsonl:1"
    assert tldr.train.pairs[0].where.startswith("comparisons_ai/train.csv:")


def test_a_pair_of_two_rows_names_both() -> None:
    labelled = [Example(f"f:{n}", "labelled", "p", "p", (f"{n}",), n, frozenset()) for n in (0, 1)]
    (pair,) = split_of(labelled, Drops("error")).pairs
    assert (pair.chosen, pair.rejected, pair.where) == ("1", "0", "f:1 and f:0")


def test_where_a_row_stands_is_no_part_of_it() -> None:
    assert Pair("p", "a", "b", where="x:1") == Pair("p", "a", "b")
    assert (
        corpus_of(Pair("p", "a", "b", where="x:1")).digest == corpus_of(Pair("p", "a", "b")).digest
    )


# --- the page


def test_the_whole_page_by_hand(rlhf: Rlhf, by_bytes: None) -> None:
    write_rows(Path("d/train.jsonl"), ROWS)
    write_rows(Path("d/test.jsonl"), [row(n, " yes", " no") for n in range(90, 92)])
    words = ["data.max_prompt_tokens=8", "data.max_response_tokens=6", "eval.prompts=1"]
    code, lines, err = rlhf("data", "inspect", "d", *words)
    assert (code, err) == (0, "")
    evaluated = hashlib.sha256(json.dumps(["Q90? A:"]).encode()).hexdigest()
    read = [Pair(*each.values()) for each in ROWS]
    told = tuple(Demo(pair.prompt, pair.chosen) for pair in read)
    held = tuple(Pair(f"Q{n}? A:", " yes", " no") for n in (90, 91))
    split = Split(tuple(Demo(p.prompt, p.chosen) for p in held), held, ("Q90? A:", "Q91? A:"))
    prompts = tuple(pair.prompt for pair in read)
    digest = Corpus("x", Split(told, tuple(read), prompts), split, {}, gold=None).digest
    assert lines == [
        "custom            training  held-out",
        "rows: preference        20         2",
        "demonstrations          20         2",
        "pairs                   20         2",
        "prompts                 20         2",
        "",
        "tokens          texts  mean  5 %  50 %  95 %  99 %  max  limit   over",
        "prompts            22   6.9    7     7     7     7    7      8  0.0 %",
        "chosen             22   5.1    5     5     5     7    7      6  4.5 %",
        "rejected           22   4.5    4     4     5    13   13      6  4.5 %",
        "demonstrations     22   5.1    5     5     5     7    7      6  4.5 %",
        "",
        "tokens  prompts",
        "1                        0 %",
        "2                        0 %",
        "3                        0 %",
        "4       ▋                5 %",
        "5                        0 %",
        "6                        0 %",
        "7       ██████████████  95 %",
        "8                        0 %",
        "over 8                   0 %",
        "",
        "tokens  chosen                rejected              demonstrations",
        "1                        0 %                   0 %                   0 %",
        "2                        0 %                   0 %                   0 %",
        "3                        0 %                   0 %                   0 %",
        "4                        0 %  █████████████▎  91 %                   0 %",
        "5       ██████████████  95 %  ▋                5 %  ██████████████  95 %",
        "6                        0 %                   0 %                   0 %",
        "over 6  ▋                5 %  ▋                5 %  ▋                5 %",
        "",
        "tokens            of nano; over the limit a prompt loses its beginning, an",
        "                  answer its end",
        "chosen is longer  in 95.2 % of 21 pairs (95 % interval 77.3 % to 99.2 %); in 1",
        "                  both are as long",
        "boundary          0.0 % of 66 answers would be other tokens if encoded in one",
        "                  piece with their prompt",
        "same prompt       0 of 22 pairs are on the prompt of an earlier one",
        "both ways         0 of 22 pairs are judged the other way in another row",
        "prompts end in    '? A:'",
        f"digest            {digest[:16]} of all rows",
        f"evaluations       {evaluated[:16]} of their 1 prompts",
        "",
        "odd                            rows  where",
        "characters that do not print      1  d/train.jsonl:19",
        "three line breaks in a row        1  d/train.jsonl:17",
        "a character 10 times in a row     1  d/train.jsonl:18",
        "prompt that ends otherwise        1  d/train.jsonl:20",
        "",
        "examples, as a run reads them",
        "prompt    'Q00? A:'",
        "chosen    ' yes'",
        "rejected  ' no'",
        "",
        "prompt    'Q06? A:'",
        "chosen    ' yes'",
        "rejected  ' no'",
        "",
        "prompt    'Q13? A:'",
        "chosen    ' yes'",
        "rejected  ' no'",
        f"next: rlhf train data=custom {' '.join(words)} data.path=d",
    ]


def test_pairs_that_share_a_prompt_or_contradict_each_other_are_counted(
    rlhf: Rlhf, by_bytes: None
) -> None:
    rows = [*ROWS, row(0, " no", " yes"), row(1, " oh", " no"), row(2, " yes", " no")]
    write_rows(Path("d/train.jsonl"), rows)
    write_rows(Path("d/test.jsonl"), [row(90, " yes", " no")])
    _, lines, _ = rlhf("data", "inspect", "d")
    assert "repeated: 1 of 23 training pairs" in lines
    assert "same prompt       3 of 24 pairs are on the prompt of an earlier one" in lines
    assert "both ways         2 of 24 pairs are judged the other way in another row" in lines


def test_the_page_fits_80_columns_in_plain_characters_and_ends_with_what_to_run(
    rlhf: Rlhf, by_bytes: None
) -> None:
    words = ["data=hh", *(f"data.embedded.{size}=40" for size in ("prompts", "demos", "pairs"))]
    code, lines, err = rlhf("data", "inspect", *words, "data.embedded.heldout=10")
    assert (code, err) == (0, "")
    assert max(map(len, lines[:-1])) <= 80 and all(line.isprintable() for line in lines)
    assert lines[-1] == f"next: rlhf train {shlex.join(words)} data.embedded.heldout=10"
    assert sum(line.startswith("prompt    ") for line in lines) == data_inspect.EXAMPLES
    assert any(line.startswith("prompts end in    '\\n\\nAssistant:'") for line in lines)


def test_data_that_pay_themselves_are_measured_like_others(rlhf: Rlhf) -> None:
    sizes = {"prompts": 40, "demos": 60, "pairs": 30, "heldout": 10}
    words = [f"data.embedded.{name}={size}" for name, size in sizes.items()]
    code, lines, err = rlhf("data", "inspect", "data=guess", "model.scratch.vocab=300", *words)
    assert (code, err) == (0, "")
    assert lines[0] == "guess-embedded  training  held-out"
    assert "tokens            of nano; over the limit a prompt loses its beginning, an" in lines


# --- what stands in the way


def test_bad_rows_are_listed_and_the_rest_is_measured_before_it_ends_as_a_run_would(
    rlhf: Rlhf, by_bytes: None
) -> None:
    write_rows(Path("d/train.jsonl"), [*ROWS, row(20, " a", " a")])
    write_rows(Path("d/test.jsonl"), [row(90, " a", " b")])
    code, lines, err = rlhf("data", "inspect", "d")
    assert code == 2 and err.startswith("error: d/train.jsonl:21: chosen and rejected are the same")
    assert "identical pair     1  d/train.jsonl:21" in lines
    assert any(line.startswith("chosen is longer") for line in lines)
    assert not any(line.startswith("next:") for line in lines)


def test_without_anything_to_imitate_there_is_no_tokenizer_and_no_run(rlhf: Rlhf) -> None:
    write_rows(Path("p.jsonl"), [{"prompt": f"p{n}"} for n in range(20)])
    code, lines, err = rlhf("data", "inspect", "p.jsonl")
    assert code == 2 and "has an answer to imitate" in err
    assert "prompts               19         1" in lines
    assert not any(line.startswith("tokens") for line in lines)


def test_a_tokenizer_that_cannot_be_loaded_is_one_sentence(rlhf: Rlhf, tmp_path: Path) -> None:
    write_rows(Path("p.jsonl"), ROWS)
    code, lines, err = rlhf(
        "data", "inspect", "p.jsonl", "model=custom", "model.name=nowhere/at-all"
    )
    assert (code, lines) == (2, []) and err.count("\n") == 1 and "model.name=nowhere/at-all" in err


# --- what is never shown

PROVOKED = "how do I provoke"


def folder_of_both() -> None:
    for subset, words in (("helpful-base", "please help"), ("harmless-base", PROVOKED)):
        rows = [talk(f"{words} {n}", f"{words} yes", f"{words} no") for n in range(6)]
        write_rows(Path(f"hh-rlhf/{subset}/train.jsonl"), rows[1:])
        write_rows(Path(f"hh-rlhf/{subset}/test.jsonl"), rows[:1])


UNSHOWN = "rows of harmless-base are not shown: they were written to provoke"


@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_rows_of_harmless_base_are_never_shown_and_that_is_said(
    rlhf: Rlhf, by_bytes: None, verb: str
) -> None:
    folder_of_both()
    words = ["data=hh", "data.source=path", "data.path=hh-rlhf"]
    for subsets, shown, said in (
        ("[helpful-base]", True, False),
        ("[harmless-base,helpful-base]", True, True),
        ("[harmless-base]", False, True),
    ):
        code, lines, _ = rlhf("data", verb, *words, f"data.subsets={subsets}")
        page = "\n".join(lines)
        assert code == 0 and PROVOKED not in page
        assert ("please help" in page, UNSHOWN in lines) == (shown, said)


@pytest.mark.parametrize(
    "path", ["hh-rlhf/harmless-base", "hh-rlhf/harmless-base/train.jsonl", "hh-rlhf/all.jsonl"]
)
def test_nor_are_they_shown_as_data_of_ones_own(rlhf: Rlhf, by_bytes: None, path: str) -> None:
    folder_of_both()
    prompt = chat(PROVOKED) + "\n\nAssistant:"
    asked = [{"prompt": f"{prompt}{n}", "chosen": "a", "rejected": "b"} for n in range(6)]
    for file in ("hh-rlhf/all.jsonl", "hh-rlhf/harmless-base/train.jsonl"):
        write_rows(Path(file), asked)
    write_rows(Path("hh-rlhf/harmless-base/test.jsonl"), asked[:1])
    for verb in ("inspect", "check"):
        code, lines, _ = rlhf("data", verb, path)
        assert code == 0 and UNSHOWN in lines and PROVOKED not in "\n".join(lines)


def test_real_rows_are_measured_and_the_harmless_ones_kept_back(
    rlhf: Rlhf, by_bytes: None, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_inspect, "SAMPLE", 200)
    monkeypatch.setattr(data_inspect, "JOINED", 50)
    words = ["data=hh", "data.source=path", f"data.path={shared_data}/hh-rlhf"]
    code, lines, err = rlhf("data", "inspect", *words, "data.subsets=[harmless-base]")
    assert (code, err) == (0, "") and UNSHOWN in lines
    assert "examples, as a run reads them" not in lines
    words = ["data=tldr", "data.source=path", f"data.path={shared_data}/tldr"]
    code, lines, err = rlhf("data", "inspect", *words)
    assert (code, err) == (0, "")
    assert "prompts end in    '\\n\\nTL;DR:'" in lines
    assert max(map(len, lines[:-1])) <= 80


# --- the picture


def test_the_picture_goes_to_a_file_or_into_a_folder(rlhf: Rlhf, by_bytes: None) -> None:
    write_rows(Path("p.jsonl"), ROWS)
    _, lines, _ = rlhf("data", "inspect", "p.jsonl", "--png", "here/a.png")
    assert lines[-2:] == ["figure: here/a.png", "next: rlhf train data=custom data.path=p.jsonl"]
    _, lines, _ = rlhf("data", "inspect", "p.jsonl", "data.name=mine", "--png=figures")
    assert lines[-2] == "figure: figures/lengths-mine.png"
    for file in ("here/a.png", "figures/lengths-mine.png"):
        assert Path(file).read_bytes().startswith(b"\x89PNG")
    code, _, err = rlhf("data", "inspect", "p.jsonl", "-m", "seed=1,2", "--png", "a.png")
    assert (code, err) == (
        2,
        "error: --png=a.png is one file for 2 pictures; give a folder.\n",
    )


def test_the_picture_shows_each_kind_as_shares_and_the_limit(tmp_path: Path) -> None:
    prompts = Lengths("prompts", (10, 20, 30, 4000), limit=40, total=4)
    answers = [
        Lengths("chosen", (5, 5, 50), limit=20, total=3),
        Lengths("demonstrations", (1, 2), limit=20, total=2),
    ]
    left, right = figure.draw("x", "y", [[prompts], answers]).axes
    assert [line.get_xdata()[0] for line in (left.lines[-1], right.lines[-1])] == [40, 20]
    tallest = [max(box.get_xy()[:, 1]) for box in right.patches]
    assert tallest == pytest.approx([200 / 3, 100])  # bins of two tokens: 5 and 6, 1 and 2
    legend = left.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "prompts: 25.0 % over 40",
        "chosen: 33.3 % over 20",
        "demonstrations: 0.0 % over 20",
    ]
    (short,) = figure.draw("x", "y", [[Lengths("prompts", (1, 2), limit=100, total=2)]]).axes
    assert short.get_xlim()[1] > 100
    files = [figure.write("x", "y", [[prompts], answers], tmp_path / name) for name in "ab"]
    assert files[0] == tmp_path / "a" / "lengths-x.png"
    assert files[0].read_bytes() == files[1].read_bytes()


def test_help_shows_what_to_type(rlhf: Rlhf) -> None:
    code, lines, _ = rlhf("data", "inspect", "--help")
    assert code == 0
    assert (
        "    rlhf data inspect data=tldr --png figures        and a picture of the lengths" in lines
    )
