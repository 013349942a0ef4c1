"""The code and its oracle, two derivations that share no line, say the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from rlhf_cli.core.masked import averages, denominators
from tests.algos.cases import Case, case, judge, twins
from tests.algos.discovery import NAMES, oracle, tuned
from tests.algos.oracles import Numbers
from tests.algos.toys import close, tensor

EXACT = 1e-11
"""Relative to the largest entry; sums of a few dozen terms."""

CASES: dict[str, Callable[[int], Case]] = {
    "near the sampler": lambda seed: case(seed),
    "far outside the clip": lambda seed: case(seed, spread=1.5),
    "beyond 20 nats": lambda seed: case(seed, spread=15.0),
    "single tokens": lambda seed: case(seed, tokens=1),
    "one prompt": lambda seed: case(seed, prompts=1),
    "the same response twice": twins,
    "long and ragged": lambda seed: case(seed, tokens=13),
    "three responses": lambda seed: case(seed, responses=3),
}

VARIANTS: dict[str, list[dict[str, object]]] = {
    "p3o_v1": [{}, {"kl_at": "rollout", "beta": 0.3, "clip": 0.5, "clamp": 1.5}],
    "p3o_v2": [{}, {"kl_at": "rollout", "beta": 0.3, "clip": 0.5, "clamp": 1.5}],
    "ppo": [{}, {"whiten_advantage": False, "gamma": 0.9, "lam": 0.7, "beta": 0.4, "clip": 0.1}],
    "dpo_online": [{"label": "soft"}, {"label": "argmax"}, {"label": "bernoulli", "beta": 0.7}],
}
"""Settings beside the shipped ones; an algorithm without an entry is tested as shipped."""


def numbers(one: Case) -> Numbers:
    """The case as nested lists."""
    rollout, now = one.rollout, one.now
    assert rollout.logp_ref is not None and rollout.score is not None
    assert rollout.value_old is not None and now.value is not None
    return Numbers(
        mask=rollout.mask.tolist(),
        logp_old=rollout.logp_old.tolist(),
        logp_ref=rollout.logp_ref.tolist(),
        score=rollout.score.tolist(),
        value_old=rollout.value_old.tolist(),
        coin=rollout.coin.tolist(),
        logp=now.logp.tolist(),
        value=now.value.tolist(),
    )


def near(got: Tensor, expected: object, tolerance: float = EXACT) -> None:
    """Equal, relative to the largest entry or to 1."""
    wanted = tensor(expected)
    close(got, wanted, tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_says_the_same_loss_gradient_and_watched_numbers(
    name: str, kind: str, seed: int
) -> None:
    one = CASES[kind](seed)
    for variant in VARIANTS.get(name, [{}]):
        algorithm = tuned(name, **variant)
        got, expected = judge(algorithm, one), oracle(name).judge(algorithm, numbers(one))
        near(got.loss, expected.loss)
        near(got.d_logp, expected.d_logp)
        near(got.d_value, expected.d_value)
        watched = averages(got.watch, one.rollout.mask, denominators(one.rollout.mask))
        assert watched.keys() == expected.watch.keys()
        for word, value in expected.watch.items():
            near(watched[word].double(), value, 1e-6)  # counts are float32 in the code
