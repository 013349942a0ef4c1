"""A language model as a judge: what it is asked and how it is read, over a real server on loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter

from rlhf_cli import config, remote
from rlhf_cli.errors import UserError
from rlhf_cli.judges.cache import FILE, Answers, Question
from rlhf_cli.judges.llm import Estimate, Judge
from rlhf_cli.judges.prompts import PROMPTS, verdict, wording
from rlhf_cli.recipes import Chat
from rlhf_cli.remote import Pace
from rlhf_cli.tools import winrate
from tests.conftest import Typed
from tests.servers import Answer, served
from tests.test_config import judges
from tests.test_mistakes import raising
from tests.test_winrate import evaluated, rows

KEY = "sk-0123456789-do-not-show"

# --- what is asked, and how answers are read


def test_a_wording_that_changes_gets_a_new_version() -> None:
    digests = {
        name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in PROMPTS.items()
    }
    assert digests == PINNED
    assert {*PROMPTS} == {*get_args(get_type_hints(Chat)["prompt"])}


PINNED = {"hh-1": "75176c79944adbfe", "tldr-1": "88e0d802896277df"}
"""Beginning of sha256sum: verdicts that are cached and tables that are published were given on these."""


@pytest.mark.parametrize("version", PROMPTS)
def test_the_question_shows_prompt_and_responses_once_each_and_a_before_b(version: str) -> None:
    asked = wording(version, "\n\nHuman: {x}?\n\nAssistant:", " the one\n", " {the} other")
    parts = ["Human: {x}?\n\nAssistant:", " the one\n", " {the} other\n", "Verdict: A\n"]
    places = [asked.index(part) for part in parts]
    assert places == sorted(places) and [asked.count(part) for part in parts] == [1] * 4
    assert asked.index(" A>") < places[1] < asked.index(" B>") < places[2]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A is better.\nVerdict: A", 1.0),
        ("Verdict: B\n\n", 0.0),
        ("They say the same.\n\n  Verdict: tie", 0.5),
        ("", math.nan),
        ("A", math.nan),
        ("I prefer reply A.", math.nan),
        ("Verdict: a", math.nan),
        ("Verdict: A or B", math.nan),
        ("My Verdict: A", math.nan),
        ("Verdict: A\nBut B is good too.", math.nan),
        ("Verdict: A\nVerdict: B\nVerdict: tie", math.nan),
        ("Verdict: A\nVerdict: A", math.nan),
    ],
)
def test_a_verdict_is_the_last_line_and_the_only_one_of_its_form(answer: str, value: float) -> None:
    assert verdict(answer) == pytest.approx(value, nan_ok=True)


# --- configuration


@pytest.mark.parametrize("choice", judges())
def test_every_judge_composes_and_no_field_has_a_default_beside_its_yaml(choice: str) -> None:
    needed = ["judge.model=m", "judge.url=http://localhost/v1", "judge.prompt=hh-1"]
    made = config.judge([f"judge={choice}", *(needed if choice == "llm" else [])])
    assert made.kind == choice
    for field in dataclasses.fields(made):
        assert field.default is field.default_factory is dataclasses.MISSING


# --- a server


def said(text: str | None) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def words(body: Mapping[str, Any]) -> str:
    (message,) = body["messages"]
    return str(message["content"])


def shown(body: Mapping[str, Any]) -> tuple[str, str]:
    """The two responses of a question, as they were shown."""
    asked = words(body)
    found = [asked.partition(f"<reply {x}>\n")[2].partition("\n</reply")[0] for x in "AB"]
    return found[0], found[1]


def longer(body: Mapping[str, Any], _: int) -> tuple[int, Any]:
    """A judge without position bias that likes length."""
    first, second = (len(text) for text in shown(body))
    return said(
        f"By size.\nVerdict: {'tie' if first == second else 'A' if first > second else 'B'}"
    )


def chat(url: str, cache: Path, **changes: Any) -> Chat:
    values: dict[str, Any] = {
        "kind": "llm", "prompts": None, "model": "judge-2024-05", "url": url, "key_env": None,
        "prompt": "hh-1", "max_tokens": 50, "parallel": 1, "per_minute": None, "timeout": 5.0,
        "retries": 2, "price_in": None, "price_out": None, "cache": str(cache),
    }  # fmt: skip
    return TypeAdapter(Chat).validate_python(values | changes)  # type: ignore[no-any-return]


def ask(source: Chat, *pairs: tuple[str, str]) -> list[float]:
    judge = Judge(source)
    questions = [judge.question("Human: why?", first, second) for first, second in pairs]
    return judge.verdicts(questions, lambda: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited, one after the other."""
    naps: list[float] = []
    fake = SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps))
    monkeypatch.setattr(remote, "time", fake)
    return naps


