"""Keys name the science and nothing else; a plan says what will happen and spends nothing."""

from __future__ import annotations

import gzip
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic.dataclasses import dataclass
from rich.console import Console

from rlhf_cli.algos.p3o import P3O
from rlhf_cli.config import compose
from rlhf_cli.core.algorithm import Model
from rlhf_cli.plan import Plan, describe, plan
from rlhf_cli.recipes import STRICT
from rlhf_cli.store.run import Run


@dataclass(frozen=True, config=STRICT)
class Scoreless(P3O):
    """An algorithm that asks for no reward model."""

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF})


@dataclass(frozen=True, config=STRICT)
class Revised(P3O):
    """P3O after its numbers changed."""

    revision: ClassVar[int] = P3O.revision + 1


def planned(*words: str) -> Plan:
    return plan(compose(words))


def test_a_plan_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from rlhf_cli.cli import main\n"
        "try: main(['plan', 'algo=p3o_v2', 'data=hh'])\n"
        "except SystemExit as left: assert not left.code, left\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@cache
def keys(*words: str) -> dict[str, str]:
    return {step.stage: step.key for step in planned(*words).steps}


def renamed(*words: str) -> set[str]:
    """The stages whose keys these words change."""
    before, after = keys(), keys(*words)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    "how",
    [
        ["launch=deepspeed"],
        ["launch.micro_batch=3", "launch.timeout=99"],
        ["track=off"],
        ["track.group=mine", "track.project=mine"],
        ["paths.runs=elsewhere"],
        ["data.path=elsewhere"],
        ["name=mine"],
    ],
)
def test_how_a_run_is_made_is_in_no_key(how: list[str]) -> None:
    assert renamed(*how) == set()


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("seed=2", {"rl"}),
        ("algo.beta=0.3", {"rl"}),
        ("algo.update.epochs=2", {"rl"}),
        ("algo.optim.lr=1e-5", {"rl"}),
        ("eval.prompts=100", {"rl"}),
        ("algo=p3o_v1", {"rl"}),
        ("reward.optim.lr=1e-5", {"reward", "rl"}),
        ("reward.seed=2", {"reward", "rl"}),
        ("reward.model.precision=bf16", {"reward", "rl"}),
        ("sft.optim.lr=1e-5", {"sft", "reward", "rl"}),
        ("sft.seed=2", {"sft", "reward", "rl"}),
        ("model.precision=bf16", {"sft", "reward", "rl"}),
        ("model.scratch.seed=2", {"sft", "reward", "rl"}),
        ("data=tldr", {"sft", "reward", "rl"}),
        ("data.max_response_tokens=40", {"sft", "reward", "rl"}),
        ("data.embedded.seed=7", {"sft", "reward", "rl"}),
    ],
)
def test_a_change_renames_its_stage_and_all_after_it(word: str, stages: set[str]) -> None:
    assert renamed(word) == stages


def test_a_number_written_otherwise_is_the_same_number() -> None:
    assert keys("algo.optim.lr=1e-3") == keys("algo.optim.lr=0.001")
    assert keys("sft.epochs=2") == keys("sft.epochs=2.0")


def test_a_raised_revision_of_an_algorithm_renames_its_runs() -> None:
    assert renamed("algo._target_=tests.test_plan.Revised") == {"rl"}


def test_local_rows_are_known_by_their_bytes_not_their_place(tmp_path: Path) -> None:
    for place, extra in ("here", ""), ("there", ""), ("changed", " indeed"):
        folder = tmp_path / place / "helpful-base"
        folder.mkdir(parents=True)
        for split in "train", "test":
            row = f'{{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Yes{extra}", "rejected": "x"}}\n'
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(row.encode(), mtime=0))
    at = [keys("data.source=path", f"data.path={tmp_path / place}") for place in ("here", "there")]
    changed = keys("data.source=path", f"data.path={tmp_path / 'changed'}")
    assert at[0] == at[1]
    assert all(at[0][stage] != changed[stage] for stage in at[0])


def test_the_stage_says_where_the_chain_stops() -> None:
    assert list(keys("stage=sft")) == ["sft"]
    assert list(keys("stage=reward")) == ["sft", "reward"]
    assert list(keys("stage=rl")) == ["sft", "reward", "rl"]
    assert keys("stage=sft")["sft"] == keys()["sft"]


def test_an_algorithm_that_needs_no_scores_gets_no_reward_model() -> None:
    words = ["algo._target_=tests.test_plan.Scoreless", "eval.proxy=false"]
    steps = planned(*words).steps
    assert [step.stage for step in steps] == ["sft", "rl"]
    assert dict(steps[-1].parents) == {"sft": steps[0].key}


def test_every_chain_has_a_reward_model_where_evaluations_shall_have_a_proxy_reward() -> None:
    steps = planned("algo._target_=tests.test_plan.Scoreless").steps
    assert [step.stage for step in steps] == ["sft", "reward", "rl"]


def test_a_directory_is_called_by_label_and_key() -> None:
    sft, reward, rl = planned("seed=3", "paths.runs=here").steps
    assert str(rl.path) == f"here/rl/p3o_v2-hh_embedded-nano-s3-{rl.key}"
    assert str(sft.path) == f"here/sft/hh_embedded-nano-s1-{sft.key}"
    assert dict(reward.parents) == {"sft": sft.key}
    assert dict(rl.parents) == {"sft": sft.key, "reward": reward.key}
    assert len({step.key for step in (sft, reward, rl)}) == 3


def drawn(*plans: Plan) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(describe(*plans))
    return capture.get()


def test_a_plan_says_what_exists_and_writes_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    sft, reward, rl = planned(f"paths.runs={runs}").steps
    assert not runs.exists()
    for step, end in (sft, Run.finish), (reward, lambda run: run.fail("a reason")):
        run = Run(step.path)
        run.begin("stage: sft\n", {})
        end(run)
    after = planned(f"paths.runs={runs}")
    assert [step.status for step in after.steps] == ["done", "failed", "missing"]
    words = drawn(after).split()
    assert [words[words.index(step.key) + 1] for step in after.steps] == ["done", "resume", "build"]
    assert not rl.path.exists()


def test_the_arithmetic_of_batches_fits_80_columns() -> None:
    made = planned(
        "algo.update={episodes: 640, batch: 64, epochs: 2, minibatches: 4}",
        "launch=deepspeed",
        "launch.micro_batch=5",
        "eval.points=99",
    )
    text = drawn(made)
    assert max(len(line) for line in text.splitlines()) <= 80
    told = {
        line[:24].strip(): line[24:31].strip() for line in text.splitlines() if line[:2] == "  "
    }
    expected = {
        "rollouts": 640 // 64,
        "prompts per rollout": 64 // 2,
        "optimiser steps": 10 * 2 * 4,
        "responses per process": 64 // 4 // 2,
        "micro-batches": 2,  # 8 responses, at most 4 at once: pairs stay together
        "evaluations": 11,  # no more than one per rollout, and step 0
    }
    assert {what: told[what] for what in expected} == {w: str(n) for w, n in expected.items()}


def test_a_sweep_lists_its_shared_stages_once() -> None:
    text = drawn(*(planned(f"algo={a}", f"seed={s}") for a in ("p3o_v2", "ppo") for s in (1, 2)))
    assert [text.count(f"\n{stage} ") for stage in ("sft ", "reward ", "rl ")] == [1, 1, 4]
    assert text.count("p3o_v2 on ") == text.count("ppo on ") == text.count("sft on ") == 1
