"""Who gives the scores: the dataset's gold reward, a function, a server, anybody's classifier, a sum."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.config import compose, recipe
from rlhf_cli.core.rollout import Rollout
from rlhf_cli.engine.rollout import Collector, Judges
from rlhf_cli.engine.world import start
from rlhf_cli.errors import UserError
from rlhf_cli.models.load import new_reward_model
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.plan import plan
from rlhf_cli.recipes import Classifier, Function, Gold, Http, Learned, Model, Part, Scratch, Tuning
from rlhf_cli.rewards.http import endpoint as scorer
from rlhf_cli.rewards.written import Scorer, in_batches, numbers, opened
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.algos.cases import case
from tests.servers import served
from tests.test_chain import TINY, rlhf

PROMPTS, RESPONSES = ["a", "bb", "ccc"], [" one", " three", " seven"]


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)]


def short_by_one(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return lengths(prompts, responses)[1:]


def alone(source: Any, gold: Scorer | None = None) -> Scorer:
    found = opened([Part(1.0, source)], gold, "cpu")
    assert found is not None
    return found


# --- a function


def test_a_function_is_asked_in_batches_and_in_order() -> None:
    call = f"{__name__}.lengths"
    assert alone(Function("function", call, 2))(PROMPTS, RESPONSES) == [5.0, 8.0, 9.0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("nowhere.score", "reward.source.call=nowhere.score cannot be imported"),
        (f"{__name__}.nothing", "cannot be imported"),
        (f"{__name__}.PROMPTS", "is no function"),
    ],
)
def test_a_function_that_is_not_there_is_a_mistake(call: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        alone(Function("function", call, 2))


def test_a_function_must_return_a_number_per_response() -> None:
    with pytest.raises(UserError, match=r"must give a list of 3 scores.*but gave 2"):
        alone(Function("function", f"{__name__}.short_by_one", 3))(PROMPTS, RESPONSES)
    with pytest.raises(UserError, match="gave 'x' for a score"):
        numbers(["x"], 1, "it")
    with pytest.raises(UserError, match="but gave a dict"):
        numbers({}, 1, "it")


def test_what_is_no_number_is_a_missing_score_and_tensors_are_welcome() -> None:
    got = numbers([None, float("inf"), 2, "3"], 4, "it")
    assert [math.isnan(x) for x in got] == [True, True, False, False] and got[2:] == [2.0, 3.0]
    assert numbers(torch.tensor([1.0, 2.0]), 2, "it") == [1.0, 2.0]


def test_batches_are_as_large_as_allowed() -> None:
    sizes: list[int] = []

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        sizes.append(len(prompts))
        return lengths(prompts, responses)

    assert in_batches(score, 2)(PROMPTS, RESPONSES) == [5.0, 8.0, 9.0]
    assert sizes == [2, 1]


# --- a sum


def test_a_mix_is_the_weighted_sum_of_what_is_said_of_texts() -> None:
    parts = [
        Part(0.5, Function("function", f"{__name__}.lengths", 8)),
        Part(-2.0, Gold("gold")),
        Part(3.0, Learned("learned")),  # the engine's own part
    ]
    scorer = opened(parts, lambda prompts, responses: [1.0, 2.0, 3.0], "cpu")
    assert scorer is not None
    assert scorer(PROMPTS, RESPONSES) == [0.5, 0.0, -1.5]
    assert opened([Part(3.0, Learned("learned"))], None, "cpu") is None


def test_nobody_knows_the_gold_reward_of_real_data() -> None:
    with pytest.raises(UserError, match=r"reward.source.kind=gold, but nobody knows"):
        alone(Gold("gold"))


# --- a server


def right(body: dict[str, list[str]], _: int) -> tuple[int, Any]:
    return 200, {"scores": lengths(body["prompts"], body["responses"])}


def endpoint(url: str, key: str | None = None, retries: int = 2, timeout: float = 5.0) -> Http:
    return Http("http", url, key, 2, timeout, retries)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    taken: list[float] = []
    monkeypatch.setattr("rlhf_cli.remote.time.sleep", taken.append)
    return taken


def test_a_server_scores_in_batches_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORE_KEY", "secret")
    with served(right) as (url, got):
        assert alone(endpoint(url, "SCORE_KEY"))(PROMPTS, RESPONSES) == [5.0, 8.0, 9.0]
    assert [len(body["prompts"]) for body in got] == [2, 1]
    assert got[0]["key"] == "Bearer secret"


def test_a_server_that_stumbles_is_asked_again_after_growing_waits(naps: list[float]) -> None:
    def answer(body: dict[str, list[str]], number: int) -> tuple[int, Any]:
        return right(body, number) if number == 3 else ((503, b"") if number == 1 else (429, b""))

    with served(answer) as (url, got):
        assert alone(endpoint(url))(PROMPTS[:2], RESPONSES[:2]) == [5.0, 8.0]
    assert len(got) == 3 and naps == [1.0, 2.0]


def test_a_server_that_stays_down_ends_the_run_with_what_it_said(naps: list[float]) -> None:
    with (
        served(lambda *_: (500, b"")) as (url, got),
        pytest.raises(UserError, match=r"did not answer in 3 attempts of 5 s \(status 500: ''\)"),
    ):
        alone(endpoint(url))(PROMPTS, RESPONSES)
    assert len(got) == 3
    with pytest.raises(UserError, match=r"did not answer in 1 attempts of 5 s \(ConnectError"):
        alone(endpoint(url, retries=0))(PROMPTS, RESPONSES)


def test_a_server_that_is_too_slow_times_out(naps: list[float]) -> None:
    done = threading.Event()

    def answer(body: dict[str, list[str]], number: int) -> tuple[int, Any]:
        done.wait(5)
        return right(body, number)

    with served(answer) as (url, _), pytest.raises(UserError, match="ReadTimeout"):
        try:
            alone(endpoint(url, retries=0, timeout=0.2))(PROMPTS, RESPONSES)
        finally:
            done.set()


@pytest.mark.parametrize(
    ("status", "said", "sentence"),
    [
        (401, b"who are you", "refused with status 401: 'who are you'"),
        (200, b"<html>", "must answer .*but answered '<html>'"),
        (200, {"score": []}, "must answer"),
        (200, {"scores": [1.0]}, "must give a list of 2 scores, one per response, but gave 1"),
    ],
)
def test_an_answer_of_another_kind_is_not_asked_for_again(
    status: int, said: Any, sentence: str
) -> None:
    with served(lambda *_: (status, said)) as (url, got), pytest.raises(UserError, match=sentence):
        alone(endpoint(url))(PROMPTS[:2], RESPONSES[:2])
    assert len(got) == 1


def test_null_is_a_missing_score_and_a_key_must_be_set() -> None:
    with served(lambda *_: (200, {"scores": [None, 1.5]})) as (url, _):
        got = alone(endpoint(url))(PROMPTS[:2], RESPONSES[:2])
    assert math.isnan(got[0]) and got[1] == 1.5
    with pytest.raises(
        UserError, match=r"reward.source.key_env=NO_SUCH, but the environment has no key"
    ):
        alone(endpoint("http://127.0.0.1:1", "NO_SUCH"))


# --- somebody's classifier


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sequence classifier of one label and its tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = train_tokenizer(["one two three four five six seven"], 300, 64)
    shape = Model(
        "tiny", "nano", Scratch(2, 32, 2, 300, 64, 1), None, None, "fp32", Tuning(None, None)
    )
    new_reward_model(shape, None, tokenizer, 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(folder: Path, form: Any = "plain", batch: int = 8) -> Classifier:
    return Classifier("hf", str(folder), None, "fp32", form, 64, batch)


def test_a_classifier_gives_what_its_own_library_gives_whatever_the_batch(judge: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    got = alone(model_of(judge))(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, got, strict=True):
        with torch.no_grad():
            want = model(**tokenizer(prompt + response, return_tensors="pt")).logits.item()
        assert score == pytest.approx(want, abs=1e-5)
    assert alone(model_of(judge, batch=1))(PROMPTS, RESPONSES) == pytest.approx(got, abs=1e-5)


def test_a_classifier_of_two_labels_or_without_a_trained_head_is_refused(
    judge: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(judge)
    two = AutoModelForSequenceClassification.from_pretrained(
        judge, num_labels=2, ignore_mismatched_sizes=True
    )
    two.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        alone(model_of(tmp_path / "two"))
    headless = AutoModelForCausalLM.from_pretrained(judge)
    headless.config.num_labels = 1
    headless.save_pretrained(tmp_path / "none")
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match=r"lacks score.weight, so it would score at random"):
        alone(model_of(tmp_path / "none"))


def test_an_address_that_is_none_is_not_tried_again() -> None:
    source = Http("http", "localhost:9", None, batch=1, timeout=1.0, retries=9)
    with pytest.raises(UserError, match=r"^reward\.source\.url=localhost:9 is no address \("):
        scorer(source)(["p"], ["r"])


# --- scores that are missing


def rolled(scores: list[list[float]]) -> Rollout:
    made = case(0, prompts=len(scores), responses=len(scores[0])).rollout
    return replace(made, score=torch.tensor(scores))


def rule(missing: Any) -> Collector:
    tokenizer = train_tokenizer(["one two"], 300, 64)
    return Collector(start(60), tokenizer, Judges(None, None), 8, 4, 1, missing=missing)


NAN = math.nan


def test_a_prompt_without_a_full_set_of_scores_leaves_and_the_next_stands_in() -> None:
    rollout = rolled([[NAN, 1], [2, 3], [4, NAN], [5, 6], [NAN, NAN]])
    got = rule("leave")._scored(rollout)
    assert got.score is not None
    assert got.score.tolist() == [[2, 3], [2, 3], [5, 6], [5, 6], [2, 3]]
    assert torch.equal(got.tokens[2], rollout.tokens[3])


def test_a_missing_score_ends_the_run_where_it_must_or_where_nothing_is_left() -> None:
    with pytest.raises(UserError, match=r"^1 of 4 responses got no score"):
        rule("stop")._scored(rolled([[NAN, 1], [2, 3]]))
    with pytest.raises(UserError, match=r"^2 of 2 responses got no score"):
        rule("leave")._scored(rolled([[NAN, NAN]]))
    kept = rule("keep")._scored(rolled([[NAN, 1]])).score
    assert kept is not None and bool(kept[0, 0].isnan())


# --- the chain


def keys(*words: str) -> dict[str, str]:
    return {step.role: step.key for step in plan(compose(list(words))).steps}


def test_no_reward_model_is_trained_for_a_reward_that_has_no_part_in_it() -> None:
    assert list(keys("reward=gold")) == ["sft", "rl"]
    assert list(keys("reward=function", "reward.source.call=a.b")) == ["sft", "rl"]
    half = "reward.source.parts=[{weight: 1, source: {kind: learned}}, {weight: 2, source: {kind: gold}}]"
    assert list(keys("reward=mix", half)) == ["sft", "reward", "rl"]
    assert recipe(compose(["reward=mix", half])).reward.learned == 1.0


def test_another_reward_is_another_run_and_the_same_is_the_same() -> None:
    known = keys()
    assert keys("reward=gold")["rl"] != known["rl"] and keys("reward=gold")["sft"] == known["sft"]
    assert keys("reward=learned") == known
    for rule in ("missing=leave", "unended=-2", "unended_adds=true", "relative=true"):
        other = keys(f"reward.{rule}")
        assert other["rl"] != known["rl"] and other["reward"] == known["reward"]
    assert keys("reward.normalise=none")["reward"] != known["reward"]
    one, other = (keys("reward=function", f"reward.source.call=a.{x}")["rl"] for x in "bc")
    assert one != other


def test_a_classifier_is_known_by_its_contents(judge: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(judge, moved)
    one, other = (keys("reward=hf", f"reward.source.name={f}") for f in (judge, moved))
    assert one == other


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["reward=gold", "data.source=hub"], "has no gold reward"),
        (["algo=aihf", "reward=gold"], "algo=aihf trains the reward model as it goes"),
        (["reward=function"], "reward.source.call has no value yet"),
        (["reward.source.kind=guess"], "reward.source"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_before_anything_is_built(
    words: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan(compose(words))


SMALL = [
    *TINY, "eval.points=1", "algo.update.episodes=64", "algo.update.batch=32", "track=off",
    "data.max_response_tokens=12",
]  # fmt: skip


def test_the_real_command_trains_on_every_kind_of_reward(tmp_path: Path, judge: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n    return [r.count('e') - 1.0 for r in responses]\n"
    )
    rl = tmp_path / "runs" / "rl"
    with served(lambda body, _: (200, {"scores": [len(r) for r in body["responses"]]})) as (
        url,
        got,
    ):
        for words in (
            ["reward=gold"],
            ["reward=function", "reward.source.call=mine.score"],
            ["reward=http", f"reward.source.url={url}"],
            ["reward=hf", f"reward.source.name={judge}", "algo=ppo"],
        ):
            before = set(rl.iterdir()) if rl.exists() else set()
            done = rlhf(tmp_path, "train", *SMALL, *words)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr
            (new,) = set(rl.iterdir()) - before
            last = read(Run(new).metrics_path)[-1]
            samples = [
                json.loads(x) for x in max(Run(new).samples.iterdir()).read_text().splitlines()
            ]
            mean = sum(s["score"] for s in samples) / len(samples)
            assert last["eval/reward"] == pytest.approx(mean, abs=1e-4)
            if words == ["reward=gold"]:
                assert all(s["score"] == pytest.approx(s["gold"], abs=1e-5) for s in samples)
            if "reward=function" in words:
                assert all(s["score"] == s["response"].count("e") - 1.0 for s in samples)
            if "reward=http" in words:
                assert all(s["score"] == len(s["response"]) for s in samples)
    assert not (tmp_path / "runs" / "reward").exists()
    assert any("Assistant:" in prompt for body in got for prompt in body["prompts"])


def test_missing_scores_stop_a_run_or_are_left_out_as_the_rule_says(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n"
        "    return [None if len(r) % 5 == 0 else 1.0 * len(r) for r in responses]\n"
    )
    words = [*SMALL, "reward=function", "reward.source.call=mine.score"]
    done = rlhf(tmp_path, "train", *words)
    assert done.returncode == 2 and "got no score that is a number" in done.stderr
    done = rlhf(tmp_path, "train", *words, "reward.missing=leave")
    assert done.returncode == 0, done.stderr
    (path,) = (p for p in (tmp_path / "runs" / "rl").iterdir() if Run(p).status() == "done")
    last = read(Run(path).metrics_path)[-1]
    samples = [json.loads(x) for x in max(Run(path).samples.iterdir()).read_text().splitlines()]
    unknown = [s for s in samples if s["score"] is None]
    assert unknown and last["eval/unscored"] == len(unknown)
    assert all(len(s["response"]) % 5 == 0 for s in unknown)
