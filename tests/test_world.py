"""How a run is split up does not change its numbers: processes, ZeRO stages, micro-batches.

The launched side goes through DeepSpeed's real launcher with two gloo processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.engine.world import free_port
from tests.world_script import ALGORITHMS

SCRIPT = Path(__file__).with_name("world_script.py")
RELATIVE = 1e-5
"""Of the losses in fp32: sums in another order, nothing more."""
ADAPTERS = ("0-lora", "1-lora", "2-lora", "3-lora")
PLACED = ("3-layers", "3-layers-sharded", "2-sharded", "0-host", "2-lora-sharded")
OFFLOADED = ("1-optimizer", "2-optimizer", "3-optimizer", "3-all", "3-lora-all")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """What one process and what two processes computed."""
    folder = tmp_path_factory.mktemp("world")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE")}
    one, two = folder / "one.json", folder / "two.json"
    launcher = [
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
        "--master_port", str(free_port()), "--no_local_rank",
    ]  # fmt: skip
    for words in (
        [str(SCRIPT), str(one), "0", "1", "2", "3", *ADAPTERS, *OFFLOADED, *PLACED],
        [*launcher, str(SCRIPT), str(two), "0", "1", "2", "3", *ADAPTERS, *OFFLOADED, *PLACED],
    ):
        done = subprocess.run(
            [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(one.read_text()), json.loads(two.read_text())


def same(ours, theirs) -> None:
    assert len(ours) == len(theirs) == 6
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # A loss may pass near 0, where a relative bound means nothing: its scale is the gradient's.
        assert b["loss"] == pytest.approx(a["loss"], rel=RELATIVE, abs=1e-6), step
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4), step  # see RELATIVE


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_two_processes_equal_one(numbers, algo):
    one, two = numbers
    same(one[f"{algo}-0"], two[f"{algo}-0"])


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_equals_stage_0(numbers, algo, zero):
    for side in numbers:
        same(side[f"{algo}-0"], side[f"{algo}-{zero}"])


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_alone_learn_the_same_in_every_zero_stage(numbers, case):
    for side in numbers:
        same(numbers[0]["p3o_v2-0-lora"], side[f"p3o_v2-{case}"])


@pytest.mark.parametrize("case", PLACED)
def test_models_that_are_gathered_layer_by_layer_say_the_same(numbers, case):
    whole = "p3o_v2-0-lora" if "lora" in case else "p3o_v2-0"
    for side in numbers:
        same(side[whole], side[f"p3o_v2-{case}"])


@pytest.mark.parametrize("case", OFFLOADED)
def test_what_waits_in_the_hosts_memory_learns_the_same(numbers, case):
    whole = "p3o_v2-0-lora" if "lora" in case else "p3o_v2-0"
    for side in numbers:
        same(side[whole], side[f"p3o_v2-{case}"])


def test_processes_that_draw_longer_than_others_do_not_wait_for_ever(numbers):
    _, two = numbers
    (one_before, other_before), (one_after, other_after) = two["uneven"].values()
    assert (len(one_before), len(other_before)) == (12, 12)
    assert one_after == one_before[:1]
    assert other_after == other_before


def test_adapters_alone_learn_otherwise_than_all_weights(numbers):
    one, _ = numbers
    assert one["p3o_v2-0-lora"][-1]["loss"] != pytest.approx(one["p3o_v2-0"][-1]["loss"], rel=1e-3)


def test_micro_batches_of_4_equal_one_of_16(numbers):
    for side in numbers:
        same(side["p3o_v2-0"], side["p3o_v2-0-micro-16"])


def test_the_six_steps_differ_so_that_equal_means_something(numbers):
    one, _ = numbers
    assert len({step["loss"] for step in one["p3o_v2-0"]}) == 6
    assert all(step["grad_norm"] > 1e-4 for step in one["ppo-0"])
