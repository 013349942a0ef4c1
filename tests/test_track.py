"""The W&B mirror, read back from what an offline run leaves, and what it does when W&B fails."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from rlhf_cli.recipes import Track
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.track import Mirror, open_mirror

OFFLINE = Track(kind="wandb", mode="offline", project="rlhf", group=None)
AUTO = Track(kind="wandb", mode="auto", project="rlhf", group=None)


@pytest.fixture(autouse=True)
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials and no settings but the test's own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def opened(track: Track, path: Path) -> Mirror:
    """A mirror of a run as the stages would open it."""
    return open_mirror(
        track,
        path,
        name="p3o_v2-hh_embedded-nano-s1",
        key="0123456789",
        group="hh_embedded-nano",
        job_type="rl",
        tags=["p3o_v2", "nano"],
        config={"algo": {"beta": 0.1}, "seed": 1},
    )


def records(path: Path) -> Iterator[Record]:
    """Every record of the one offline run below `path`.

    The file is a LevelDB log: blocks of 32 KiB, the first with a header of 7 bytes, then chunks of
    crc (4 bytes), length (2), type (1; 1 whole, 2 first, 3 middle, 4 last) and payload.
    """
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left for a chunk: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished(path: Path) -> list[Record]:
    """The records of a finished run; W&B's writer closes the file some milliseconds after us."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        held = list(records(path))
        if any(record.HasField("exit") for record in held):
            return held
        time.sleep(0.02)
    raise TimeoutError(f"no finished run below {path}")


def values(items: Any) -> dict[str, Any]:
    """The key-value pairs of a record; nested keys are joined by dots."""
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def test_a_relative_run_directory_is_ours_even_if_the_service_started_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A W&B service outlives the run that started it, and resolves paths where it was started."""
    opened(OFFLINE, tmp_path / "first").finish(0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    mirror = opened(OFFLINE, Path("second"))
    mirror.log({"step": 0, "episodes": 0})
    mirror.finish(0)
    assert finished(elsewhere / "second")


def test_an_offline_run_holds_config_history_chart_samples_and_summary(tmp_path: Path) -> None:
    mirror = opened(OFFLINE, tmp_path)
    mirror.log({"step": 0, "episodes": 0, "eval/kl": 0.0, "eval/reward": 0.5})
    mirror.samples(0, [{"prompt": "Hi", "response": " Yo", "score": 1.5, "kl": 0.25}])
    mirror.log({"step": 1, "episodes": 64, "train/loss": 0.75})
    mirror.log({"step": 2, "episodes": 128, "eval/kl": 3.0, "eval/reward": 1.5})
    mirror.finish(0)
    held = finished(tmp_path)

    (run,) = [r.run for r in held if r.HasField("run")][:1]
    assert (run.run_id, run.project, run.run_group) == ("0123456789", "rlhf", "hh_embedded-nano")
    assert (run.display_name, run.job_type) == ("p3o_v2-hh_embedded-nano-s1", "rl")
    assert list(run.tags) == ["p3o_v2", "nano"]
    config = values(run.config.update)
    assert config["algo"] == {"beta": 0.1} and config["seed"] == 1

    history = [values(r.history.item) for r in held if r.HasField("history")]
    logged = [{n: v for n, v in row.items() if not n.startswith("_")} for row in history]
    assert {"step": 1, "episodes": 64, "train/loss": 0.75} in logged
    assert {"step": 2, "episodes": 128, "eval/kl": 3.0, "eval/reward": 1.5} in logged
    steps = [r.metric for r in held if r.HasField("metric")]
    assert ("*", "episodes") in {(m.glob_name, m.step_metric) for m in steps}

    assert table(tmp_path, "samples")["data"] == [["Hi", " Yo", 1.5, None, 0.25]]
    chart = table(tmp_path, "kl_reward_table")
    assert chart["columns"] == ["eval/kl", "eval/reward"]
    assert chart["data"] == [[0.0, 0.5], [3.0, 1.5]]
    summary: dict[str, Any] = {}
    for record in held:
        summary |= values(record.summary.update)
    assert (summary["step"], summary["episodes"], summary["train/loss"]) == (2, 128, 0.75)
    assert [r.exit.exit_code for r in held if r.HasField("exit")] == [0]


def table(path: Path, name: str) -> Any:
    """The last table logged under a name."""
    files = path.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(max(files, key=lambda file: file.stat().st_mtime_ns).read_text())


def test_a_resumed_run_keeps_its_id_and_the_points_of_earlier_segments(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "metrics.jsonl")
    ledger.write({"step": 0, "eval/kl": 0.0, "eval/reward": 0.25})
    ledger.write({"step": 1, "train/loss": 1.0})
    ledger.write({"step": 2, "eval/kl": 1.0, "eval/reward": float("nan")})
    mirror = opened(OFFLINE, tmp_path)
    mirror.log({"step": 4, "episodes": 256, "eval/kl": 2.0, "eval/reward": 0.75})
    mirror.finish(0)
    assert {r.run.run_id for r in finished(tmp_path) if r.HasField("run")} == {"0123456789"}
    assert table(tmp_path, "kl_reward_table")["data"] == [[0.0, 0.25], [2.0, 0.75]]


def test_off_writes_nothing_and_does_not_even_import_wandb(tmp_path: Path, root: Path) -> None:
    code = f"""
