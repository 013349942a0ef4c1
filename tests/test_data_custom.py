"""Data of a user's own: every shape from every kind of file, and what is refused in which words."""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_cli.config import compose, recipe
from rlhf_cli.data import rows, transcript
from rlhf_cli.data.chat import transcript as write_transcript
from rlhf_cli.data.corpus import BadRow, Demo, Drops, Pair
from rlhf_cli.data.custom import Custom, Splits
from rlhf_cli.data.custom_rows import Columns, Parser
from rlhf_cli.errors import UserError
from rlhf_cli.plan import plan

NAMES = Columns(
    prompt="prompt",
    chosen="chosen",
    rejected="rejected",
    response="response",
    messages="messages",
    label="label",
    score="score",
    id="id",
)
CUSTOM = Custom(
    name="mine",
    source="path",
    path=None,
    hub=None,
    revision=None,
    splits=Splits(train="train", heldout=("heldout", "test", "valid", "validation")),
    heldout=0.05,
    columns=NAMES,
    template="transcript",
    tokenizer=None,
    tokenizer_revision=None,
    on_bad_row="error",
    max_prompt_tokens=512,
    max_response_tokens=128,
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAIL = "; mend or delete the row, or leave such rows out with data.on_bad_row=drop."
COMMIT = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"

Rows = list[dict[str, Any]]


def write(file: Path, found: Rows) -> Path:
    """Rows in the format of the suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            table = csv.DictWriter(opened, list(found[0]))
            table.writeheader()
            table.writerows(found)
    elif file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def mine(path: Path, **changes: Any) -> Custom:
    return replace(CUSTOM, path=str(path), **changes)


def folder(place: Path, train: Rows, test: Rows, suffix: str = "jsonl") -> Path:
    """A folder with both splits."""
    write(place / f"train.{suffix}", train)
    write(place / f"test.{suffix}", test)
    return place


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


HELD = {"prompt": "h", "response": " x"}
"""A held-out row on a turn of its own."""
PAIR = {"prompt": "h", "chosen": " x", "rejected": " y"}


# --- shapes


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "demos", "pairs"),
    [
        (
            [{"prompt": "p", "chosen": " a", "rejected": " b"}],
            [Demo("p", " a")],
            [Pair("p", " a", " b")],
        ),
        ([{"prompt": "p", "response": " a\n"}], [Demo("p", " a\n")], []),
        (
            [
                {"prompt": "p", "response": answer, "label": label}
                for answer, label in ((" a", True), (" b", False), (" c", True), (" d", False))
            ],
            [Demo("p", " a"), Demo("p", " c")],
            [
                Pair("p", " a", " b"),
                Pair("p", " a", " d"),
                Pair("p", " c", " b"),
                Pair("p", " c", " d"),
            ],
        ),
        (
            [
                {"prompt": "p", "response": answer, "score": score}
                for answer, score in ((" a", 1.5), (" b", -2.0), (" c", 3.0), (" d", 3.0))
            ],
            [Demo("p", " c")],
            [Pair("p", " c", " b")],
        ),
    ],
    ids=["preference", "demonstration", "labelled", "scored"],
)
def test_plain_rows_of_every_shape_come_out_of_every_kind_of_file(
    tmp_path: Path, suffix: str, rows: Rows, demos: list[Demo], pairs: list[Pair]
) -> None:
    place = folder(tmp_path / "d", rows, [HELD], suffix)
    corpus = mine(place).load()
    assert corpus.title == "mine" and corpus.drops == {} and corpus.gold is None
    assert corpus.train.demos == tuple(demos)
    assert corpus.train.pairs == tuple(pairs)
    assert corpus.train.prompts == ("p",)
    assert corpus.heldout.demos == (Demo("h", " x"),) and corpus.heldout.prompts == ("h",)


def test_rows_of_several_shapes_may_stand_in_one_file_and_own_demonstrations_go_first(
    tmp_path: Path,
) -> None:
    mixed: Rows = [
        {"prompt": "a", "chosen": " 1", "rejected": " 2"},
        {"prompt": "b"},
        {"prompt": "c", "response": " 3"},
        {"prompt": "a"},
    ]
    found = mine(folder(tmp_path, mixed, [PAIR])).survey()
    assert found.corpus.train.pairs == (Pair("a", " 1", " 2"),)
    assert found.corpus.train.demos == (Demo("c", " 3"),)
    assert sorted(found.corpus.train.prompts) == ["a", "b", "c"]
    assert found.shapes["training"] == {"preference": 1, "prompt": 2, "demonstration": 1}
    assert found.corpus.heldout.demos == (Demo("h", " x"),)


def test_columns_go_by_the_names_that_the_file_gives_them(tmp_path: Path) -> None:
    rows = [{"question": "p", "better": " a", "worse": " b", "prompt": 3, "note": "n"}]
    held = [{"question": "h", "better": " a", "worse": " b"}]
    names = replace(NAMES, prompt="question", chosen="better", rejected="worse")
    found = mine(folder(tmp_path, rows, held), columns=names).survey()
    assert found.corpus.train.pairs == (Pair("p", " a", " b"),)
    assert found.unread == {"prompt", "note"}


@pytest.mark.parametrize("label", [1, 0, "TRUE", " false ", 1.0])
def test_a_label_may_be_spelt_in_several_ways(tmp_path: Path, label: object) -> None:
    rows = [{"prompt": "p", "response": " a", "label": label}]
    corpus = (
        mine(folder(tmp_path, [*rows, {"prompt": "q", "response": " z"}], [HELD])).survey().corpus
    )
    missing = "bad" if label in (1, "TRUE") else "good"
    assert list(corpus.drops) == [f"no {missing} answer to compare with"]


def test_answers_that_compare_with_nothing_make_no_pair_and_are_counted(tmp_path: Path) -> None:
    rows: Rows = [
        {"prompt": "a", "response": " 1", "label": True},
        {"prompt": "a", "response": " 2", "label": True},
        {"prompt": "b", "response": " 1", "label": False},
        {"prompt": "c", "response": " 1", "score": 2},
        {"prompt": "d", "response": " 1", "score": 2},
        {"prompt": "d", "response": " 2", "score": 2.0},
    ]
    corpus = mine(folder(tmp_path / "d", rows, [HELD])).load()
    assert corpus.train.pairs == ()
    # What is labelled good is good without a comparison; a lone score says nothing.
    assert corpus.train.demos == (Demo("a", " 1"), Demo("a", " 2"))
    assert corpus.drops == {
        "no bad answer to compare with": ("d/train.jsonl:1", "d/train.jsonl:2"),
        "no good answer to compare with": ("d/train.jsonl:3",),
        "no other answer to compare with": ("d/train.jsonl:4",),
        "all scores are the same": ("d/train.jsonl:5", "d/train.jsonl:6"),
    }


@pytest.mark.parametrize("key", ["label", "score"])
def test_one_answer_cannot_be_better_than_itself(tmp_path: Path, key: str) -> None:
    rows = [{"prompt": "p", "response": " a", key: value} for value in (1, 0)]
    place = folder(tmp_path / "d", [*rows, {"prompt": "q", "response": " z"}], [HELD])
    said = (
        "d/train.jsonl:2: the same answer to the same prompt is judged otherwise in d/train.jsonl:1"
    )
    with pytest.raises(BadRow) as error:
        mine(place).load()
    assert str(error.value) == said + TAIL
    assert mine(place, on_bad_row="drop").load().drops == {"identical pair": ("d/train.jsonl:2",)}


# --- conversations


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer with a chat template; its end token closes a message."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHATML
    place = tmp_path_factory.mktemp("tokenizers") / "chatty"
    tokenizer.save_pretrained(place)
    return place


def retold(chatty: Path, place: Path, template: str | None) -> Path:
    """The same tokenizer with another template, or with none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(place)
    return place


TALK = [system("Be brief."), user("hi"), assistant("hello"), user("1+1? ")]
ASKED = (
    "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TALKS: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": TALK, "chosen": [assistant("2")], "rejected": [assistant("3")]}, ["2", "3"]),
    (
        {"chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")], "prompt": TALK},
        ["2", "3"],
    ),
    ({"chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")]}, ["2", "3"]),
    ({"prompt": TALK, "chosen": "2", "rejected": "3"}, ["2", "3"]),
    ({"messages": [*TALK, assistant(" 2 ")]}, ["2"]),
    ({"prompt": TALK, "response": [assistant("2")]}, ["2"]),
    ({"prompt": TALK, "response": "2"}, ["2"]),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "answers"), TALKS)
