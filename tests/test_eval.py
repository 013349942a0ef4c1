"""`rlhf eval`: the contract of a run, applied again and to policies of elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_cli.cli import main
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import TINY


def rlhf(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two algorithms on one SFT policy."""
    folder = tmp_path_factory.mktemp("eval")
    for algo in ("p3o_v2", "dpo"):
        assert rlhf("train", f"algo={algo}", *TINY, "track=off", f"paths.runs={folder}") == 0
    return folder


def only(runs: Path, pattern: str) -> Run:
    (found,) = runs.glob(pattern)
    return Run(found)


def rows(run: Run, step: int) -> list[dict[str, object]]:
    lines = (run.samples / f"{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def measured(runs: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Run:
    capsys.readouterr()
    assert rlhf("eval", *words, "--runs", str(runs)) == 0
    return Run(Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("run: ")))


def evaluated(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def test_a_run_is_measured_as_it_measured_itself(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rl = only(runs, "rl/p3o_v2-*")
    again = measured(runs, capsys, rl.key)
    assert evaluated(read(again.metrics_path)[0]) == evaluated(read(rl.metrics_path)[-1])
    assert rows(again, 0) == rows(rl, 8)
    told = again.manifest()
    assert told["stage"] == "eval" and told["algo"] == "p3o_v2" and told["status"] == "done"
    assert told["reference"] == rl.manifest()["reference"] == only(runs, "sft/*").weights()
    assert measured(runs, capsys, rl.key).path == again.path  # done already


def test_the_sft_policy_is_where_every_run_begins(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = measured(runs, capsys, only(runs, "sft/*").key)
    start = read(only(runs, "rl/dpo-*").metrics_path)[0]
    assert evaluated(read(sft.metrics_path)[0]) == evaluated(start)


def test_several_draws_begin_with_the_one_of_every_evaluation_and_err_less(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rl = only(runs, "rl/p3o_v2-*")
    many = measured(runs, capsys, rl.key, "--draws", "4")
    found = rows(many, 0)
    assert len(found) == 4 * 12
    assert found[::4] == rows(rl, 8)
    assert len({row["response"] for row in found[:4]}) > 1
    kl = [sum(float(str(r["kl"])) for r in found[at : at + 4]) / 4 for at in range(0, 48, 4)]
    assert read(many.metrics_path)[0]["eval/kl"] == pytest.approx(sum(kl) / 12)
    assert read(many.metrics_path)[0]["eval/prompts"] == 12


def test_a_folder_of_elsewhere_is_measured_like_the_run_that_is_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rl = only(runs, "rl/dpo-*")
    shutil.copytree(rl.final, tmp_path / "theirs")
    theirs = measured(runs, capsys, str(tmp_path / "theirs"), "--like", rl.key)
    assert theirs.label == "theirs" and theirs.manifest()["algo"] == "theirs"
    assert evaluated(read(theirs.metrics_path)[0]) == evaluated(read(rl.metrics_path)[-1])


def test_what_cannot_be_measured_is_one_sentence(
    runs: Path, tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stories = shared_data / "models" / "stories260K-hf"
    assert rlhf("eval", str(stories), "--runs", str(runs)) == 2
    said = capsys.readouterr().err
    assert "have different tokenizers, so their tokens cannot be compared" in said
    assert said.count("\n") == 1
    reward = only(runs, "reward/*").key
    assert rlhf("eval", reward, "--runs", str(runs)) == 2
    assert "is a reward model, not a policy" in capsys.readouterr().err
    sft = only(runs, "sft/*").key
    assert rlhf("eval", sft, "--like", sft, "--runs", str(runs)) == 2
    assert capsys.readouterr().err == f"error: --like={sft} is not a run of stage rl; name one.\n"
    shutil.copytree(runs / "sft", tmp_path / "sft")
    assert rlhf("eval", sft, "--runs", str(tmp_path)) == 2
    assert "has no RL run to be measured like; name one: --like=RUN." in capsys.readouterr().err
