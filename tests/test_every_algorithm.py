"""Every algorithm through the real command: one sweep, one SFT policy, one reward model, a run each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.algos.discovery import NAMES, shipped
from tests.test_chain import TINY, rlhf

SMALL = [
    *TINY, "model.scratch.vocab=320", "data.max_response_tokens=12", "eval.points=1",
    "algo.update.episodes=96", "algo.update.batch=96", "track=off",
    "reward.unended=null",  # so untrained, few answers end, and all of the others would score alike
]  # fmt: skip
GUIDE = [
    f"algo.guide.algo.{word.removeprefix('algo.')}" for word in SMALL if word.startswith("algo.")
]
"""A guide has values of its own; these make it the very run that the sweep makes of algo=dpo."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of them were trained for two optimiser steps."""
    made = tmp_path_factory.mktemp("all")
    unguided = ",".join(name for name in NAMES if name != "rto")
    for words in (["-m", f"algo={unguided}"], ["algo=rto", *GUIDE]):
        done = rlhf(made, "train", *words, *SMALL, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return made


def test_one_sweep_of_all_builds_one_sft_policy_and_one_reward_model(folder: Path) -> None:
    assert len(list((folder / "runs" / "sft").iterdir())) == 1
    assert len(list((folder / "runs" / "reward").iterdir())) == 1
    trained = {Run(path).manifest()["algo"] for path in (folder / "runs" / "rl").iterdir()}
    assert trained == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_something_and_is_measured_as_all_others_are(folder: Path, name: str) -> None:
    (path,) = (folder / "runs" / "rl").glob(f"{name}-hh_embedded-nano-s1-*")
    rows = read(path / "metrics.jsonl")
    assert Run(path).status() == "done"
    assert {"eval/kl", "eval/reward", "eval/gold", "train/loss", "train/grad_norm"} <= rows[
        -1
    ].keys()
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["train/grad_norm"] > 0 and rows[-1]["episodes"] == 96
    alone = rows[-1]["train/lr"] == 0  # the critic's head start
    assert alone == (shipped(name).critic_only() > 0)
    samples = (path / "samples" / f"{rows[-1]['step']:06d}.jsonl").read_text().splitlines()
    assert {"prompt", "response", "score", "gold", "kl"} <= json.loads(samples[0]).keys()


def test_a_guide_is_an_ordinary_run_and_a_parent(folder: Path) -> None:
    (path,) = (folder / "runs" / "rl").glob("rto-*")
    parents = Run(path).manifest()["parent_runs"]
    guide = Run(folder / "runs" / parents["guide"])
    assert guide.manifest()["algo"] == "dpo" and guide.status() == "done"
    assert len(list((folder / "runs" / "rl").glob("dpo-*"))) == 1


def test_all_give_equal_numbers_on_equal_weights(folder: Path) -> None:
    """Before the first update all have the SFT policy's weights: one evaluation, to the last digit."""
    starts = {}
    for path in (folder / "runs" / "rl").iterdir():
        first, *_ = read(path / "metrics.jsonl")
        assert first["step"] == 0
        measured = {name: value for name, value in first.items() if name.startswith("eval/")}
        samples = (path / "samples" / "000000.jsonl").read_text()
        starts[path.name] = json.dumps(measured, sort_keys=True) + samples
    assert len(starts) == len(NAMES) and len(set(starts.values())) == 1
