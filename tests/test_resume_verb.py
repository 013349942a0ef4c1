"""`rlhf resume RUN`: a run goes on by its own configuration, and by nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli import config
from rlhf_cli.engine.stop import Stop
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.conftest import Typed
from tests.test_chain import TINY, exit_code
from tests.test_stopping import TIMED

WORDS = ["train", *TINY, "track=off", "algo.update.episodes=48", "eval.points=1"]
"""3 rollouts of 16 responses, 6 steps."""


def only(folder: Path) -> Run:
    (path,) = (folder / "runs" / "rl").iterdir()
    return Run(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of a chain that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RLHF_RUNS", raising=False)
        assert exit_code(*WORDS) == 0
    return folder


@pytest.fixture(scope="module")
def halved(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same chain, whose RL run was stopped after 2 of its 6 steps."""
    folder = tmp_path_factory.mktemp("halved")
    shutil.copytree(whole / "runs", folder / "runs", ignore=lambda at, names: {"rl"} & {*names})
    calls = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("RLHF_RUNS", raising=False)
        patch.setattr(Stop, "asked", lambda self: "SIGTERM" if next(calls) == 2 else "")
        assert exit_code(*WORDS) == 75
    assert only(folder).status() == "interrupted"
    return folder


@pytest.fixture
def stopped(halved: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    shutil.copytree(halved / "runs", tmp_path / "runs")
    return tmp_path


def beside(run: Run) -> str:
    return f"../runs/rl/{run.path.name}"


@pytest.mark.parametrize("named", [lambda run: run.key, beside], ids=["by key", "from elsewhere"])
def test_it_is_what_the_same_command_would_have_done(
    named: Callable[[Run], str], whole: Path, stopped: Path, typed: Typed, monkeypatch
) -> None:
    run, twin = only(stopped), only(whole)
    if named is beside:
        (stopped / "elsewhere").mkdir()
        monkeypatch.chdir(stopped / "elsewhere")
    command = run.manifest()["command"]
    code, out, err = typed("resume", named(run))
    assert code == 0, err
    assert Path(out.splitlines()[-1].removeprefix("run: ")).name == run.path.name
    manifest = run.manifest()
    assert (manifest["status"], manifest["segment"], manifest["key"]) == ("done", 2, twin.key)
    assert manifest["command"] == command
    assert [path.name for path in (stopped / "runs" / "rl").iterdir()] == [twin.path.name]
    weights = "checkpoints/final/model.safetensors"
    assert manifest["outputs"][weights] == twin.manifest()["outputs"][weights]
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in read(r.metrics_path)]
        for r in (run, twin)
    )
    assert ours == theirs
    if named is not beside:
        assert run.config_path.read_bytes() == twin.config_path.read_bytes()


def test_a_finished_run_says_so_and_stays_as_it_is(
    whole: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole)
    run = only(whole)
    before = run.manifest_path.read_bytes()
    assert typed("resume", run.key)[:2] == (0, f"finished: runs/rl/{run.path.name}\n")
    assert run.manifest_path.read_bytes() == before


def refused(typed: Typed, run: Run, reference: str = "") -> str:
    """The sentence, of which nothing else came."""
    before = run.manifest_path.read_bytes()
    code, out, err = typed("resume", reference or run.key)
    assert (code, out) == (2, "")
    assert run.manifest_path.read_bytes() == before
    return err


def test_a_run_whose_parent_is_not_done_is_not_begun(stopped: Path, typed: Typed) -> None:
    run = only(stopped)
    (parent,) = (stopped / "runs" / "reward").iterdir()
    Run(parent).fail("out of memory")
    assert refused(typed, run) == (
        f"error: runs/rl/{run.path.name} starts from runs/reward/{parent.name}, which is failed; give the"
        f" whole command again: {run.manifest()['command']}\n"
    )


