"""Texts at the edges: prompts that fill the context, policies that say nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cli.engine import rollout
from rlhf_cli.engine.sampler import Draw
from rlhf_cli.stages import rl
from rlhf_cli.store.metrics import read
from tests.test_chain import TINY

Typed = Callable[..., tuple[int, str, str]]
SHORT = [*TINY, "track=off", "eval.points=1", "algo.update.episodes=32"]


def rows_of(folder: Path) -> list[dict[str, float]]:
    (path,) = folder.glob("runs/rl/*/metrics.jsonl")
    return read(path)


def test_a_prompt_that_fills_the_context_is_answered_to_its_last_column(
    typed: Typed, tmp_path: Path, fault: Callable[..., None]
) -> None:
    """Every prompt is longer than data.max_prompt_tokens, which with a response is all the model can read."""
    long = "why is the sky as blue as it is? " * 40
    with (tmp_path / "rows.jsonl").open("w") as file:
        for row in range(160):
            pair = {"prompt": f"{long}{row}", "chosen": f"because of light {row}", "rejected": "no"}
            file.write(json.dumps(pair) + "\n")
    words = [word for word in SHORT if not word.startswith("data.embedded")]
    code, out, err = typed(
        "train",
        "data=custom",
        "data.path=rows.jsonl",
        "algo=ppo",
        "model.scratch.context=184",
        *words,
    )
    assert code == 0, out + err
    last = rows_of(tmp_path)[-1]
    assert math.isfinite(last["train/loss"]) and last["eval/length"] >= 1
    fault(
        "prompts that fill the model's context",
        "cut to data.max_prompt_tokens, trained on, a full response fits",
    )


@pytest.mark.parametrize(
    "algo",
    [
        "ppo",
        *(pytest.param(x, marks=pytest.mark.faults) for x in ("p3o_v2", "rloo", "grpo", "apa")),
    ],
)
def test_a_policy_that_only_ever_ends_is_trained_on_without_a_nan(
    typed: Typed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algo: str,
    fault: Callable[..., None],
) -> None:
    drawn = rollout.draw

    def silent(
        experts: Any, prompts: Any, responses: int, uniform: Any, width: int, end: int, *rest: Any
    ) -> Draw:
        said = drawn(experts, prompts, responses, uniform, width, end, *rest)
        tokens, attention, mask = (x.clone() for x in (said.tokens, said.attention, said.mask))
        tokens[:, width] = end
        tokens[:, width + 1 :] = rest[0]
        attention[:, width + 1 :] = False
        mask[:, 1:] = 0.0
        return Draw(tokens, attention, mask)

    monkeypatch.setattr(rollout, "draw", silent)
    monkeypatch.setattr(rl, "check_drawing", lambda *_: None)  # which would notice, rightly
    code, out, err = typed("train", f"algo={algo}", *SHORT)
    assert code == 0, out + err
    for row in rows_of(tmp_path)[1:]:
        assert row["train/length"] == 1 and all(
            math.isfinite(value) for name, value in row.items() if name.startswith("train/")
        ), row
    assert torch.is_grad_enabled()
    if algo == "ppo":
        fault("all responses are empty", "trained on as responses of one end token; no NaN")