def test_a_conversation_of_any_shape_is_what_the_chat_template_makes_of_it(
    tmp_path: Path, chatty: Path, suffix: str, row: dict[str, Any], answers: list[str]
) -> None:
    place = folder(tmp_path / "d", [row], [HELD], suffix)
    split = mine(place, template="model", tokenizer=str(chatty)).load().train
    assert split.prompts == (ASKED,)
    assert split.demos == (Demo(ASKED, answers[0]),)
    assert split.pairs == ((Pair(ASKED, *answers),) if len(answers) == 2 else ())


def test_prompt_answer_and_end_token_are_the_whole_rendering(tmp_path: Path, chatty: Path) -> None:
    from transformers import AutoTokenizer

    talk = [*TALK, assistant("The sum\nis 2.")]
    place = folder(tmp_path / "d", [{"messages": talk}], [HELD])
    demo = mine(place, template="model", tokenizer=str(chatty)).load().train.demos[0]
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert demo.prompt + demo.response + tokenizer.eos_token + "\n" == whole


def test_what_a_template_adds_to_an_answer_stays_unless_it_is_the_end_token(
    tmp_path: Path, chatty: Path
) -> None:
    template = CHATML.replace("<|im_end|>", "<|turn|>")
    other = retold(chatty, tmp_path / "other", template)
    place = folder(tmp_path / "d", [{"messages": [user("hi"), assistant("2")]}], [HELD])
    demo = mine(place, template="model", tokenizer=str(other)).load().train.demos[0]
    assert demo.response == "2<|turn|>\n"


