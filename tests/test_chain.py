"""The real command from words to a figure, on miniature sizes."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli import config
from rlhf_cli.cli import main
from rlhf_cli.errors import UserError
from rlhf_cli.models.load import new_policy
from rlhf_cli.stages.evaluate import check_start
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run, all_runs

TINY = [
    "model.scratch.layers=1", "model.scratch.width=32", "model.scratch.heads=2",
    "model.scratch.vocab=400", "data.embedded.prompts=200", "data.embedded.demos=128",
    "data.embedded.pairs=64", "data.embedded.heldout=24", "data.max_prompt_tokens=160",
    "data.max_response_tokens=24", "eval.prompts=12", "eval.points=2", "reward.calibration=16",
    "algo.update.episodes=64", "algo.update.batch=16", "algo.update.minibatches=2",
]  # fmt: skip


def rlhf(folder: Path, *words: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "RLHF_RUNS"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder in which two algorithms were trained with two seeds each, by one command."""
    folder = tmp_path_factory.mktemp("chain")
    words = ["train", "-m", "algo=p3o_v2,ppo", "seed=1,2", *TINY, "track.mode=offline"]
    done = rlhf(folder, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_sweep_builds_one_sft_and_one_reward_model_and_four_rl_runs(swept):
    folder, said = swept
    built = {stage: len(list((folder / "runs" / stage).glob("*"))) for stage in _stages(folder)}
    assert built == {"sft": 1, "reward": 1, "rl": 4}
    assert said.count("\nrun: ") == 4


def _stages(folder: Path) -> list[str]:
    return sorted({run.stage for run in all_runs(folder / "runs")})


def test_every_run_is_whole_and_its_metrics_are_from_the_vocabulary(swept):
    folder, _ = swept
    for run in all_runs(folder / "runs"):
        assert run.status() == "done"
        assert {"metrics.jsonl", "checkpoints/final/model.safetensors"} <= set(
            run.manifest()["outputs"]
        )
    rows = read(next((folder / "runs" / "rl").glob("p3o*")) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert [row["episodes"] for row in rows] == [0, 16, 32, 48, 64]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4)  # the contract's own tolerance
    assert [row["step"] for row in rows if "eval/gold" in row] == [0, 4, 8]


def test_the_untrained_policy_is_measured_alike_whatever_the_algorithm_and_the_seed(swept):
    """Step 0 is the SFT policy on pinned prompts with pinned random numbers: one and the same point."""
    folder, _ = swept
    runs = list((folder / "runs" / "rl").iterdir())
    assert len(runs) == 4
    assert len({(run / "samples" / "000000.jsonl").read_text() for run in runs}) == 1
    assert len({(run / "samples" / "000008.jsonl").read_text() for run in runs}) == 4


def test_the_mirror_leaves_an_offline_run_in_each_run_directory(swept):
    folder, _ = swept
    for path in (folder / "runs" / "rl").iterdir():
        assert list(path.glob("wandb/offline-run-*/run-*.wandb")), path


def test_the_same_command_again_trains_nothing(swept):
    folder, _ = swept
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("metrics.jsonl")}
    done = rlhf(folder, "train", "algo=ppo", "seed=2", *TINY, "track.mode=offline")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith("run: runs/rl/ppo-")
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("metrics.jsonl")}


def test_the_frontier_shows_every_evaluation_and_writes_what_it_plots(swept):
    folder, _ = swept
    done = rlhf(folder, "frontier", "--out", "figures/out")
    assert done.returncode == 0, done.stderr
    for suffix in ("png", "pdf", "json"):
        assert (folder / "figures" / f"out.{suffix}").stat().st_size > 100
    with (folder / "figures" / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["algo"] for row in rows} == {"p3o_v2", "ppo"}
    plotted = next(r for r in rows if r["algo"] == "ppo" and r["seed"] == "2" and r["step"] == "8")
    run = next((folder / "runs" / "rl").glob("ppo*-s2-*"))
    last = read(run / "metrics.jsonl")[-1]
    assert float(plotted["kl"]) == last["eval/kl"]
    assert float(plotted["gold"]) == last["eval/gold"]


def test_runs_and_show_speak_json(swept):
    folder, _ = swept
    listed = json.loads(rlhf(folder, "runs", "--json").stdout)
    assert len(listed) == 6
    key = next((folder / "runs" / "rl").glob("ppo*-s1-*")).name.rsplit("-", 1)[1]
    assert json.loads(rlhf(folder, "show", key, "--json").stdout)["manifest"]["key"] == key


def exit_code(*words: str) -> int:
    """Runs the command in this process."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0)


def test_rl_refuses_to_start_at_a_distance_from_its_reference():
    check_start({"eval/kl": 5e-5, "eval/kl_k3": 0.0})
    with pytest.raises(UserError, match=r"2\.00e-04 nats.*dropout"):
        check_start({"eval/kl": 2e-4, "eval/kl_k3": 0.0})


def test_no_epoch_of_sft_leaves_the_weights_that_the_model_came_with(tmp_path):
    """So that a policy which is fine-tuned already can be started from."""
    done = rlhf(
        tmp_path, "train", "algo=dpo", *TINY, "track=off", "sft.epochs=0", "eval.proxy=false"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = map(Run, (tmp_path / "runs" / "sft").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    given = new_policy(config.recipe(config.compose(TINY)).model, tokenizer).state_dict()
    left = AutoModelForCausalLM.from_pretrained(run.final).state_dict()
    assert given.keys() == left.keys() and all(torch.equal(given[k], left[k]) for k in given)
    (row,) = read(run.metrics_path)
    assert row["step"] == 0 and row["eval/loss"] == pytest.approx(math.log(400), rel=0.02)


def test_two_launched_processes_learn_what_one_learns(tmp_path):
    """SFT through DeepSpeed's launcher with ZeRO 2 on two processes equals the inline run."""
    words = ["train", "stage=sft", *TINY, "track=off", "sft.epochs=1"]
    inline = rlhf(tmp_path, *words, "paths.runs=one")
    launched = rlhf(tmp_path, *words, "paths.runs=two", "launch=deepspeed", "launch.processes=2")
    assert inline.returncode == launched.returncode == 0, launched.stdout + launched.stderr
    (one,) = (tmp_path / "one" / "sft").iterdir()
    (two,) = (tmp_path / "two" / "sft").iterdir()
    assert one.name == two.name
    ours = [row["train/loss"] for row in read(one / "metrics.jsonl")]
    theirs = [row["train/loss"] for row in read(two / "metrics.jsonl")]
    assert len(ours) == 8
    assert theirs == pytest.approx(ours, rel=1e-5)  # fp32 sums in another order
