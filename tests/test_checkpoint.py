"""Checkpoints: what goes on from one is what had not stopped, to the last bit, or does not go on at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_cli.engine import checkpoint, masters
from rlhf_cli.engine.world import free_port, start
from rlhf_cli.errors import UserError
from tests.checkpoint_script import NAMES, go_on, learner

SCRIPT = Path(__file__).with_name("checkpoint_script.py")


def ran(processes: int, *words: str) -> dict[str, list[str]]:
    """What the script finds in so many processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment = {k: v for k, v in environment.items() if k not in ("RANK", "WORLD_SIZE")}
    launcher = [
        "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes),
        "--master_port", str(free_port()), "--no_local_rank",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *words],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(Path(words[0], "out.json").read_text())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """The checkpoints of two processes, and how these went on."""
    folder = tmp_path_factory.mktemp("two")
    return folder, ran(2, str(folder))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_go_on_as_if_they_had_not_stopped(
    two: tuple[Path, dict[str, list[str]]], name: str
) -> None:
    saved, gone_on, *resumed = two[1][name]
    assert saved != gone_on and resumed == [saved, gone_on]


def test_one_process_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    for saved, gone_on, *resumed in ran(1, str(tmp_path)).values():
        assert saved != gone_on and resumed == [saved, gone_on]


def test_one_process_reads_what_two_have_written(
    two: tuple[Path, dict[str, list[str]]], tmp_path: Path
) -> None:
    found = ran(1, str(tmp_path), str(two[0]))
    assert {name: read for name, (read, _) in found.items()} == {
        name: saved for name, (saved, *_) in two[1].items()
    }


def test_a_checkpoint_is_tensors_and_json_alone(two: tuple[Path, dict[str, list[str]]]) -> None:
    for name in NAMES:
        (kept,) = checkpoint.whole(two[0] / name)
        assert {file.name for file in kept.iterdir()} == {
            "learner-00001.safetensors",
            "state.safetensors",
            "place.json",
        }
        tensors = load_file(kept / "learner-00001.safetensors")
        assert {"weight/0.weight", "exp_avg/2.bias", "exp_avg_sq/2.bias", "steps"} <= tensors.keys()
        assert "exp_avg/3.weight" not in tensors  # it does not learn
        assert tensors["weight/3.weight"].shape == (3, 3)
        assert tensors["steps"] == 3


def saved(folder: Path) -> None:
    """Checkpoints after steps 1, 2 and 3, of which the oldest goes."""
    world = start(60)
    one = learner(world, 0, "fp32", "none", 0)
    for _ in range(3):
        go_on(one, world, 1)
        checkpoint.save(folder, one, world, {}, {}, keep=2)


def test_the_two_newest_stay(tmp_path: Path) -> None:
    saved(tmp_path)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["000002", "000003"]
    assert not list(tmp_path.glob(".*"))


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["learner-00001.safetensors", "state.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated", "one bit flipped"])
def test_a_damaged_part_stops_a_resume_with_its_name_and_the_way_out(
    tmp_path: Path, name: str, how: str, fault: Callable[..., None]
) -> None:
    saved(tmp_path)
    newest = tmp_path / "000003"
    spoil(newest / name, how)
    resumed = learner(start(60), 0, "fp32", "none", 1)
    with pytest.raises(UserError) as refused:
        checkpoint.resume(tmp_path, resumed)
    found = "is missing" if how == "missing" else "is not as it was written"
    assert str(refused.value) == (f"{newest / name} {found}; delete {newest} to go on from 000002.")
    assert resumed.step_index == 0
    fault(
        f"{name} of the newest checkpoint is damaged: {how}",
        "named with the way out; nothing is loaded, the one before stays",
        lost="the steps since the checkpoint before",
    )


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_without_an_earlier_one_the_way_out_is_to_begin_again(
    tmp_path: Path, how: str, fault: Callable[..., None]
) -> None:
    saved(tmp_path)
    (older, newest) = checkpoint.whole(tmp_path)
    older.rename(tmp_path / "aside")
    spoil(newest / "place.json", how)
    with pytest.raises(UserError) as refused:
        checkpoint.resume(tmp_path, learner(start(60), 0, "fp32", "none", 1))
    assert str(refused.value) == (
        f"{newest / 'place.json'} is damaged or missing; delete {newest} to begin the run again."
    )
    fault(
        f"place.json of the only checkpoint is damaged: {how}",
        "named with the way out; a run never begins again unasked",
        lost="all steps",
    )


def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    one = learner(start(60), 0, "fp32", "none", 0)
    checkpoint.resume(tmp_path, one)
    go_on(one, start(60), 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"^cannot write .*000004.*disk.*full"):
        checkpoint.save(tmp_path, one, start(60), {}, {}, keep=2)
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["000002", "000003"]


def test_the_first_step_is_adams_first_in_every_precision() -> None:
    """Adam's first step moves a weight by the rate, whatever wrapper made room for its moments before."""
    world = start(60)
    for precision in ("fp32", "bf16"):
        one = learner(world, 0, precision, "none", 0)
        kept = [dict(masters.gathered(one.engine, 0))]
        go_on(one, world, 1)
        kept.append(dict(masters.gathered(one.engine, 0)))
        before, after = (each["weight/2.bias"] for each in kept)
        assert (after - before).abs().tolist() == pytest.approx([1e-2] * 3, rel=0.02), precision
