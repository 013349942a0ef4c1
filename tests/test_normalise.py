"""Zero and unit of scores, whether the SFT policy stops, and that all stages read the same rows."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.cli import main
from rlhf_cli.config import compose, recipe
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run, all_runs
from rlhf_cli.worker import corpus_of
from tests.test_chain import TINY

SMALL = [*TINY, "track=off", "sft.epochs=0.5", "reward.epochs=0.5"]


def train(folder: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["train", *SMALL, f"paths.runs={folder}", *words])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SFT policy and a reward model of each kind."""
    folder = tmp_path_factory.mktemp("normalise")
    for kind in ("samples", "references", "none"):
        how = [f"reward.normalise={kind}", "reward.calibration=128"]  # every demonstration
        assert train(folder, "stage=reward", *how) == 0
    return folder


def of(runs: Path, kind: str) -> Run:
    found = [Run(path) for path in (runs / "reward").iterdir()]
    return next(r for r in found if r.manifest()["science"]["reward"]["normalise"] == kind)


def numbers(run: Run) -> tuple[float, float]:
    config = json.loads((run.final / "config.json").read_text())
    return config[SCORE_OFFSET], config[SCORE_SCALE]


def test_another_normalisation_is_another_reward_model_of_the_same_weights(runs: Path) -> None:
    assert len(list((runs / "sft").iterdir())) == 1
    weights = {
        of(runs, kind).manifest()["outputs"]["checkpoints/final/model.safetensors"]
        for kind in ("samples", "references", "none")
    }
    assert len(weights) == 1


def test_raw_scores_are_left_alone(runs: Path) -> None:
    assert numbers(of(runs, "none")) == (0.0, 1.0)


def test_references_score_0_on_average_in_the_models_own_unit(runs: Path) -> None:
    """By transformers alone, one text at a time."""
    run = of(runs, "references")
    offset, scale = numbers(run)
    assert scale == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(run.final)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    data = recipe(compose(SMALL)).data
    encoder = Encoder.of(tokenizer, data)
    demos = corpus_of(cast(Hashable, data)).train.demos
    raw = []
    for demo in demos:
        ids = encoder.prompt(demo.prompt) + encoder.response(demo.response)
        with torch.no_grad():
            raw.append(model(torch.tensor([ids])).logits.item())
    assert offset == pytest.approx(sum(raw) / len(raw), abs=1e-5)


def test_a_policy_that_does_not_stop_is_told_of_and_its_metrics_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["stage=sft", "data.max_response_tokens=3", "sft.epochs=0.1"]
    assert train(tmp_path, *few) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "warning: none of 12 responses of the SFT policy ended within data.max_response_tokens=3: it may"
        " not have learned to stop; raise sft.epochs, or data.max_response_tokens." in said
    )
    (run,) = (Run(path) for path in (tmp_path / "sft").iterdir())
    last = read(run.metrics_path)[-1]
    assert last["eval/eos_rate"] == 0 and last["eval/length"] == 3


def test_evaluation_prompts_are_pinned_by_digest_whatever_the_run(runs: Path) -> None:
    told = {json.dumps(run.manifest()["data"]["evaluation"]) for run in all_runs(runs)}
    assert len(told) == 1
    pinned: dict[str, Any] = json.loads(told.pop())
    assert pinned["prompts"] == 12 and len(pinned["digest"]) == 64


def test_a_stage_refuses_rows_other_than_its_parent_read(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sft,) = (Run(path) for path in (runs / "sft").iterdir())
    data = sft.manifest()["data"]
    sft.update(data={**data, "digest": "0123456789abcdef"})
    assert train(runs, "stage=reward", "reward.seed=9") == 2
    sft.update(data=data)
    told = capsys.readouterr().err
    assert told == (
        f"error: data=hh-embedded is read otherwise than when {sft.path} was made (rows 0123456789 then,"
        f" {data['digest'][:10]} now), as a newer rlhf-cli may do; go back to the one that made it, or set"
        " it aside to have it made again.\n"
    )


def test_scores_relative_to_answers_that_are_not_there_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{n}?", "chosen": "a", "rejected": "b"} for n in range(60)]
    rows += [{"prompt": f"alone {n}?"} for n in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=custom", f"data.path={file}", "reward.relative=true", "eval.prompts=2"]
    with pytest.raises(SystemExit) as left:
        main(["train", *words, f"paths.runs={tmp_path}/runs", "track=off"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: reward.relative=true, but data=custom has no answer to ")
    assert said.endswith(" training prompts; leave those out, or set reward.relative=false.\n")
    assert not list((tmp_path / "runs").glob("*/*"))


def test_a_task_that_pays_has_nothing_to_be_relative_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", "data=guess", "algo=ppo", "reward.relative=true"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: reward.relative=true, but the task of data=guess-embedded pays by itself and scores no"
        " answer; set reward.relative=false.\n"
    )
