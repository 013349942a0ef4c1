"""What a disk may do to a run: full, read-only, damaged, bare of what was there; and a clock that is set.

Every fault is a real one: a file system of its own that fills up at the moment in question or cannot be
written, bytes that are changed or gone. The command is given in this process, as a user would.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlhf_cli import worker
from rlhf_cli.cli import main
from rlhf_cli.engine import checkpoint
from rlhf_cli.engine.stop import DEADLINE
from rlhf_cli.errors import UserError
from rlhf_cli.store.files import disk as on_disk
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests import small_disk
from tests.test_chain import TINY, rlhf

Fault = Callable[..., None]
SFT = ["train", *TINY, "track=off", "stage=sft", "sft.epochs=4"]
"""32 steps, evaluated after 16 and 32."""
RL = ["train", *TINY, "track=off", "algo=ppo", "sft.epochs=4"]
WEIGHTS = "checkpoints/final/model.safetensors"
MOUNTS = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(not MOUNTS, reason="may not mount file systems here")


@dataclass(frozen=True)
class Said:
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture
def given(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Gives a command in this process."""
    monkeypatch.setenv(DEADLINE, "inf")
    monkeypatch.delenv(DEADLINE)  # put back as it was, whatever the command sets

    def run(*words: str) -> Said:
        os.environ.pop(DEADLINE, None)
        with pytest.raises(SystemExit) as left:
            main(list(words))
        return Said(int(left.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a chain that nobody disturbed."""
    folder = tmp_path_factory.mktemp("twin")
    with pytest.raises(SystemExit) as left:
        main([*RL, f"paths.runs={folder}"])
    assert not left.value.code
    return folder


def of(runs: Path, stage: str) -> Run:
    (path,) = (runs / stage).iterdir()
    return Run(path)


def copied(store: Path, runs: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(store / stage, runs / stage)
    return runs


def mounted(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True
    )


@pytest.fixture(scope="module")
def trigger() -> small_disk.Trigger:
    return small_disk.Trigger()


@pytest.fixture
def disk(tmp_path: Path, trigger: small_disk.Trigger) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    mounted(folder, "size=64m")
    yield folder
    trigger.event = ""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def left_over(folder: Path) -> list[str]:
    """Names of things that were never finished."""
    found = [path.name for path in folder.rglob("*")]
    return [name for name in found if name.endswith((".tmp", ".part", ".partial"))]


def goes_on(said: Said, run: Run, store: Path) -> None:
    """The same command has ended it, and what it has learned is what its twin has."""
    assert said.code == 0, said.err
    twin = of(store, run.stage)
    assert run.path.name == twin.path.name and run.status() == "done"
    assert run.manifest()["outputs"][WEIGHTS] == twin.manifest()["outputs"][WEIGHTS]
    ours, theirs = read(run.metrics_path), read(twin.metrics_path)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row.get("train/loss") for row in ours] == [row.get("train/loss") for row in theirs]


# --- full


FULL = {
    # stage, event, part of the path, times to let it pass; what cannot be written; its newest checkpoint
    "the configuration": ("sft", "open", ".config.yaml.", 0, "config.yaml", None),
    "a checkpoint": ("sft", "os.mkdir", ".000032.partial", 0, "checkpoints/000032", "000016"),
    "a row of metrics": ("sft", "open", "metrics.jsonl", 20, "metrics.jsonl", "000016"),
    "the final model": ("sft", "os.mkdir", ".final.partial", 0, "checkpoints/final", "000032"),
    "the end of the manifest": ("sft", "os.rename", ".final.part", 0, "manifest.json", "000032"),
    "the samples": ("rl", "open", ".000008.jsonl.", 0, "samples/000008.jsonl", "000004"),
}


@needs_mounts
@pytest.mark.faults
@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_it_goes_on_with_room(
    what: str, disk: Path, store: Path, given: Callable[..., Said],
    trigger: small_disk.Trigger, fault: Fault,
) -> None:  # fmt: skip
    stage, event, part, skip, name, newest = FULL[what]
    runs = disk / "runs"
    if stage == "rl":
        copied(store, runs, "sft", "reward")
    words = [*(SFT if stage == "sft" else RL), f"paths.runs={runs}", "checkpoint.every=1000"]
    trigger.set(event, part, disk, skip)
    said = given(*words)
    assert not trigger.event, "the disk was never filled"
    assert said.code == 2
    run = of(runs, stage)
    (sentence,) = said.err.splitlines()
    assert re.fullmatch(
        rf"error: cannot write {re.escape(str(run.path / name))}: the disk is full"
        r" \(0\.\d MB are left(, about \d+\.\d MB are needed)?\); mend that, or choose another folder with"
        r" paths\.runs=DIR\.",
        sentence,
    ), sentence
    assert ("needed" in sentence) == (name.startswith("checkpoints"))
    assert run.status() in ("interrupted", "failed", "missing") and not left_over(runs)
    whole = checkpoint.whole(run.checkpoints)
    assert [path.name for path in whole[-1:]] == ([newest] if newest else [])
    for each in whole:
        assert checkpoint._checked(each, [])["step"] == int(each.name)
    small_disk.clear(disk)
    goes_on(given(*words), run, store)
    fault(
        f"the disk fills up under {what}",
        "one sentence, exit code 2, the last checkpoint whole; with room, the same command ends it like its"
        " twin",
        lost="the steps since the last checkpoint" if newest in ("000004", "000016") else "nothing",
    )


@needs_mounts
@pytest.mark.faults
def test_two_launched_processes_tell_of_a_full_disk_on_a_full_disk(
    disk: Path, tmp_path: Path, store: Path, given: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch, fault: Fault,
) -> None:  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(small_disk.SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(small_disk.VARIABLE, f"open .000016.partial/place.json {disk}")
    runs = disk / "runs"
    two = ["launch=deepspeed", "launch.processes=2"]
    said = rlhf(tmp_path, *SFT, f"paths.runs={runs}", *two)
    run = of(runs, "sft")
    last = said.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {run.path}/checkpoints/000016: the disk is full")
    assert said.returncode == 2 and run.status() in ("failed", "interrupted")
    assert not left_over(run.checkpoints) and not checkpoint.whole(run.checkpoints)
    small_disk.clear(disk)
    goes_on(given(*SFT, f"paths.runs={runs}"), run, store)  # from its beginning, by one process
    fault(
        "the disk fills up while two launched processes make a checkpoint",
        "the same sentence and exit code 2: room for it is set aside; the same command goes on",
        lost="the steps since the last checkpoint",
    )


@needs_mounts
@pytest.mark.faults
def test_a_cache_that_fills_up_is_named_with_its_key(
    disk: Path, tmp_path: Path, store: Path, given: Callable[..., Said],
    trigger: small_disk.Trigger, fault: Fault,
) -> None:  # fmt: skip
    words = [*SFT, f"paths.runs={tmp_path / 'runs'}", f"paths.cache={disk}"]
    trigger.set("os.mkdir", ".part", disk)
    said = given(*words)
    assert said.code == 2
    assert re.fullmatch(
        rf"error: cannot write {disk}/tokens/\w+: the disk is full \(0\.\d MB are left\); mend that, or"
        r" choose another folder with paths\.cache=DIR\.\n",
        said.err,
    ), said.err
    assert not left_over(disk)
    small_disk.clear(disk)
    goes_on(given(*words), of(tmp_path / "runs", "sft"), store)
    fault(
        "the disk of the cache fills up while rows are encoded",
        "one sentence with paths.cache, exit code 2, no half cache; with room, the same command ends it",
    )


@needs_mounts
@pytest.mark.faults
def test_a_disk_with_too_little_room_is_refused_before_any_work(
    disk: Path, given: Callable[..., Said], fault: Fault
) -> None:
    small_disk.fill(disk, left=30 * 2**20)
    said = given(*SFT, f"paths.runs={disk / 'runs'}")
    assert said.code == 2 and "MB of disk left, a run needs at least 50 MB" in said.err
    assert list((disk / "runs").iterdir()) == []
    fault("less than 50 MB are free where runs are kept", "refused before any work, exit code 2")


@needs_mounts
@pytest.mark.faults
def test_a_log_that_fills_up_ends_and_says_so_once(
    disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger("rlhf_cli.track"), "handlers", [])
    worker._log_to(disk / "log" / "rank_0.txt")
    root.warning("room for this")
    small_disk.fill(disk)
    for _ in range(50):
        root.warning("x" * 1000)
    assert capfd.readouterr().err == (
        f"warning: {disk}/log/rank_0.txt ends here: No space left on device\n"
    )
    assert "room for this" in (disk / "log" / "rank_0.txt").read_text()
    worker._log_to(disk / "log" / "rank_0.txt")  # as the next stage does, with the disk still full
    logging.captureWarnings(False)
    root.handlers[0].close()
    fault("the disk fills up under a log", "the log ends, which is said once; the run goes on")


def test_a_file_that_may_grow_no_further_is_told_like_a_full_disk(
    tmp_path: Path, fault: Fault
) -> None:
    """The limit on the size of files (`ulimit -f`), which needs no mount."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from rlhf_cli.store.files import atomic_write; from rlhf_cli.errors import UserError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic_write(Path('file'), bytes(2000))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == (
        "cannot write file: the file is larger than is allowed here (`ulimit -f`); mend that, or choose"
        " another folder with paths.runs=DIR.\n"
    ), done.stderr
    assert not list(tmp_path.iterdir())
    fault("a file meets the limit on its size", "one sentence, exit code 2, no half file")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("Not enough free space to write 16777216 bytes after offset 128"),
        OSError("2048 requested and 1008 written"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_every_library_s_way_to_say_that_the_disk_is_full_is_understood(
    tmp_path: Path, error: Exception
) -> None:
    """As Python, numpy (twice) and the libraries in Rust have been seen to word it."""
    with pytest.raises(UserError) as told, on_disk(tmp_path / "file"):
        raise error
    assert str(told.value).startswith(f"cannot write {tmp_path / 'file'}: the disk is full")


# --- read-only


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    folder = tmp_path / "read-only"
    mounted(folder, "size=64m")

    def freeze(source: Path | None) -> Path:
        if source is not None:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return folder

    yield freeze  # type: ignore[misc]
    subprocess.run(["umount", "-l", str(folder)], check=True)


@needs_mounts
@pytest.mark.faults
def test_a_read_only_runs_folder_is_refused_before_any_work_and_can_be_read(
    read_only: Callable[[Path | None], Path], store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    folder = read_only(store)
    said = given(*RL, "seed=2", f"paths.runs={folder}")
    assert said.code == 2
    (sentence,) = said.err.splitlines()
    assert sentence.startswith(f"error: cannot write {folder}")
    assert sentence.endswith(
        ": the file system is read-only; mend that, or choose another folder with paths.runs=DIR."
    )
    listed = given("runs", "--runs", str(folder), "--json")
    assert listed.code == 0 and listed.out.count('"status": "done"') == 3
    fault("the folder of runs is read-only", "refused before any work, exit code 2; it can be read")


@needs_mounts
@pytest.mark.faults
def test_a_read_only_cache_is_refused_unless_it_has_what_is_read(
    read_only: Callable[[Path | None], Path], tmp_path: Path, store: Path,
    given: Callable[..., Said], fault: Fault,
) -> None:  # fmt: skip
    warm = tmp_path / "warm"
    made = [*SFT, f"paths.runs={tmp_path / 'other'}", f"paths.cache={warm}"]
    assert given(*made).code == 0
    folder = read_only(warm)
    words = [*SFT, f"paths.cache={folder}"]
    goes_on(given(*words, f"paths.runs={tmp_path / 'runs'}"), of(tmp_path / "runs", "sft"), store)
    said = given(*words, "data.max_response_tokens=20", f"paths.runs={tmp_path / 'colder'}")
    assert said.code == 2
    assert re.fullmatch(
        rf"error: cannot write {folder}/tokens/\w+: the file system is read-only; mend that, or choose"
        r" another folder with paths\.cache=DIR\.\n",
        said.err,
    ), said.err
    fault(
        "the cache is read-only",
        "used where it has the rows; otherwise one sentence with paths.cache, exit code 2",
    )


# --- damaged


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + flipped + content[middle + 1 :])


DAMAGE = ("deleted", "emptied", "truncated", "one bit flipped")


@pytest.mark.parametrize("how", DAMAGE)
def test_nothing_is_trained_from_a_parent_whose_weights_are_others_than_it_left(
    how: str, tmp_path: Path, store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    runs = copied(store, tmp_path / "runs", "sft", "reward")
    parent = of(runs, "sft")
    spoil(parent.path / WEIGHTS, how)
    said = given(*RL, f"paths.runs={runs}")
    found = "is missing" if how == "deleted" else "is not as it was written"
    assert (said.code, said.err) == (
        2,
        f"error: {parent.path / WEIGHTS} {found}, by the digest in manifest.json; copy it back, or delete"
        f" {parent.path} and give its command again to have it built anew.\n",
    )
    assert not (runs / "rl").exists()
    fault(
        f"the SFT policy's weights are {how} before RL starts".replace("are one", "have one"),
        "named with the way out, exit code 2; nothing is trained from them",
    )


@pytest.mark.parametrize(
    "how",
    ["emptied", "truncated", "one bit flipped", pytest.param("deleted", marks=pytest.mark.faults)],
)
def test_a_parent_s_damaged_manifest_is_named_and_a_missing_one_is_made_anew(
    how: str, tmp_path: Path, store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    runs = copied(store, tmp_path / "runs", "sft", "reward")
    parent = of(runs, "sft")
    if how == "one bit flipped":  # in the word that everything hangs on
        text = parent.manifest_path.read_text()
        assert text.count('"status": "done"') == 1
        parent.manifest_path.write_text(text.replace('"status": "done"', '"status": "dooe"'))
    else:
        spoil(parent.manifest_path, how)
    said = given(*RL, f"paths.runs={runs}")
    if how == "deleted":
        goes_on(said, of(runs, "rl"), store)
        fault("a parent's manifest is deleted", "the parent is built again, and like its twin")
        return
    assert said.code == 2
    assert said.err == (
        f"error: {parent.manifest_path} is damaged (not a JSON object with a status); delete {parent.path}"
        " and run the same command again to rebuild it.\n"
    )
    fault(f"a parent's manifest: {how}", "named with the way out, exit code 2")


def test_a_manifest_without_weights_is_no_parent(tmp_path: Path, store: Path) -> None:
    parent = of(copied(store, tmp_path / "runs", "sft"), "sft")
    parent.update(outputs={})
    with pytest.raises(UserError) as refused:
        parent.check_final()
    assert str(refused.value) == (
        f"{parent.manifest_path} lists no weights; delete {parent.path} and give its command again to have it"
        " built anew."
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a chain that was stopped in its SFT stage after step 16 of 32."""
    from rlhf_cli.stages.context import Context

    folder = tmp_path_factory.mktemp("stopped")
    patch = pytest.MonkeyPatch()
    report = Context.report

    def stop(self: Context, step: int, *rest: object) -> None:
        if step == 18:
            raise KeyboardInterrupt
        report(self, step, *rest)  # type: ignore[arg-type]

    patch.setattr(Context, "report", stop)
    with pytest.raises(SystemExit) as left:
        main([*SFT, f"paths.runs={folder}"])
    patch.undo()
    assert left.value.code == 130
    assert [path.name for path in checkpoint.whole(of(folder, "sft").checkpoints)] == ["000016"]
    assert of(folder, "sft").status() == "interrupted"
    return folder


@pytest.mark.parametrize("how", DAMAGE)
def test_a_frozen_configuration_is_written_anew_by_the_same_command(
    how: str, tmp_path: Path, stopped: Path, store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    run = of(copied(stopped, tmp_path / "runs", "sft"), "sft")
    spoil(run.config_path, how)
    goes_on(given(*SFT, f"paths.runs={tmp_path / 'runs'}"), run, store)
    assert run.manifest()["segment"] == 2
    fault(f"config.yaml of a stopped run: {how}", "written anew; the run ends like its twin")


def test_what_a_power_cut_tears_off_the_metrics_is_dropped(
    tmp_path: Path, stopped: Path, store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    for tail in (b'{"step": 18, "train/lo', b"\0" * 512):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        run = of(copied(stopped, tmp_path / "runs", "sft"), "sft")
        with run.metrics_path.open("ab") as file:
            file.write(tail)
        goes_on(given(*SFT, f"paths.runs={tmp_path / 'runs'}"), run, store)
    fault(
        "a power cut tears the last line of metrics.jsonl",
        "the line is dropped; the run ends like its twin",
        lost="the steps since the last checkpoint",
    )


@pytest.mark.parametrize("bit", [1, 128])
def test_a_damaged_line_further_up_is_named_with_its_number(
    bit: int, tmp_path: Path, stopped: Path, given: Callable[..., Said], fault: Fault
) -> None:
    run = of(copied(stopped, tmp_path / "runs", "sft"), "sft")
    lines = run.metrics_path.read_bytes().split(b"\n")
    lines[4] = bytes([lines[4][0] ^ bit]) + lines[4][1:]  # { becomes z, or no character at all
    run.metrics_path.write_bytes(b"\n".join(lines))
    said = given(*SFT, f"paths.runs={tmp_path / 'runs'}")
    assert (said.code, said.err) == (
        2,
        f"error: {run.metrics_path}:5 is not a row of metrics; remove the line, or delete the run's folder"
        " and run the same command again.\n",
    )
    assert run.status() == "failed" and checkpoint.whole(run.checkpoints)
    fault(f"a bit of metrics.jsonl is flipped ({bit})", "file and line are named, exit code 2")


@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated"])
def test_a_run_does_not_go_on_where_its_metrics_would_have_a_gap(
    how: str, tmp_path: Path, stopped: Path, given: Callable[..., Said], fault: Fault
) -> None:
    run = of(copied(stopped, tmp_path / "runs", "sft"), "sft")
    spoil(run.metrics_path, how)
    said = given(*SFT, f"paths.runs={tmp_path / 'runs'}")
    reached = re.search(r"ends at step (\d+), but the run would go on from step 16", said.err)
    assert said.code == 2 and reached is not None, said.err
    assert (int(reached[1]) == 0) == (how != "truncated")
    fault(f"metrics.jsonl of a stopped run: {how}", "refused with the way out, exit code 2")


def test_no_figure_is_made_of_a_finished_run_s_changed_metrics(
    tmp_path: Path, store: Path, given: Callable[..., Said], fault: Fault
) -> None:
    run = of(copied(store, tmp_path / "runs", "rl"), "rl")
    text = run.metrics_path.read_text()
    row = next(at for at in re.finditer(r'"eval/kl": (\d\.\d)', text) if at[1] == "0.0")
    run.metrics_path.write_text(text[: row.end() - 1] + "1" + text[row.end() :])
    assert len(read(run.metrics_path)) == len(read(of(store, "rl").metrics_path))
    said = given("compare", "--runs", str(tmp_path / "runs"), run.key)
    assert said.code == 2 and said.err == (
        f"error: {run.metrics_path} is not as it was written, by the digest in manifest.json; copy it back,"
        f" or delete {run.path} and give its command again to have it built anew.\n"
    )
    fault("one digit of a finished run's metrics changes", "no figure or table is made of it")


@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated", "one bit flipped"])
def test_samples_are_read_as_they_were_written_or_not_at_all(
    how: str, tmp_path: Path, store: Path, fault: Fault
) -> None:
    run = of(copied(store, tmp_path / "runs", "rl"), "rl")
    rows = run.responses(8)
    assert len(rows) == 12
    file = run.samples / "000008.jsonl"
    if how == "truncated":  # where a line ends, which a reader cannot see
        file.write_text("".join(file.read_text().splitlines(True)[:6]))
    else:
        spoil(file, how)
    with pytest.raises(UserError) as refused:
        run.responses(8)
    assert str(refused.value).startswith(f"{file} is ")
    fault(f"a file of samples: {how}", "named with the way out, exit code 2")


@pytest.mark.parametrize("name", ["ids.npy", "ends.npy", "sha256.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_of_rows_is_made_anew(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    from rlhf_cli.data.tokens import Encoder, encoded
    from rlhf_cli.models.tokenizer import train_tokenizer

    texts = ["the cat sat on the mat", "and the dog lay by the door"]
    encoder = Encoder(train_tokenizer(texts, 320, 64), 64, 64, lambda _: None)
    made: list[int] = []

    def rows() -> list[tuple[list[int], ...]]:
        both = [(a, b) for a in texts for b in texts]
        return list(encoded(encoder, both, tmp_path, lambda done, _: made.append(done)))

    whole = rows()
    (file,) = tmp_path.glob(f"tokens/*/{name}")
    spoil(file, how)
    assert rows() == whole and made == [4, 4]
    assert rows() == whole and made == [4, 4]
    fault(f"the cache of encoded rows ({name}): {how}", "found by its digest and made anew")


# --- the clock


def test_a_clock_that_is_set_moves_no_limit_and_no_duration(
    tmp_path: Path, store: Path, given: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch, fault: Fault,
) -> None:  # fmt: skip
    now, set_by = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + set_by[-1])
    from rlhf_cli.stages.context import Context

    report = Context.report

    def reported(self: Context, step: int, *rest: object) -> None:
        set_by.append(90000.0 if step % 2 else -90000.0)
        report(self, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Context, "report", reported)
    goes_on(given(*SFT, "train.max_hours=1", f"paths.runs={tmp_path}"), of(tmp_path, "sft"), store)
    assert len(set_by) == 33
    walls = [row["wall"] for row in read(of(tmp_path, "sft").metrics_path)]
    assert walls == sorted(walls) and 0 < walls[-1] < 600
    fault(
        "the clock is set back and forth by a day",
        "train.max_hours, durations and the metrics' wall time do not move",
    )


def test_a_run_of_the_future_is_listed_with_age_0(
    tmp_path: Path,
    store: Path,
    given: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")  # ages are left out of a narrow table
    run = of(copied(store, tmp_path / "runs", "rl", "sft"), "rl")
    run.update(started="2999-01-01T00:00:00+00:00", finished="2999-01-01T00:00:01+00:00")
    ahead = time.time() + 1e6
    for path in run.path.rglob("*"):
        os.utime(path, (ahead, ahead))
    said = given("runs", "--runs", str(tmp_path / "runs"))
    first, second = (line for line in said.out.splitlines()[1:] if line.strip())
    assert first.split()[:1] == ["rl"] and second.split()[:1] == ["sft"]
    assert first.split()[-2:] == ["0", "s"]
    with run.lock(on_wait=lambda holder: pytest.fail("a free lock is waited for")):
        pass
    fault("a run's times lie in the future", "listed in its place with age 0")


def test_a_worker_knows_its_driver_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """On Linux a process's birth is told in seconds since the epoch by adding the time of the boot, which
    moves when the clock is set."""
    me = worker.driver()
    process = psutil.Process(int(me.rsplit(" ", 1)[1]))
    assert process.pid == os.getpid() and worker._lives(process)
    born = process.create_time()
    boot = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600)
    assert math.isclose(psutil.Process().create_time() - born, 3600, abs_tol=2)  # it did move
    assert worker.driver() == me and worker._lives(process)
    fault("the clock is set by an hour under launched workers", "they know that their driver lives")