def test_a_transcript_is_in_the_layout_of_hh(tmp_path: Path) -> None:
    place = folder(tmp_path / "d", [{"messages": [*TALK, assistant("2")]}], [HELD])
    demo = mine(place).load().train.demos[0]
    prompt = "Be brief.\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 1+1? \n\nAssistant:"
    assert demo == Demo(prompt, " 2")


def test_a_plain_prompt_beside_a_conversation_is_its_only_message(tmp_path: Path) -> None:
    """As in HuggingFaceH4/ultrafeedback_binarized."""
    row = {
        "prompt": "hi",
        "prompt_id": "7",
        "chosen": [user("hi"), assistant("a")],
        "rejected": [user("hi"), assistant("b")],
        "messages": [user("hi"), assistant("a")],
        "score_chosen": 8.0,
    }
    found = mine(folder(tmp_path / "d", [row], [HELD])).survey()
    assert found.corpus.train.pairs == (Pair("\n\nHuman: hi\n\nAssistant:", " a", " b"),)
    assert found.unread == {"prompt_id", "messages", "score_chosen"}


def test_a_template_writes_the_same_date_every_day(tmp_path: Path, chatty: Path) -> None:
    dated = retold(chatty, tmp_path / "dated", "{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    place = folder(tmp_path / "d", [{"messages": [user("hi"), assistant("2")]}], [HELD])
    demo = mine(place, template="model", tokenizer=str(dated)).load().train.demos[0]
    assert demo.prompt.startswith("2025-01-01\n<s><|im_start|>user")


def test_plain_rows_ask_for_no_tokenizer(tmp_path: Path) -> None:
    place = folder(tmp_path / "d", [PAIR | {"prompt": "p"}], [PAIR])
    corpus = mine(place, template="model", tokenizer=str(tmp_path / "nowhere")).load()
    assert len(corpus.train.pairs) == 1


INSTEAD = "set data.template=transcript, or data.tokenizer to a model that has one."


def template_fault(tmp_path: Path, tokenizer: str | None) -> str:
    place = folder(tmp_path / "d", [{"messages": [user("hi"), assistant("2")]}], [HELD])
    with pytest.raises(UserError) as error:
        mine(place, template="model", tokenizer=tokenizer).load()
    return str(error.value)


def test_a_model_from_scratch_has_no_chat_template(tmp_path: Path) -> None:
    assert template_fault(tmp_path, None) == (
        "data.template=model writes a conversation with the chat template of a tokenizer, and a model"
        f" trained from scratch has none; {INSTEAD}"
    )


def test_a_tokenizer_without_a_template_cannot_write_a_conversation(
    tmp_path: Path, chatty: Path
) -> None:
    bare = retold(chatty, tmp_path / "bare", None)
    assert template_fault(tmp_path, str(bare)) == (
        f"data.template=model, but the tokenizer of {bare} has no chat template; {INSTEAD}"
    )


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = template_fault(tmp_path, str(tmp_path))
    assert said.startswith(f"data.tokenizer={tmp_path} cannot be loaded (")
    assert said.endswith(f"); {INSTEAD}") and "\n" not in said


def test_a_template_whose_prompt_changes_with_the_answer_is_refused(
    tmp_path: Path, chatty: Path
) -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    other = retold(chatty, tmp_path / "other", thinking)
    assert template_fault(tmp_path, str(other)) == (
        f"d/train.jsonl:1: the chat template of {other} writes a question otherwise once it is answered,"
        f" so that no answer can be told from its prompt; {INSTEAD}"
    )


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path: Path, chatty: Path) -> None:
    text = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
        + CHATML
    )
    stern = retold(chatty, tmp_path / "stern", text)
    rows: Rows = [{"messages": [user("hi"), assistant("2")]}, {"messages": [*TALK, assistant("2")]}]
    place = folder(tmp_path / "d", rows, [HELD])
    with pytest.raises(BadRow) as error:
        mine(place, template="model", tokenizer=str(stern)).load()
    said = f"d/train.jsonl:2: the chat template of {stern} refuses it (No system)"
    assert str(error.value) == said + TAIL


