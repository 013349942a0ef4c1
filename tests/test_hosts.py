"""Hostfiles, what of them is used, and what a run is told about several hosts."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import ds_config
from rlhf_cli.config import compose, recipe
from rlhf_cli.errors import UserError
from rlhf_cli.hosts import slots, workers
from tests.world_script import a_launch

SEVERAL = "# ours\nworker-0 slots=4\n\nworker-1 slots=2 # the small one\n"


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    file = tmp_path / "hosts"
    file.write_text(SEVERAL)
    return str(file)


def refused(*words: str) -> str:
    """What is said of a launch with these words."""
    with pytest.raises(UserError) as error:
        recipe(compose(["launch=deepspeed", *words]))
    return str(error.value)


# --- hostfiles


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({}, {"worker-0": 4, "worker-1": 2}),
        ({"include": "worker-1"}, {"worker-1": 2}),
        ({"include": "worker-1@worker-0:0,2"}, {"worker-0": 2, "worker-1": 2}),
        ({"exclude": "worker-0"}, {"worker-1": 2}),
        ({"exclude": "worker-0:3@worker-1:0,1"}, {"worker-0": 3}),
    ],
)
def test_slots_are_chosen_as_deepspeed_chooses_them(
    hostfile: str, choice: dict[str, str], left: dict[str, int]
) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion

    launch = a_launch(hostfile=hostfile, **choice)
    assert slots(launch) == left and list(slots(launch)) == list(left)
    assert workers(launch) == sum(left.values())
    words = (choice.get("include", ""), choice.get("exclude", ""))
    theirs: OrderedDict[str, list[int]] = parse_inclusion_exclusion(
        fetch_hostfile(hostfile), *words
    )
    assert {host: len(some) for host, some in theirs.items()} == left


def test_without_a_hostfile_this_host_starts_all() -> None:
    assert slots(a_launch(processes=3)) == {"localhost": 3}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("worker-0\n", " has the line 'worker-0'; each must be `NAME slots=N`, N at least 1."),
        ("a slots=0\n", " has the line 'a slots=0'; each must be `NAME slots=N`, N at least 1."),
        ("a slots=1\na slots=2\n", " names a twice; give it one line."),
        ("# none\n", " names no host; give it a line `NAME slots=N` for each."),
    ],
)
def test_a_hostfile_that_deepspeed_would_refuse_is_refused_in_a_sentence(
    tmp_path: Path, text: str, complaint: str
) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    assert refused(f"launch.hostfile={file}") == f"launch.hostfile={file}{complaint}"


def test_a_hostfile_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert refused(f"launch.hostfile={tmp_path}/none") == (
        f"launch.hostfile={tmp_path}/none cannot be read (No such file or directory); name a file with a line"
        " `NAME slots=N` for each host."
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["launch.include=worker-2"],
            "launch.include=worker-2 names worker-2, but the hostfile has worker-0, worker-1; choose among"
            " these.",
        ),
        (
            ["launch.exclude='worker-1:2'"],
            "launch.exclude=worker-1:2 names slot 2 of worker-1, which has 0 to 1; choose among these.",
        ),
        (
            ["launch.include='worker-1:a'"],
            "launch.include=worker-1:a is not allowed; write HOST:SLOT,SLOT@HOST, as host:0,1.",
        ),
        (
            ["launch.include=worker-0", "launch.exclude=worker-1"],
            "launch.include=worker-0 and launch.exclude=worker-1 exclude each other; leave one of them out.",
        ),
        (
            ["launch.node_rank=1"],
            "launch.node_rank=1 is for launch.no_ssh=true alone; leave it out.",
        ),
        (
            ["launch.no_ssh=true", "launch.node_rank=0", "launch.master_addr=a"],
            "launch.no_ssh=true needs launch.master_port, a free port of the first host; give the same"
            " command on every host but for its node_rank.",
        ),
        (
            [
                "launch.no_ssh=true",
                "launch.node_rank=2",
                "launch.master_addr=a",
                "launch.master_port=29500",
            ],
            "launch.node_rank=2 must be less than the 2 hosts in use; count them from 0.",
        ),
    ],
)
def test_what_hosts_cannot_do_is_said(hostfile: str, words: list[str], complaint: str) -> None:
    # 6 workers, as many as divide the batches
    even = ["algo.update.batch=768", "algo.update.episodes=3072", "sft.batch=48", "reward.batch=48"]
    assert refused(f"launch.hostfile={hostfile}", *even, *words) == complaint


@pytest.mark.parametrize(
    "word",
    [
        "launch.include=a",
        "launch.exclude=a",
        "launch.no_ssh=true",
        "launch.node_rank=0",
        "launch.master_addr=a",
    ],
)
def test_what_is_said_of_hosts_without_a_hostfile_is_refused(word: str) -> None:
    assert refused(word) == f"{word} has no effect without a hostfile; add launch.hostfile=FILE."


def test_a_batch_is_dealt_out_to_the_workers_of_all_hosts(hostfile: str) -> None:
    assert refused(f"launch.hostfile={hostfile}", "sft.batch=32", "algo.update.batch=768") == (
        "sft.batch=32 cannot be dealt out evenly to 6 processes; set sft.batch=30."
    )


# --- offloading


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["launch.zero=0", "launch.offload=optimizer"],
            "launch.offload=optimizer needs launch.zero=1 or more, not 0; set launch=deepspeed"
            " launch.zero=1.",
        ),
        (
            ["launch.offload=all"],
            "launch.offload=all needs launch.zero=3, not 2; set launch=deepspeed launch.zero=3.",
        ),
    ],
)
def test_what_zero_does_not_shard_is_not_offloaded(words: list[str], complaint: str) -> None:
    assert refused(*words) == complaint


# --- DeepSpeed's own settings


def settings(tmp_path: Path, said: Any) -> str:
    file = tmp_path / "ds.json"
    file.write_text(said if isinstance(said, str) else json.dumps(said))
    return str(file)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (
            {"train_batch_size": 64},
            " sets train_batch_size, which algo.update.batch, sft.batch and reward.batch set; leave it out of"
            " the file.",
        ),
        (
            {"optimizer": {"type": "Adam"}},
            " sets optimizer, which algo.optim, sft.optim and reward.optim set; leave it out of the file.",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            ' sets zero_optimization.reduce_bucket_size to "auto", which only trainers that fill it in know;'
            " give a number.",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            " sets zero_optimization.stage=3, but launch.zero=2; set launch.zero=3.",
        ),
        (
            {"bf16": {"enabled": True}},
            " sets bf16.enabled=true, but model.precision=fp32; let the two say the same.",
        ),
        ("[1]", " holds no settings; it must be a JSON object."),
    ],
)
def test_a_file_may_not_say_what_the_run_says(tmp_path: Path, said: Any, complaint: str) -> None:
    file = settings(tmp_path, said)
    assert refused(f"launch.ds_config={file}") == f"launch.ds_config={file}{complaint}"


def test_a_file_that_is_no_json_is_refused_with_the_place(tmp_path: Path) -> None:
    file = settings(tmp_path, "{")
    assert refused(f"launch.ds_config={file}") == (
        f"launch.ds_config={file} is no JSON (Expecting property name enclosed in double quotes: line 1"
        " column 2 (char 1)); mend it."
    )


def test_what_a_file_says_stands_beside_what_the_run_says(tmp_path: Path) -> None:
    file = settings(
        tmp_path, {"zero_optimization": {"stage": 2, "overlap_comm": True}, "dump_state": True}
    )
    assert (
        recipe(compose(["launch=deepspeed", f"launch.ds_config={file}"])).launch.ds_config == file
    )
    ours = {"zero_optimization": {"stage": 2, "a": 1}, "gradient_clipping": 1.0}
    assert ds_config.merged(ours, ds_config.read(file)) == {
        "zero_optimization": {"stage": 2, "a": 1, "overlap_comm": True},
        "gradient_clipping": 1.0,
        "dump_state": True,
    }