def test_the_protocol_is_chat_completions_at_temperature_0_with_the_key_as_bearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with served(longer, "/v1") as (url, got):
        found = ask(chat(url + "/", tmp_path, key_env="JUDGE_KEY"), ("long", "no"), ("no", "long"))
    assert found == [1.0, 0.0]
    assert got[0] == {
        "model": "judge-2024-05",
        "messages": [{"role": "user", "content": wording("hh-1", "Human: why?", "long", "no")}],
        "temperature": 0,
        "max_tokens": 50,
        "path": "/v1/chat/completions",
        "key": f"Bearer {KEY}",
    }


def test_without_a_key_none_is_sent(tmp_path: Path) -> None:
    with served(longer, "/v1") as (url, got):
        ask(chat(url, tmp_path), ("a", "bb"))
    assert got[0]["key"] is None


def test_an_unreadable_answer_is_asked_for_again_and_then_left_unread(tmp_path: Path) -> None:
    def answer(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        return said("Verdict: B") if number == 2 else said(None if number == 3 else "Well.")

    with served(answer) as (url, got):
        found = ask(chat(url, tmp_path), ("a", "b"), ("c", "d"))
    assert found[0] == 0.0 and math.isnan(found[1])
    assert [shown(body) for body in got] == [("a", "b")] * 2 + [("c", "d")] * 2


# --- faults


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(tmp_path: Path, clock: list[float]) -> None:
    soon = datetime.now(timezone.utc) + timedelta(seconds=100)

    def answer(body: Mapping[str, Any], number: int) -> Any:
        if number < 3:
            after = "7" if number == 1 else format_datetime(soon, usegmt=True)
            return 429, b"slow down", {"Retry-After": after}
        return longer(body, number)

    with served(answer) as (url, got):
        assert ask(chat(url, tmp_path), ("long", "no")) == [1.0]
    assert len(got) == 3 and clock[0] == 7.0
    assert clock[1] == pytest.approx(100, abs=30) and len(clock) == 2


def test_without_it_waits_grow_after_server_errors_and_broken_dates(
    tmp_path: Path, clock: list[float]
) -> None:
    def answer(body: Mapping[str, Any], number: int) -> Any:
        faults = {1: (500, b""), 2: (429, b"", {"Retry-After": "soon"}), 3: (503, b"")}
        return faults[number] if number in faults else longer(body, number)

    with served(answer) as (url, got):
        assert ask(chat(url, tmp_path, retries=3), ("long", "no")) == [1.0]
    assert len(got) == 4 and clock == [1.0, 2.0, 4.0]


def test_an_endpoint_that_wants_a_day_of_rest_ends_the_command(tmp_path: Path) -> None:
    with (
        served(lambda *_: (429, b"", {"Retry-After": "86400"})) as (url, got),
        pytest.raises(UserError) as error,
    ):
        ask(chat(url, tmp_path), ("a", "b"))
    assert len(got) == 1
    assert str(error.value) == (
        f"judge.url={url} wants no request for 86400 s; give the same command again after that, and it"
        " goes on from what is done."
    )


def test_an_endpoint_that_stays_down_ends_the_command_and_what_was_answered_is_kept(
    tmp_path: Path, clock: list[float]
) -> None:
    def answer(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        return longer(body, number) if number == 1 else (500, b"out of memory")

    with served(answer) as (url, got), pytest.raises(UserError) as error:
        ask(chat(url, tmp_path), ("long", "no"), ("a", "b"), ("c", "d"))
    assert len(got) == 4  # and nothing is asked about the third pair
    assert str(error.value) == (
        f"judge.url={url} did not answer in 3 attempts of 5 s (status 500: 'out of memory'); see to the"
        " server and give the same command again, which goes on from what is done."
    )
    with served(longer, "/v1") as (url, got):
        assert ask(chat(url, tmp_path), ("long", "no"), ("a", "b")) == [1.0, 0.5]
    assert [shown(body) for body in got] == [("a", "b")]


def test_a_slow_endpoint_times_out_and_an_absent_one_refuses(
    tmp_path: Path, clock: list[float]
) -> None:
    done = threading.Event()

    def answer(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        done.wait(5)
        return longer(body, number)

    with served(answer) as (url, _), pytest.raises(UserError, match=r"\(ReadTimeout: timed out\)"):
        try:
            ask(chat(url, tmp_path, timeout=0.2, retries=0), ("a", "b"))
        finally:
            done.set()
    with pytest.raises(UserError, match=r"did not answer in 1 attempts of 5 s \(ConnectError"):
        ask(chat(url, tmp_path, retries=0), ("a", "b"))


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            401,
            b"who are you",
            "refused with status 401: 'who are you'; what judge says, its key_env included, must be what"
            " the server wants.",
        ),
        (
            200,
            b"<html>",
            "must answer as OpenAI's chat completions do, to whose address /chat/completions is added, but"
            " answered '<html>'.",
        ),
        (
            200,
            {"choices": []},
            "must answer as OpenAI's chat completions do, to whose address /chat/completions is added, but"
            " answered '{\"choices\": []}'.",
        ),
    ],
)
def test_an_answer_of_another_kind_ends_the_command_at_once(
    tmp_path: Path, status: int, body: Any, sentence: str
) -> None:
    with served(lambda *_: (status, body)) as (url, got), pytest.raises(UserError) as error:
        ask(chat(url, tmp_path), ("a", "b"))
    assert len(got) == 1 and str(error.value) == f"judge.url={url} {sentence}"


