"""The code and its oracle, two derivations that share no line, say the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.masked import averages, denominators
from tests.algos.cases import Case, Verdict, case, judge, judge_side, twinned
from tests.algos.discovery import NAMES, oracle, tuned
from tests.algos.oracles import Answer, Numbers
from tests.algos.toys import close, tensor

EXACT = 1e-11
"""Relative to the largest entry; sums of a few dozen terms."""

CASES: dict[str, dict[str, Any]] = {
    "near the sampler": {},
    "far outside the clip": {"spread": 1.5},
    "beyond 20 nats": {"spread": 15.0},
    "single tokens": {"tokens": 1},
    "one prompt": {"prompts": 1},
    "the same response twice": {},
    "long and ragged": {"tokens": 13},
}


def built(kind: str, seed: int, sampling: Sampling) -> Case:
    """The case of a kind, with responses from where the algorithm wants them."""
    one = case(seed, sampling=sampling, **CASES[kind])
    return twinned(one) if kind == "the same response twice" else one


def numbers(one: Case) -> Numbers:
    """The case as nested lists."""
    rollout, now = one.rollout, one.now
    words = ("mask", "logp_old", "logp_ref", "logp_guide", "score", "value_old", "coin")
    return Numbers(
        **{word: getattr(rollout, word).tolist() for word in words},
        **{word: getattr(now, word).tolist() for word in ("logp", "value", "entropy")},
        **{word: getattr(now, word).tolist() for word in ("logps", "logps_ref", "q", "q_taken")},
        score_now=now.score.tolist(),  # type: ignore[union-attr]
        source=rollout.source,
        reward=None if rollout.reward is None else rollout.reward.tolist(),
    )


def near(got: Tensor, expected: object, tolerance: float = EXACT) -> None:
    """Equal, relative to the largest entry or to 1."""
    wanted = tensor(expected)
    close(got, wanted, tolerance * max(1.0, float(wanted.abs().max())))


def agree(got: Verdict, expected: Answer, one: Case) -> None:
    """Loss, slopes and watched numbers are the same."""
    near(got.loss, expected.loss)
    near(got.d_logp, expected.d_logp)
    near(got.d_value, expected.d_value)
    for word in ("entropy", "score", "logps", "q", "q_taken"):
        slope = getattr(expected, f"d_{word}")
        near(got.slopes[word], torch.zeros_like(got.slopes[word]) if slope is None else slope)
    watched = averages(got.watch, one.rollout.mask, denominators(one.rollout.mask))
    assert watched.keys() == expected.watch.keys()
    for word, value in expected.watch.items():
        near(watched[word].double(), value, 1e-6)  # counts are float32 in the code


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_says_the_same_loss_gradient_and_watched_numbers(
    name: str, kind: str, seed: int
) -> None:
    for variant in getattr(oracle(name), "VARIANTS", {}).get(name, [{}]):
        algorithm = tuned(name, **variant)
        one = built(kind, seed, algorithm.sampling())
        agree(judge(algorithm, one), oracle(name).judge(algorithm, numbers(one)), one)
        if algorithm.side().responses:
            other = built(kind, seed + 10, algorithm.side())
            agree(judge_side(algorithm, other), oracle(name).side(algorithm, numbers(other)), other)