import sys
import time
from pathlib import Path
from rlhf_cli.recipes import Track
from rlhf_cli.track import open_mirror
track = Track(kind="off", mode="auto", project="p", group=None)
path = Path({str(tmp_path)!r})
m = open_mirror(track, path, name="n", key="k", group="g", job_type="rl", tags=[], config={{}})
m.log({{"step": 0, "eval/kl": 0.0, "eval/reward": 1.0}}), m.samples(0, []), m.finish(0)
print("wandb" in sys.modules, list(path.iterdir()))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False []"


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What is said to the user."""
    return [record for record in caplog.records if record.name == "rlhf_cli.track"]


class Broken:
    """A W&B run that fails at everything."""

    def log(self, row: object) -> None:
        raise OSError("no space\n left")

    def finish(self, exit_code: int) -> None:
        raise AssertionError("a mirror that is off must not be finished")


def test_a_failure_while_logging_is_said_once_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror = Mirror(Broken)
    for step in range(3):
        mirror.log({"step": step, "episodes": step, "eval/kl": 0.0, "eval/reward": 0.0})
        mirror.samples(step, [{"prompt": "p"}])
    mirror.finish(1)
    (record,) = ours(caplog)
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "W&B is off for the rest of this run; metrics.jsonl is complete (no space left)"
    )


def test_a_failure_at_the_start_gives_a_mirror_that_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> None:
        raise wandb.Error("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    mirror = opened(AUTO, tmp_path)
    mirror.log({"step": 0, "episodes": 0})
    mirror.finish(0)
    assert [r.getMessage().endswith("(no route to host)") for r in ours(caplog)] == [True]


@pytest.mark.parametrize(
    ("track", "environment", "netrc", "expected"),
    [
        (AUTO, {}, "", "offline"),
        (AUTO, {"WANDB_API_KEY": "x" * 40}, "", "online"),
        (AUTO, {"WANDB_MODE": "online"}, "", "offline"),
        (AUTO, {}, "machine api.wandb.ai login user password key\n", "online"),
        (AUTO, {}, "machine example.org login user password key\n", "offline"),
        (AUTO, {}, "what is this", "offline"),
        (AUTO, {"WANDB_BASE_URL": "https://wb.example.org"}, "machine wb.example.org\n", "online"),
        (AUTO, {"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        (AUTO, {"WANDB_MODE": "disabled"}, "", "disabled"),
        (OFFLINE, {"WANDB_API_KEY": "x" * 40}, "", "offline"),
    ],
)
def test_only_credentials_that_are_already_there_take_a_run_online(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    track: Track,
    environment: dict[str, str],
    netrc: str,
    expected: str,
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: dict[str, Any] = {}

    def note(**settings: Any) -> None:
        asked.update(settings)
        raise wandb.Error("far enough")

    monkeypatch.setattr(wandb, "init", note)
    opened(track, tmp_path).finish(0)
    assert asked["mode"] == expected
    assert asked["id"] == "0123456789" and asked["resume"] == "allow"
    assert asked["dir"] == str(tmp_path)