# --- splits


def opening(prompt: str) -> str:
    return transcript.first_turn(prompt) or prompt


def many(count: int, seed: int) -> Rows:
    """Rows of all shapes whose first turns recur, also across shapes."""
    rng = random.Random(seed)
    rows: Rows = []
    for number in range(count):
        first = f"q{rng.randrange(count // 3)}"
        prompt = rng.choice([first, f"\n\nHuman: {first}\n\nAssistant:", [user(first)]])
        if rng.random() < 0.3:
            prompt = [user(first), assistant("go on"), user(f"more {number}")]
        answers = {"chosen": f" a{number}", "rejected": f" b{number}"}
        shapes: Rows = [
            answers,
            {"response": f" c{number}"},
            {"response": f" d{number}", "label": rng.random() < 0.5},
            {"response": f" e{number}", "score": rng.random()},
            {},
        ]
        rows.append({"prompt": prompt, **rng.choice(shapes)})
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_splits_share_no_first_turn_whatever_the_shapes(tmp_path: Path, seed: int) -> None:
    file = write(tmp_path / "rows.jsonl", many(300, seed))
    held = write(tmp_path / "d/test.jsonl", many(60, seed + 100)).parent
    write(held / "train.jsonl", many(300, seed))
    for place in (file, held):
        corpus = mine(place).load()
        openings = []
        for split in (corpus.train, corpus.heldout):
            texts = {r.prompt for r in (*split.demos, *split.pairs)} | {*split.prompts}
            openings.append({opening(text) for text in texts})
        assert openings[0] and openings[1] and openings[0].isdisjoint(openings[1])
        assert ("first turn is held out" in corpus.drops) == (place == held)


def test_a_share_of_the_turns_is_held_out_and_more_rows_take_few_of_them_back(
    tmp_path: Path,
) -> None:
    def held(count: int) -> set[str]:
        rows = [{"prompt": f"p{n}", "response": " x"} for n in range(count)]
        corpus = mine(write(tmp_path / "rows.jsonl", rows * 2), heldout=0.1).load()
        assert len(corpus.train.demos) == 2 * (count - len(corpus.heldout.prompts))
        return {*corpus.heldout.prompts}

    before, after = held(1000), held(1100)
    assert (len(before), len(after)) == (100, 110)
    # Of 110 smallest among 1100 some 100 are old; that they are the old ones is what a hash is for.
    assert len(before & after) >= 90