@pytest.mark.parametrize("url", ["nowhere", "http://[::1"])
def test_what_is_no_address_is_not_tried_again(
    tmp_path: Path, clock: list[float], url: str
) -> None:
    with pytest.raises(UserError, match=r"is no address .*; give one as http://HOST:PORT/PATH.$"):
        ask(chat(url, tmp_path), ("a", "b"))
    assert clock == []


@pytest.mark.parametrize("value", [None, "", "sk-ä", "sk-0\nX: y"])
def test_a_key_that_is_not_there_or_cannot_be_sent_is_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError) as error:
        ask(chat("http://127.0.0.1:1/v1", tmp_path, key_env="JUDGE_KEY"), ("a", "b"))
    assert str(error.value) == (
        "judge.key_env=JUDGE_KEY, but the environment has no key there, or one with line ends or letters"
        " beyond ASCII; export JUDGE_KEY=KEY, or set judge.key_env=null."
    )


# --- pace and parallel requests


def test_no_more_requests_begin_in_a_minute_than_allowed(clock: list[float]) -> None:
    pace = Pace(30)
    for _ in range(4):
        pace.wait()
    assert clock == pytest.approx([2.0, 2.0, 2.0])
    pace.hold(9.0)  # longer than the 2 s it would have been
    pace.wait()
    assert clock[3:] == pytest.approx([9.0])
    pace.hold(0.5)  # shorter
    pace.wait()
    assert clock[4:] == pytest.approx([2.0])


def test_as_many_questions_are_asked_at_once_as_allowed(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=20)

    def answer(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        together.wait()  # nobody is answered until three have asked
        return longer(body, number)

    pairs = [("x" * n, "x" * 3) for n in range(6)]
    with served(answer) as (url, got):
        found = ask(chat(url, tmp_path, parallel=3), *pairs)
    assert found == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0] and len(got) == 6


# --- the cache


def test_the_same_question_is_one_line_and_any_other_model_wording_or_order_another(
    tmp_path: Path,
) -> None:
    first = Question("m", "hh-1", "p", "a", "b")
    # printf '["m","hh-1","p","a","b"]' | sha256sum
    assert first.digest == hashlib.sha256(b'["m","hh-1","p","a","b"]').hexdigest()
    others = [
        dataclasses.replace(first, **change)
        for change in (
            {"model": "n"}, {"version": "tldr-1"}, {"prompt": "q"}, {"first": "b", "second": "a"},
        )
    ]  # fmt: skip
    answers = Answers(tmp_path / "new")
    answers.add(first, "Grün.\nVerdict: A")
    assert [answers.get(other) for other in others] == [None] * 4
    (line,) = (tmp_path / "new" / FILE).read_text().splitlines()
    assert json.loads(line) == {
        "key": first.digest,
        "model": "m",
        "prompt": "hh-1",
        "said": "Grün.\nVerdict: A",
    }
    assert Answers(tmp_path / "new").get(first) == "Grün.\nVerdict: A"