def test_a_configuration_that_was_edited_is_not_carried_out(
    stopped: Path, typed: Typed, fault: Callable[..., None]
) -> None:
    run = only(stopped)
    text = run.config_path.read_text()
    assert text.count("episodes: 48") == 1
    run.config_path.write_text(text.replace("episodes: 48", "episodes: 64"))
    said = refused(typed, run)
    made = said.split(" makes ")[1].split(",")[0]
    assert made.startswith(f"runs/rl/{run.label}-") and made != f"runs/rl/{run.path.name}"
    assert said == (
        f"error: runs/rl/{run.path.name}/config.yaml makes {made}, not this run: it was edited, the data or"
        " the model that it names by a path are others now, the folder was moved, or another version of"
        " rlhf-cli made it; undo that, or give `rlhf train` what you want.\n"
    )
    run.config_path.write_text(text.replace("name: p3o_v2", "name: mine"))  # in no key
    assert "-s1-" in refused(typed, run) and len(list((stopped / "runs" / "rl").iterdir())) == 1
    fault(
        "the configuration of a stopped run is edited before `rlhf resume`",
        "refused with one sentence; the run stays as it was",
    )


def test_a_run_that_was_moved_out_of_its_folder_is_not_carried_out(
    stopped: Path, typed: Typed
) -> None:
    run = only(stopped)
    moved = Run(run.path.rename(stopped / "runs" / "sft" / run.path.name))
    said = refused(typed, moved, str(moved.path))
    assert f"makes runs/rl/{run.path.name}, not this run" in said


def test_a_damaged_checkpoint_stops_it_and_the_way_out_is_the_one_it_names(
    stopped: Path, typed: Typed, fault: Callable[..., None]
) -> None:
    run = only(stopped)
    (newest,) = (path for path in run.checkpoints.iterdir() if path.name.isdigit())
    file = newest / "learner-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, err = typed("resume", run.key)
    at = f"runs/rl/{run.path.name}/checkpoints/{newest.name}"
    assert (code, err.splitlines()[-1]) == (
        2,
        f"error: {at}/learner-00001.safetensors is not as it was written; delete {at} to begin the run"
        " again.",
    )
    assert run.status() == "failed" and newest.is_dir()
    shutil.rmtree(newest)
    assert typed("resume", run.key)[0] == 0
    assert run.status() == "done" and run.manifest()["segment"] == 3
    fault(
        "a bit of the only checkpoint is flipped before `rlhf resume`",
        "stops with one sentence that names the file; once it is deleted the run begins again",
        lost="all steps of this run, for want of an earlier checkpoint",
    )


def test_an_evaluation_begins_anew(stopped: Path, typed: Typed) -> None:
    run = Run(stopped / "runs" / "eval" / "p3o_v2-0123456789")
    run.begin("stage: rl\n", {"command": "rlhf eval p3o_v2"})
    assert refused(typed, run) == (
        f"error: runs/eval/{run.path.name} is an evaluation, which begins anew; give its command again:"
        " rlhf eval p3o_v2\n"
    )


def test_every_parent_goes_on_in_the_same_way(
    stopped: Path, whole: Path, typed: Typed, fault: Callable[..., None]
) -> None:
    """The reward model is a run like any other."""
    (path,) = (stopped / "runs" / "reward").iterdir()
    run, manifest = Run(path), json.loads((path / "manifest.json").read_text())
    shutil.rmtree(run.final)
    run.manifest_path.write_text(json.dumps({**manifest, "status": "running"}))
    assert run.status() == "interrupted"
    assert typed("resume", str(path))[0] == 0
    weights = "checkpoints/final/model.safetensors"
    assert run.manifest()["outputs"][weights] == manifest["outputs"][weights]
    fault(
        "a reward model's run dies before it has left its model; `rlhf resume` of that run",
        "it is trained again from its last checkpoint or the start, to the same weights",
        lost="the steps since its last checkpoint",
    )


def test_a_configuration_of_a_version_that_had_less_to_say_is_filled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, file, composed = config.compose([]), tmp_path / "config.yaml", config.compose
    calls: list[object] = []

    def counted(*words: Any) -> Any:
        calls.append(words)
        return composed(*words)

    monkeypatch.setattr(config, "compose", counted)
    file.write_text(config.freeze(shipped))
    assert (
        config.read(file) == shipped and not calls
    )  # every worker reads one: that must cost nothing
    for lacking in (["launch", "slots"], ["sampler"], ["track"]):
        older = composed([])
        *path, last = lacking
        del (older[path[0]] if path else older)[last]
        file.write_text(config.freeze(older))
        assert config.read(file) == shipped
    assert len(calls) == 3