def test_the_smallest_file_still_has_two_splits_and_one_turn_has_not(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": " x"} for p in ("p", "q")]
    corpus = mine(write(tmp_path / "rows.jsonl", rows), heldout=0.9).load()
    assert len(corpus.train.prompts) == len(corpus.heldout.prompts) == 1
    file = write(tmp_path / "rows.jsonl", rows[:1] * 9)
    with pytest.raises(UserError) as error:
        mine(file).load()
    assert str(error.value) == (
        f"data.path={file}: no row is left for the held-out split (0 left out); give rows on more than"
        " one first human turn, or mend those that `rlhf data check` lists."
    )


def test_a_rare_shape_is_held_out_too(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": f"p{n}"} for n in range(500)]
    rows += [{"prompt": f"d{n}", "response": " x"} for n in range(4)]
    corpus = mine(write(tmp_path / "rows.jsonl", rows)).load()
    assert (len(corpus.train.demos), len(corpus.heldout.demos)) == (3, 1)


def test_the_held_out_file_may_have_another_name_or_be_passed_over(tmp_path: Path) -> None:
    train = [{"prompt": f"p{n}", "response": " x"} for n in range(40)]
    place = folder(tmp_path / "d", train, [HELD])
    write(place / "mine.jsonl", [HELD | {"prompt": "m"}])
    assert mine(place).load().heldout.prompts == ("h",)
    named = mine(place, splits=Splits(train="train", heldout=("mine", "test")))
    assert named.load().heldout.prompts == ("m",)
    shared = mine(place, splits=Splits(train="train", heldout=())).load()
    assert len(shared.heldout.prompts) == 2 and "h" not in shared.heldout.prompts


def test_parquet_in_shards_is_one_split(tmp_path: Path) -> None:
    for shard in range(2):
        rows = [{"prompt": f"p{shard}{n}", "response": " x"} for n in range(3)]
        write(tmp_path / f"d/train-0000{shard}-of-00002.parquet", rows)
    assert len(mine(tmp_path / "d", heldout=0.2).load().train.prompts) == 5


# --- what is refused


BAD: list[tuple[dict[str, Any], str, str]] = [
    (
        {"prompt": "p", "chosen": " a", "rejected": " "},
        "empty answer",
        "the answer in column rejected is empty",
    ),
    ({"prompt": "p", "response": ""}, "empty answer", "the answer in column response is empty"),
    (
        {"messages": [user("p"), assistant("")]},
        "empty answer",
        "the answer in column messages is empty",
    ),
    (
        {"prompt": "p", "chosen": " a", "rejected": " a"},
        "identical pair",
        "chosen and rejected are the same",
    ),
    ({"prompt": " ", "response": " a"}, "empty prompt", "its prompt is empty"),
    ({"prompt": [user(" ")], "response": " a"}, "empty prompt", "its prompt is empty"),
    (
        {"prompt": "p", "chosen": " a"},
        "missing column",
        "it holds nothing in column rejected, only in prompt, chosen",
    ),
    (
        {"prompt": "p", "completion": " a"},
        "missing column",
        "it holds nothing in column response, only in prompt, completion"
        " (try data.columns.response=completion)",
    ),
    (
        {"question": "p", "answer": " a"},
        "missing column",
        "it holds nothing in column response, only in question, answer"
        " (try data.columns.prompt=question data.columns.response=answer)",
    ),
    (
        {"conversations": [user("p"), assistant("a")]},
        "missing column",
        "it holds nothing in column messages, only in conversations"
        " (try data.columns.messages=conversations)",
    ),
    ({"text": "p"}, "missing column", "it holds nothing in column prompt, only in text"),
    ({}, "missing column", "it holds nothing in column prompt, nor in any other"),
    (
        {"chosen": "a", "rejected": "b"},
        "missing column",
        "it holds nothing in column prompt, only in chosen, rejected",
    ),
    ({"prompt": "p", "response": 3}, "wrong type", "column response holds a number, not text"),
    ({"prompt": {"a": 1}}, "wrong type", "column prompt holds an object, not text"),
    ({"prompt": "p\0"}, "not text", "column prompt holds a NUL character"),
    ({"prompt": []}, "wrong type", "the list in column prompt is empty"),
    ({"messages": "p"}, "wrong type", "column messages holds text, not a list of messages"),
    (
        {"messages": ["p"]},
        "wrong type",
        "message 1 in column messages is no object with role and content",
    ),
    (
        {"messages": [user("p"), {"from": "gpt", "value": "a"}]},
        "wrong type",
        "message 2 in column messages is no object with role and content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, assistant("a")]},
        "wrong type",
        "the content of message 1 in column messages holds a list, not text",
    ),
    (
        {"messages": [user("p"), user("q"), assistant("a")]},
        "broken role order",
        "before the answer its roles are user, user, not user and assistant in turn from user to user"
        " (a system message may be first)",
    ),
    (
        {"messages": [user("p"), assistant("a"), system("s"), user("q"), assistant("b")]},
        "broken role order",
        "before the answer its roles are user, assistant, system, user, not user and assistant in turn"
        " from user to user (a system message may be first)",
    ),
    (
        {"messages": [assistant("a")]},
        "broken role order",
        "before the answer its roles are none, not user and assistant in turn from user to user"
        " (a system message may be first)",
    ),
    (
        {"messages": [user("p")]},
        "broken role order",
        "the last message in column messages is of user, not of assistant",
    ),
    (
        {"messages": [user("p\n\nAssistant: no"), assistant("a")]},
        "broken role order",
        "a message holds a paragraph that begins with Human: or Assistant:, which a transcript takes"
        " for a turn",
    ),
    (
        {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        "prompts differ",
        "column rejected does not go on from the prompt by a single message",
    ),
    (
        {"prompt": "q", "chosen": [user("p"), assistant("a")], "rejected": [assistant("b")]},
        "prompts differ",
        "column chosen does not go on from the prompt by a single message",
    ),
    (
        {"chosen": [user("p"), assistant("a")], "rejected": [user("p"), assistant("a")]},
        "identical pair",
        "chosen and rejected are the same",
    ),
    (
        {"prompt": "p", "response": " a", "label": "good"},
        "wrong type",
        "column label holds neither true nor false (1 nor 0)",
    ),
    *(
        (
            {"prompt": "p", "response": " a", "score": score},
            "not a number",
            "column score holds no finite number",
        )
        for score in (float("nan"), "inf", "high", True, [1], 10**400)
    ),
    (
        {"prompt": "p", "response": " a", "id": [1]},
        "wrong type",
        "column id holds neither text nor a number",
    ),
    (
        {"prompt": "p", "response": " a", "id": 7},
        "repeated id",
        "its id is that of d/train.jsonl:1 (data.columns.id=null reads none)",
    ),
]


@pytest.mark.parametrize(("row", "cause", "said"), BAD)
def test_a_bad_row_is_one_sentence_or_counted_by_its_cause(
    tmp_path: Path, row: dict[str, Any], cause: str, said: str
) -> None:
    good = {"prompt": "g", "response": " x", "id": 7}
    place = folder(tmp_path / "d", [good, row], [HELD | {"id": 7}])
    with pytest.raises(BadRow) as error:
        mine(place).load()
    assert str(error.value) == f"d/train.jsonl:2: {said}{TAIL}"
    corpus = mine(place, on_bad_row="drop").load()
    assert corpus.drops == {cause: ("d/train.jsonl:2",)}
    assert corpus.train.demos == (Demo("g", " x"),)


def test_ids_are_not_read_where_there_is_no_column_for_them(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": " x", "id": 7} for p in "pq"]
    corpus = mine(folder(tmp_path / "d", rows, [HELD]), columns=replace(NAMES, id=None)).load()
    assert len(corpus.train.demos) == 2


SFT = (
    "has an answer to imitate, with which every run begins (SFT); add rows with prompt and response, with"
    " messages, or with chosen and rejected."
)


def test_prompts_alone_make_no_run_in_either_split(tmp_path: Path) -> None:
    lacking: list[tuple[str, Rows, Rows]] = [
        ("training", [{"prompt": "p"}], [HELD]),
        ("held-out", [PAIR | {"prompt": "p"}], [{"prompt": "h"}]),
    ]
    for name, train, test in lacking:
        place = folder(tmp_path / name, train, test)
        with pytest.raises(UserError) as error:
            mine(place).load()
        assert str(error.value) == f"data.path={place}: no row of the {name} split {SFT}"


def test_demonstrations_alone_are_enough_to_load(tmp_path: Path) -> None:
    corpus = mine(folder(tmp_path / "d", [{"prompt": "p", "response": " x"}], [HELD])).load()
    assert corpus.train.pairs == corpus.heldout.pairs == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "data.path is not set; add data.path=FILE, or data.path=DIR."),
        (
            {"path": "nowhere.jsonl"},
            "data.path=nowhere.jsonl is neither a file nor a folder that can be read; give one.",
        ),
        (
            {"source": "hub"},
            "data.hub is not set, but data.source=hub reads it; add data.hub=OWNER/NAME.",
        ),
        (
            {"source": "hub", "hub": "some/rows"},
            "data.revision=null is no commit of some/rows, whose rows may change; give the 40 hexadecimal"
            " digits of one, as its page on the hub lists them, with data.revision=COMMIT.",
        ),
    ],
)
def test_rows_that_were_not_named_are_asked_for_at_plan_time(
    changes: dict[str, Any], said: str
) -> None:
    for use in (Custom.fingerprint, Custom.load):
        with pytest.raises(UserError) as error:
            use(replace(CUSTOM, **changes))
        assert str(error.value) == said


def test_a_folder_without_a_training_file_and_a_file_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train\.jsonl\.gz \(nor \.jsonl, "):
        mine(tmp_path).load()
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(UserError, match=r"rows\.txt is of no kind that is read; give \.jsonl"):
        mine(tmp_path / "rows.txt").load()


def test_two_keys_cannot_name_the_same_column() -> None:
    with pytest.raises(UserError) as error:
        recipe(compose(["data=custom", "data.columns.chosen=response"]))
    said = str(error.value)
    assert said.startswith("data.columns={") and "\n" not in said
    assert said.endswith("it must name another column for each of its keys; give another value.")


def anything(rng: random.Random, depth: int = 0) -> object:
    """A value that a column may hold by mistake."""
    texts = ("", " ", "p", "\n\nHuman: p\n\nAssistant:", "\n\nAssistant:", "\0", "true", "1", "nan")
    plain: tuple[object, ...] = (None, True, 1, -0.5, float("inf"), 10**400, {}, [], {"a": None})
    roles = ("user", "assistant", "system", "tool", "", 3, None)
    kind = rng.randrange(4 if depth < 2 else 2)
    if kind == 0:
        return rng.choice(texts)
    if kind == 1:
        return rng.choice(plain)
    if kind == 2:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(3))]
    turns = [rng.choice(roles), *["user", "assistant"] * rng.randrange(3), rng.choice(roles)]
    return [{"role": role, "content": rng.choice((*texts, "a", "b", 3))} for role in turns]