def test_half_a_line_of_an_interrupted_process_is_passed_over(tmp_path: Path) -> None:
    one, other = (Question("m", "hh-1", "p", x, "b") for x in "ac")
    answers = Answers(tmp_path)
    answers.add(one, "Verdict: A")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": "0123')
    answers = Answers(tmp_path)
    answers.add(other, "Verdict: B")
    again = Answers(tmp_path)
    assert (again.get(one), again.get(other)) == ("Verdict: A", "Verdict: B")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        Answers(tmp_path / "file" / "cache")
    assert str(error.value) == (
        f"cannot write {tmp_path / 'file' / 'cache'}: a part of the path is a file; mend that, or choose"
        " another folder with judge.cache=DIR."
    )


# --- the estimate


def test_the_estimate_counts_new_questions_once_and_prices_them(tmp_path: Path) -> None:
    with served(longer, "/v1") as (url, got):
        source = chat(url, tmp_path, price_in=2.0, price_out=8.0)
        ask(source, ("known", "x"))
        judge = Judge(source)
        questions = [
            judge.question("Human: why?", *pair)
            for pair in (("known", "x"), ("new", "x"), ("x", "new"), ("new", "x"))
        ]
        found = judge.estimate(questions)
        sent = 2 * len(wording("hh-1", "Human: why?", "new", "x"))
        tokens = math.ceil(sent / 4)
        assert found == Estimate(2, 1, tokens, 100, pytest.approx(2e-6 * tokens + 8e-4))
        judge.verdicts(questions, lambda: None)
    assert len(got) - 1 == found.calls
    assert Judge(dataclasses.replace(source, price_out=None)).estimate(questions).price is None


# --- the real command

PROMPT = [f"\n\nHuman: question {n}?\n\nAssistant:" for n in range(4)]


def two(root: Path) -> tuple[str, str]:
    """Runs of which the first's responses are longer, longer, as long and the same."""

    def run(algo: str, responses: Sequence[str]) -> str:
        made = rows([0.0] * 4, lengths=[len(x) for x in responses], prompts=PROMPT)
        ended = [{**row, "response": x} for row, x in zip(made, responses, strict=True)]
        return evaluated(root, algo, {0: made, 5: ended}).key

    return run("ppo", [" long one", " some", " yes", " same"]), run(
        "dpo", [" no", " two", " not", " same"]
    )


def told(url: str, *more: str) -> list[str]:
    return [
        "judge=llm", "judge.model=judge-2024-05", f"judge.url={url}", "judge.prompt=hh-1", *more
    ]  # fmt: skip


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache in which nothing is."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_both_orders_are_asked_of_every_pair_and_equal_responses_tie_unasked(
    typed: Typed, tmp_path: Path, fresh: Path
) -> None:
    a, b = two(tmp_path)
    with served(longer, "/v1") as (url, got):
        code, out, err = typed("winrate", a, b, *told(url), "--json")
    assert code == 0, err
    pairs = {shown(body) for body in got}
    expected = {(" long one", " no"), (" some", " two"), (" yes", " not")}
    assert pairs == expected | {(second, first) for first, second in expected} and len(got) == 6
    (table,) = json.loads(out)
    row = table["rows"][0]
    assert (row["wins"], row["ties"], row["losses"], row["first shown"]) == (2, 2, 0, 0.5)
    assert "In 0 of 4 comparisons it preferred a place" in " ".join(table["notes"])
    assert "judge-2024-05 at temperature 0, wording hh-1" in " ".join(table["notes"])


