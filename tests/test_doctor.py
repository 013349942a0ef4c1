"""`rlhf doctor`: what is found on this machine, and every fault that can be planted on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_cli import memory
from rlhf_cli.config import compose
from rlhf_cli.doctor import chain, machine, meeting, services
from rlhf_cli.doctor.finding import Finding, picture
from rlhf_cli.models.load import new_policy
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.plan import plan
from rlhf_cli.recipes import Model, Scratch, Track, Tuning
from rlhf_cli.store.run import Run
from tests.conftest import Rlhf

CLOSED = "http://127.0.0.1:9"
"""Where nobody listens."""


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no keys of whoever runs the tests."""
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that load torch are met once, by a test of their own."""
    monkeypatch.setattr(meeting, "meeting", lambda backend, size: Finding(backend, "not tried"))


def one(findings: Any, check: str) -> Finding:
    (found,) = (each for each in findings if each.check == check)
    return found


# --- the whole


def test_the_table_fits_80_columns_and_ends_with_the_count(rlhf: Rlhf, quick: None) -> None:
    code, lines, _ = rlhf("doctor")
    assert code == 0 and max(map(len, lines)) <= 80
    assert lines[0].split() == ["check", "found", "verdict"]
    names = {line.split("  ")[0] for line in lines if line[:1] not in ("", " ")}
    assert names >= {
        "python", "torch", "transformers", "deepspeed", "hydra-core", "wandb", "GPU", "CPU", "memory",
        "open files", "compilers", "clock", "host name", "loopback", "gloo", "runs", "cache",
        "Hugging Face", "W&B", "code",
    }  # fmt: skip
    counted = [sum(line.endswith(f" {word}") for line in lines) for word in ("ok", "note")]
    assert lines[-1] == f"{counted[0]} ok, {counted[1]} note, 0 fault"


def test_json_says_the_same_and_no_secret(
    rlhf: Rlhf, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted0123456789")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    code, lines, err = rlhf("doctor", "--json")
    told = {each["check"]: each for each in json.loads("\n".join(lines))}
    assert code == 0 and set(told["python"]) == {"check", "found", "verdict", "fix"}
    assert "token yes" in told["Hugging Face"]["found"]
    assert told["W&B"]["found"] == "online (track.mode=auto); credentials yes"
    assert "planted" not in "".join(lines) + err and "ffff" not in "".join(lines) + err
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing is left where it was asked


def test_a_fault_is_exit_code_1_and_a_word_that_means_nothing_2(rlhf: Rlhf, quick: None) -> None:
    Path("runs").write_text("a file in the way")
    code, lines, _ = rlhf("doctor")
    assert (code, lines[-1].split(", ")[-1]) == (1, "1 fault")
    assert any(line.endswith(" fault") and line.startswith("runs ") for line in lines)
    code, lines, err = rlhf("doctor", "model=pythia_70mm")
    assert (code, lines) == (2, []) and err.startswith("error: model=pythia_70mm")


def test_a_fix_stands_below_what_it_mends_in_a_narrow_terminal() -> None:
    from rich.console import Console

    console = Console(width=50, force_terminal=False)
    with console.capture() as said:
        console.print(
            picture([Finding("runs", "x: full", "fault", "make room"), Finding("b", "y")])
        )
    lines = [" ".join(line.split()) for line in said.get().splitlines()]
    assert lines == [
        "check found verdict", "runs x: full fault", "-> make room", "b y ok", "", "1 ok, 0 note, 1 fault",
    ]  # fmt: skip


# --- packages


def test_a_package_that_is_missing_or_out_of_range_is_a_fault_with_the_command_that_mends_it() -> (
    None
):
    found = list(
        machine.compared(
            {"torch": ">=2.4", "httpx": "", "omegaconf": "<2.4,>=2.3", "rich": ">=1"},
            {"torch": "2.3.1", "httpx": None, "omegaconf": "2.4.0", "rich": "13.0"},
        )
    )
    assert found == [
        Finding("torch", "2.3.1; >=2.4 is needed", "fault", "pip install 'torch>=2.4'"),
        Finding("httpx", "missing; any version is needed", "fault", "pip install 'httpx'"),
        Finding(
            "omegaconf", "2.4.0; <2.4,>=2.3 is needed", "fault", "pip install 'omegaconf<2.4,>=2.3'"
        ),
        Finding("other packages", "1 within their ranges"),
    ]


def test_a_nightly_of_a_version_in_range_is_in_range() -> None:
    (found, _) = machine.compared({"torch": ">=2.4"}, {"torch": "2.9.0.dev20260101+cu130"})
    assert found.verdict == "ok"


# --- disks, clock, limits


def test_a_folder_that_cannot_be_written_is_named_with_the_key_that_chooses_another(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    (found,) = machine.storage("runs", "paths.runs", tmp_path / "file" / "runs")
    assert (found.verdict, found.fix) == (
        "fault",
        "mend that, or choose another folder with paths.runs=DIR",
    )
    assert found.found == f"{tmp_path}/file/runs: Not a directory"


def test_a_read_only_disk_and_a_full_one_are_faults(tmp_path: Path) -> None:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("NOT TESTED: this machine lets nobody mount a disk")
    try:
        (small,) = machine.storage("runs", "paths.runs", tmp_path)
        assert (small.found, small.verdict) == (f"{tmp_path}: 1 MB free", "fault")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        (shut,) = machine.storage("cache", "paths.cache", tmp_path / "deep" / "down")
        assert (shut.found, shut.verdict) == (
            f"{tmp_path}/deep/down: Read-only file system",
            "fault",
        )
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_clock_before_the_program_was_made_is_a_fault() -> None:
    assert machine.clock(time.time()).verdict == "ok"
    early = machine.clock(1e9)  # 9 September 2001
    assert early.found == "2001-09-09 01:46 UTC, before this program was installed"
    assert early.verdict == "fault"


def test_few_open_files_are_a_note() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from rlhf_cli.doctor import machine\n"
        "print(next(machine.limits(1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        Finding("open files", "256 at once", "note", "ulimit -n 1024")
    )


def test_locked_and_shared_memory_matter_between_several_gpus_alone() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "from rlhf_cli.doctor import machine\n"
        "print(*([f.verdict for f in machine.limits(n) if f.check == 'locked memory'][0] for n in (1, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ok", "note"]


# --- processes that meet


def test_two_processes_meet_and_sum() -> None:
    found = meeting.meeting("gloo", 2)
    assert found.verdict == "ok" and found.found.startswith("2 processes met and summed in ")
    assert meeting.loopback().verdict == "ok"


def test_processes_that_do_not_meet_are_a_fault_and_nobody_is_left_behind() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    late = meeting.meeting("gloo", 2, patience=0.2)
    assert (late.found, late.verdict) == (
        "2 processes did not meet: no answer within 0.2 s",
        "fault",
    )
    assert late.fix == "try GLOO_SOCKET_IFNAME=lo; until then only launch=inline works"
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_backend_that_refuses_gives_its_reason() -> None:
    found = meeting.meeting("none_such", 1)
    assert found.verdict == "fault" and found.found.startswith("one process did not meet: ")
    assert "none_such" in found.found.lower() or "backend" in found.found.lower()


# --- services


def test_a_hub_that_does_not_answer_is_a_note_and_offline_it_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = services.hugging_face()
    assert found.verdict == "note" and found.found.endswith("token no; the hub does not answer")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = services.hugging_face()
    assert offline.verdict == "ok" and offline.found.endswith("offline by HF_HUB_OFFLINE")


def test_wandb_is_online_only_with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Track("wandb", "auto", "rlhf", None)
    assert services.weights_and_biases(on).found == "offline (track.mode=auto); credentials no"
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    assert services.weights_and_biases(on).found == "online (track.mode=auto); credentials yes"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert services.weights_and_biases(on).found == "offline (track.mode=auto); credentials yes"
    assert (
        services.weights_and_biases(Track("off", "auto", "rlhf", None)).found == "off (track=off)"
    )


# --- a chain


def chained(*words: str) -> list[Finding]:
    return list(chain.chain(plan(compose(words))))


def test_the_shipped_chain_fits_on_any_machine(tmp_path: Path) -> None:
    found = chained(f"paths.runs={tmp_path}")
    assert [each.check for each in found] == [
        "chain", "room", "checkpoints", "weights", "tokenizer", "context",
    ]  # fmt: skip
    assert {each.verdict for each in found} == {"ok"}
    assert found[0].found == "sft: build, reward: build, rl: build"
    assert found[5].found == "model: 640 tokens; 96 + 48 are asked for"


def test_a_model_that_is_too_large_for_memory_and_disk_is_two_faults(tmp_path: Path) -> None:
    found = chained("model=pythia_12b", f"paths.runs={tmp_path}")
    room, space = one(found, "room"), one(found, "checkpoints")
    assert (room.verdict, space.verdict) == ("fault", "fault")
    assert room.fix.endswith("launch.zero=3") and space.fix.endswith("paths.runs=DIR")
    # By hand: P3O learns the policy alone; fp32 weights and two moments of 11.8 billion parameters.
    parameters = 11_846_072_320
    sft = 12 * parameters / 1e9
    assert space.found.startswith(f"{sft:,.1f} GB each, checkpoint.keep=2; ")
    weights = one(found, "weights")
    assert weights.verdict == "fault" and "EleutherAI/pythia-12b is no local folder" in weights.fix


def test_what_is_done_already_needs_nothing(tmp_path: Path) -> None:
    words = [f"paths.runs={tmp_path}", "model=pythia_12b", "stage=sft"]
    (step,) = plan(compose(words)).steps
    Run(step.path).begin("stage: sft\n", {})
    Run(step.path).finish()
    found = chained(*words)
    assert found[0].found == "sft: done" and not {"room", "checkpoints"} & {f.check for f in found}


def test_a_parent_that_failed_is_told_with_its_reason(tmp_path: Path) -> None:
    words = [f"paths.runs={tmp_path}"]
    sft = plan(compose(words)).steps[0]
    Run(sft.path).begin("stage: sft\n", {})
    Run(sft.path).fail("the disk was full")
    found = chained(*words)[0]
    assert found == Finding(
        "chain",
        "sft: resume, reward: build, rl: build; sft failed before",
        "note",
        "its reason, should it come again: the disk was full",
    )


def folder(path: Path, **changes: Any) -> list[str]:
    """Words for a chain on a model of one's own; changes: to the settings of its tokenizer."""
    tokenizer = train_tokenizer(["the cat sat"], 300, 512)
    shape = Model(
        "tiny", "nano", Scratch(1, 16, 2, 300, 512, 1), None, None, "fp32", Tuning(None, None)
    )
    new_policy(shape, tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return [
        "model=custom", f"model.name={path}", "data.source=embedded", f"paths.runs={path}/runs",
        "data.max_prompt_tokens=160",
    ]  # fmt: skip


def test_the_tokenizer_of_a_folder_is_looked_into(tmp_path: Path) -> None:
    sound = one(chained(*folder(tmp_path / "sound")), "tokenizer")
    assert sound.found == "model: end '<|end|>', padding '<|pad|>', no start token"
    endless = one(chained(*folder(tmp_path / "endless", eos_token=None)), "tokenizer")
    assert (
        endless.verdict == "fault" and "set eos_token in its tokenizer_config.json" in endless.fix
    )


def test_a_plan_that_is_refused_is_a_fault_beside_all_the_others(
    rlhf: Rlhf, quick: None, tmp_path: Path
) -> None:
    words = folder(tmp_path / "model")
    code, lines, _ = rlhf("doctor", "--json", *words, "data.max_prompt_tokens=600")
    last = json.loads("\n".join(lines))[-1]
    assert (code, last["check"], last["verdict"]) == (1, "plan", "fault")
    assert "reads 512 tokens, fewer than data.max_prompt_tokens=600" in last["fix"]


def test_memory_is_that_of_the_largest_stage_in_each_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chain, "_memory", memory_of(80e9, "GPU"))
    words = ["model=pythia_1b", f"paths.runs={tmp_path}"]
    made = plan(compose(words))
    largest = max(
        memory.of_stage(step.stage, step.recipe, "reward" in step.parents).peak
        for step in made.steps
    )
    room = one(chained(*words), "room")
    assert room.verdict == "ok" and f"about {largest / 1e9:,.1f} GB" in room.found
    monkeypatch.setattr(chain, "_memory", memory_of(largest - 1, "GPU"))
    assert one(chained(*words), "room").verdict == "fault"


def memory_of(size: float, kind: str) -> Callable[[int], tuple[float, str]]:
    return lambda processes: (size, kind)