def test_2000_rows_with_anything_in_a_column_are_read_or_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    sound: Rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "response": "a", "label": True},
        {"prompt": "p", "response": "a", "score": 1},
        {"prompt": [user("p")], "response": [assistant("a")], "id": 7},
        {"messages": [*TALK, assistant("a")]},
        *(row for row, _ in TALKS),
    ]
    spoilt = []
    for _ in range(2000):
        row = dict(rng.choice(sound))
        row[rng.choice([*row, "id", "label"])] = anything(rng)
        if rng.random() < 0.2:
            row.pop(rng.choice(list(row)))
        spoilt.append(row)
    file = write(tmp_path / "rows.jsonl", spoilt)
    drops = Drops("drop")
    parser = Parser(NAMES, lambda: write_transcript)
    read = [example for _, example in drops.parsed(rows.read(file, drops), parser)]
    assert len(read) + sum(map(len, drops.causes.values())) == 2000
    assert len(drops.causes) == 8 and len(read) > 200
    for example in read:
        assert example.prompt.strip() and all(answer.strip() for answer in example.answers)
        assert len({*example.answers}) == {"preference": 2, "prompt": 0}.get(example.shape, 1)
        assert all(text.encode() for text in (example.prompt, *example.answers))


# --- the hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """What was asked of a hub that has two splits."""
    calls: list[tuple[str, str, str]] = []

    class Table(list[dict[str, Any]]):  # what the library hands back, as far as it is used
        column_names = ("prompt", "chosen", "rejected")

    def load_dataset(path: str, data_dir: None, revision: str, split: str) -> Table:
        calls.append((path, revision, split))
        return Table([PAIR | {"prompt": split}])

    hub = SimpleNamespace(
        load_dataset=load_dataset,
        get_dataset_split_names=lambda path, revision: ["train_prefs", "train_sft", "test"],
    )
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("rlhf_cli.hub.out_of_reach", lambda: False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return calls


def test_the_hub_is_asked_for_the_splits_that_are_named(asked: list[tuple[str, str, str]]) -> None:
    data = replace(CUSTOM, source="hub", hub="some/rows", revision=COMMIT)
    with pytest.raises(UserError) as error:
        data.load()
    assert str(error.value) == (
        "data.splits.train=train is no split of some/rows; choose one of train_prefs, train_sft, test."
    )
    named = replace(data, splits=replace(data.splits, train="train_prefs"))
    corpus = named.load()
    assert (corpus.train.prompts, corpus.heldout.prompts) == (("train_prefs",), ("test",))
    assert asked == [("some/rows", COMMIT, "train_prefs"), ("some/rows", COMMIT, "test")]
    assert named.fingerprint() == f"some/rows@{COMMIT}"


# --- keys


def test_the_fingerprint_is_of_the_bytes_and_not_of_the_place(tmp_path: Path) -> None:
    here = mine(folder(tmp_path / "here", [PAIR | {"prompt": "p"}], [PAIR]))
    there = mine(folder(tmp_path / "there", [PAIR | {"prompt": "p"}], [PAIR]))
    assert here.fingerprint() == there.fingerprint()
    assert here.load().digest == there.load().digest
    before = here.fingerprint()
    write(tmp_path / "here/test.jsonl", [PAIR, PAIR | {"prompt": "more"}])
    assert here.fingerprint() != before
    # What is trained on and what is held out are not the same when they change places.
    swapped = mine(folder(tmp_path / "swapped", [PAIR], [PAIR | {"prompt": "p"}]))
    assert swapped.fingerprint() != there.fingerprint()


def test_another_chat_template_is_another_fingerprint_wherever_the_tokenizer_lies(
    tmp_path: Path, chatty: Path
) -> None:
    place = folder(tmp_path / "d", [PAIR | {"prompt": "p"}], [PAIR])

    def of(tokenizer: object) -> str:
        return mine(place, template="model", tokenizer=str(tokenizer)).fingerprint()

    moved = shutil.copytree(chatty, tmp_path / "moved")
    changed = retold(chatty, tmp_path / "changed", CHATML + " ")
    assert of(chatty) == of(moved) != of(changed)
    assert of("some/model") != of("other/model")


def test_the_shipped_choice_is_planned_and_renamed_by_its_rows_alone(tmp_path: Path) -> None:
    def keys(place: Path) -> list[str]:
        node = compose(["data=custom", f"data.path={place}", f"paths.runs={tmp_path}/runs"])
        return [step.key for step in plan(node).steps]

    rows = [PAIR | {"prompt": "p"}]
    first = keys(folder(tmp_path / "first", rows, [PAIR]))
    assert first == keys(folder(tmp_path / "second", rows, [PAIR])) and len(first) == 3
    assert not {*first} & {*keys(folder(tmp_path / "third", rows * 2, [PAIR]))}


# --- prompts that are too long


@pytest.mark.parametrize(
    ("prompt", "less"),
    [
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "\n\nHuman: c\n\nAssistant:"),
        (
            "Be brief.\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            "Be brief.\n\nHuman: c\n\nAssistant:",
        ),
        ("\n\nHuman: c\n\nAssistant:", None),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", None),
        ("a question", None),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:", None),
    ],
)
def test_a_transcript_that_is_too_long_loses_its_oldest_exchange(
    prompt: str, less: str | None
) -> None:
    assert CUSTOM.shorter(prompt) == less


# --- real rows


def test_real_comparisons_load_with_the_faults_that_tldr_finds_in_them(shared_data: Path) -> None:
    file = shared_data / "tldr/comparisons_ai/train.jsonl.gz"
    corpus = mine(file, on_bad_row="drop").load()
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == 788
    prompts = {*corpus.train.prompts, *corpus.heldout.prompts}
    assert len(corpus.heldout.prompts) == round(0.05 * len(prompts))
    assert corpus.drops == {}