def test_the_second_table_takes_no_call_and_no_key(
    typed: Typed, tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with served(longer, "/v1") as (url, got):
        words = ["winrate", a, b, *told(url, "judge.key_env=JUDGE_KEY", "judge.parallel=3")]
        code, first, err = typed(*words)
        assert code == 0 and len(got) == 6, err
    monkeypatch.delenv("JUDGE_KEY")
    code, second, err = typed(*words)  # the server is gone
    assert (code, second) == (0, first)
    assert err == (
        "judge=judge-2024-05: 0 calls, 6 answers are there; about 0 tokens in and at most 0 out.\n"
    )


def test_a_judge_that_always_prefers_the_first_shown_decides_nothing_and_is_told_on(
    typed: Typed, tmp_path: Path, fresh: Path
) -> None:
    a, b = two(tmp_path)
    with served(lambda *_: said("Verdict: A")) as (url, _):
        _, out, _ = typed("winrate", a, b, *told(url), "--json")
    (table,) = json.loads(out)
    row = table["rows"][0]
    assert (row["wins"], row["ties"], row["losses"], row["first shown"]) == (0, 4, 0, 1.0)
    assert "In 3 of 4 comparisons it preferred a place" in " ".join(table["notes"])


def test_a_dry_run_asks_nobody_and_its_estimate_is_what_the_table_then_takes(
    typed: Typed, tmp_path: Path, fresh: Path
) -> None:
    a, b = two(tmp_path)
    prices = ("judge.price_in=1000", "judge.price_out=0", "judge.max_tokens=10")
    with served(longer, "/v1") as (url, got):
        code, out, err = typed("winrate", a, b, "sft", *told(url, *prices), "--dry-run")
        assert (code, out, got) == (0, "", [])
        assert typed("winrate", a, b, "sft", *told(url, *prices))[2] == err
    sent = math.ceil(sum(len(words(body)) for body in got) / 4)
    # 2 orders of 3 pairs of 4 prompts; to the last one ppo and dpo say the same, so that nobody is
    # asked about them, and about either of them and sft only once
    assert len(got) == 20
    assert err == (
        f"judge=judge-2024-05: 20 calls, 0 answers are there; about {sent:,} tokens in and at most 200"
        f" out, for at most {sent / 1000:.2f}.\n"
    )


def test_an_interrupt_says_how_to_go_on(
    typed: Typed, tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two(tmp_path)
    monkeypatch.setattr(winrate, "judged", raising(KeyboardInterrupt()))
    code, out, err = typed("winrate", a, b)
    assert (code, out) == (130, "")
    assert err == "\ninterrupted: give the same command again to go on.\n"


def test_the_key_is_in_no_cache_no_output_and_no_error_even_if_the_endpoint_repeats_it(
    typed: Typed, tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = two(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    outputs = []
    answers: list[Answer] = [
        lambda *_: said(f"Your key is {KEY}.\nVerdict: A"),
        lambda *_: (401, f"the key {KEY} is wrong".encode()),
        lambda *_: (500, f"cannot look {KEY} up".encode()),
        lambda *_: (200, KEY.encode()),
    ]
    for number, answer in enumerate(answers):
        more = (f"judge.cache={fresh / str(number)}", "judge.retries=0", "judge.key_env=JUDGE_KEY")
        with served(answer) as (url, got):
            outputs += typed("winrate", a, b, *told(url, *more), "--out", f"tables/{number}")[1:]
        assert got and all(body["key"] == f"Bearer {KEY}" for body in got)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("Your key is ***" in path.read_text() for path in files if path.name == FILE)
    assert any("the key *** is wrong" in text for text in outputs)
    assert [path for path in files if KEY in path.read_text(errors="replace")] == []
    assert [text for text in outputs if KEY in text] == []


def test_a_real_model_that_cannot_judge_is_reported_as_unreadable(
    typed: Typed, tmp_path: Path, fresh: Path, shared_data: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "models" / "stories260K-hf"
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )

    def story(body: Mapping[str, Any], number: int) -> tuple[int, Any]:
        ids = tokenizer(words(body), return_tensors="pt").input_ids[:, -200:]
        with torch.no_grad():
            told = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
        return said(tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=True))

    a, b = two(tmp_path)
    with served(story) as (url, got):
        code, out, err = typed(
            "winrate", a, b, *told(url, "judge.max_tokens=12", "judge.parallel=1")
        )
    assert code == 0, err
    assert len(got) == 12  # each of six questions twice
    kept = [json.loads(line)["said"] for line in (fresh / FILE).read_text().splitlines()]
    assert len(kept) == 6 and all(text.strip() for text in kept)
    assert "Left out, since an answer was unreadable even asked twice: 3." in out
    assert "left out" in out.splitlines()[1]
