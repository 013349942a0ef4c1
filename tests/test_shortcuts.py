"""What is done once instead of twice changes no number: whole runs with each shortcut and without it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli import packing
from rlhf_cli.config import compose
from rlhf_cli.engine import rollout
from rlhf_cli.launch import execute
from rlhf_cli.models import sequence
from rlhf_cli.plan import plan
from rlhf_cli.stages import rl
from rlhf_cli.store.metrics import read
from tests.test_chain import TINY

WORDS = [
    *TINY, "model.scratch.vocab=320", "data.max_response_tokens=12", "eval.points=1", "track=off",
    "algo.update.episodes=192", "algo.update.batch=96", "algo.update.minibatches=1",
    "reward.unended=null", "launch.micro_batch=32",
]  # fmt: skip
CLOSE = 2e-4
"""fp32 sums in another order, through two optimiser steps."""


def trained(folder: Path, *words: str) -> list[dict[str, float]]:
    """The rows of a run, whose parents are made if they are not there."""
    made = plan(compose([*WORDS, f"paths.runs={folder}", *words]))
    execute(made, "rlhf train")
    return read(made.steps[-1].path / "metrics.jsonl")


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an SFT policy and a reward model are."""
    folder = tmp_path_factory.mktemp("parents")
    trained(folder, "stage=reward", "algo=p3o_v2")
    return folder


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence.packing, "together", lambda *given: 1)


def unsorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PARTS", 1)


def asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout.Collector, "_knows", lambda *given: False)


def asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "waits", lambda algo: False)


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["algo=p3o_v2"], one_by_one),
        (["algo=ppo"], one_by_one),
        (["algo=rloo", "algo.responses=4"], one_by_one),
        (["algo=dpo"], one_by_one),
        (["algo=p3o_v2"], unsorted),
        (["algo=p3o_v2"], asked_again),
        (["algo=grpo", "algo.update.epochs=2"], asked_again),
        (["algo=dpo"], asked_before),
        (["algo=orpo"], asked_before),
    ],
    ids=lambda value: value.__name__ if callable(value) else value[0],
)
def test_a_run_has_the_same_numbers_without_it(
    words: list[str],
    without: Callable[[pytest.MonkeyPatch], None],
    parents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = [tmp_path / "with", tmp_path / "without"]
    for place in places:
        shutil.copytree(parents, place)
    ours = trained(places[0], *words)
    without(monkeypatch)
    theirs = trained(places[1], *words)
    assert len(ours) == len(theirs) >= 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if name.startswith(("train/", "eval/")):
                same = math.isclose(value, other[name], rel_tol=CLOSE, abs_tol=CLOSE)
                assert same, (name, value, other[name])


def test_the_reward_model_is_the_same_without_it(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one(monkeypatch)
    shutil.copytree(parents / "sft", tmp_path / "sft")
    theirs = trained(tmp_path, "stage=reward", "algo=p3o_v2")
    (path,) = (parents / "reward").iterdir()
    for mine, other in zip(read(path / "metrics.jsonl"), theirs, strict=True):
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            if name in mine:
                assert mine[name] == pytest.approx(other[name], rel=CLOSE)


def test_only_what_prepares_nothing_and_is_learned_from_once_can_wait() -> None:
    def waits(*words: str) -> bool:
        return rl.waits(plan(compose([*WORDS, *words])).recipe.algo)

    assert waits("algo=dpo") and waits("algo=simpo") and waits("algo=copg_offline")
    assert not waits("algo=dpo", "algo.update.minibatches=2")
    assert not waits("algo=kto")  # its baseline is made of log pi_old
    assert not waits("algo=dpo_online") and not waits("algo=p3o_v2")
