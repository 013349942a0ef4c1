"""The real command on rows that nobody made for it, with a genuine checkpoint and its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_cli.data.tokens import Encoded
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import rlhf

SMALL = [
    "model=custom", "model.regime=nano", "eval.prompts=12", "eval.points=1",
    "reward.calibration=16", "algo.update.episodes=48", "algo.update.batch=24",
    "algo.update.minibatches=2", "track=off",
]  # fmt: skip


def stories(shared_data: Path) -> Path:
    """A Llama of 260,000 weights."""
    return shared_data / "models" / "stories260K-hf"


def finished(folder: Path, *words: str) -> list[Run]:
    """The RL runs that a command leaves, each measured against its SFT policy and never by gold."""
    done = rlhf(folder, "train", "-m", *SMALL, "paths.cache=cache", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [Run(path) for path in (folder / "runs" / "rl").iterdir()]
    for run in runs:
        assert run.status() == "done"
        last = read(run.metrics_path)[-1]
        assert last["step"] > 0 and {"eval/kl", "eval/reward"} <= last.keys()
        assert "gold" not in run.metrics_path.read_text()
    return runs


def prompts(run: Run) -> list[str]:
    """What the first evaluation asked."""
    lines = (run.samples / "000000.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_the_chain_runs_on_real_conversations(tmp_path: Path, shared_data: Path) -> None:
    """One algorithm for each thing the engine does, on genuine pairs."""
    algos = ["p3o_v2", "ppo_max", "dpo", "kto", "xpo", "remax", "nash_md", "aihf", "etpo"]
    runs = finished(
        tmp_path, f"algo={','.join(algos)}", f"model.name={stories(shared_data)}",
        "data=hh", "data.source=path", f"data.path={shared_data}/hh-rlhf",
        "data.max_prompt_tokens=96", "data.max_response_tokens=24",
        "sft.epochs=0.02", "reward.epochs=0.02",
    )  # fmt: skip
    assert len(runs) == len(algos)
    for run in runs:
        # The 15 faulty rows of the sample, and 4 in which the assistant speaks twice running.
        assert run.manifest()["data"]["drops"] == {
            "prompts differ": 9,
            "empty answer": 4,
            "identical pair": 2,
            "broken role order": 4,
        }
        asked = prompts(run)
        assert len(asked) == 12 and all(prompt.endswith("\n\nAssistant:") for prompt in asked)


def test_the_chain_runs_on_real_posts_and_their_compared_summaries(
    tmp_path: Path, shared_data: Path
) -> None:
    runs = finished(
        tmp_path, "algo=p3o_v2,dpo", f"model.name={stories(shared_data)}",
        "data=tldr", "data.source=path", f"data.path={shared_data}/tldr",
        "data.max_prompt_tokens=96", "data.max_response_tokens=24",
        "sft.epochs=0.02", "reward.epochs=0.05",
    )  # fmt: skip
    assert len(runs) == 2
    for run in runs:
        assert run.manifest()["data"]["drops"] == {"post is held out": 78}
        asked = prompts(run)
        assert len(asked) == 12
        assert all(prompt.startswith("SUBREDDIT: r/") for prompt in asked)
        assert all(prompt.endswith("\n\nTL;DR:") for prompt in asked)
    for where in ("sft", "reward"):
        (made,) = (Run(path) for path in (tmp_path / "runs" / where).iterdir())
        assert made.manifest()["data"]["drops"] == {"post is held out": 78}


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
MEALS = ("soup", "rice", "bread", "salad", "stew")
GUESTS = ("one guest", "two guests", "my aunt", "a friend")


def talks() -> Iterator[dict[str, Any]]:
    """80 conversations of two exchanges whose last answer there is twice."""
    for day in DAYS:
        for meal in MEALS:
            for guest in GUESTS:
                asked = [
                    {"role": "user", "content": f"Is {meal} good on {day} for {guest}?"},
                    {"role": "assistant", "content": f"Yes, {meal} is fine."},
                    {"role": "user", "content": "When do I start?"},
                ]
                yield {
                    "chosen": [*asked, {"role": "assistant", "content": "An hour before."}],
                    "rejected": [*asked, {"role": "assistant", "content": f"{day}."}],
                }


@pytest.fixture
def chatty(tmp_path: Path, shared_data: Path) -> Path:
    """The same checkpoint, whose tokenizer has a chat template."""
    place = shutil.copytree(stories(shared_data), tmp_path / "chatty")
    file = place / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"chat_template": TEMPLATE}), encoding="utf-8")
    return place


def test_the_chain_runs_on_conversations_of_ones_own_as_the_chat_template_writes_them(
    tmp_path: Path, chatty: Path
) -> None:
    rows = list(talks())
    assert len(rows) == 80
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = finished(
        tmp_path, "algo=p3o_v2,dpo", f"model.name={chatty}",
        "data=custom", "data.path=talks.jsonl", "data.heldout=0.2",
        "data.max_prompt_tokens=160", "data.max_response_tokens=24",
        "sft.epochs=0.5", "reward.epochs=0.5",
    )  # fmt: skip
    assert len(runs) == 2
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    asked = [row["chosen"][:-1] for row in rows]
    rendered = {
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for talk in asked
    }
    assert len(rendered) == 80
    for run in runs:
        assert run.manifest()["data"]["drops"] == {}
        assert len({*prompts(run)}) == 12 and {*prompts(run)} <= rendered
    kept = [Encoded(path) for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
    # Demonstrations and pairs, of the training split and of the held-out one.
    assert sorted((len(rows), rows.lengths.shape[1]) for rows in kept) == [
        (16, 2), (16, 3), (64, 2), (64, 3),
    ]  # fmt: skip
    ids = [tokenizer.apply_chat_template(talk, add_generation_prompt=True) for talk in asked]
    templated = {(tokenizer.bos_token_id, *talk["input_ids"]) for talk in ids}
    for prompt, *answers in (row for rows in kept for row in rows):
        assert tuple(prompt) in templated
        for answer in answers:
            assert (
                answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id
            )
