"""KTO response by response."""

from __future__ import annotations

from rlhf_cli.algos.kto import KTO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import sigmoid

VARIANTS = {"kto": [{}, {"beta": 0.5, "desirable": 1.33, "undesirable": 0.7}]}
LEARNS = {"kto": None}  # a bounded value is pushed to its ends


def judge(algorithm: KTO, one: Numbers) -> Answer:
    """The value of a good response rises with slope beta sigma (1 - sigma), that of a bad one falls."""
    prompts = len(one.mask)
    level = sum(one.log_ratio(p, 2, one.logp_old, one.logp_ref) for p in range(prompts)) / prompts
    level = level if level > 0 else 0.0
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0, "margin": 0.0})
    answer.watch["baseline"] = level
    for p in range(prompts):
        gains = []
        for g, side, weight in ((0, 1, algorithm.desirable), (1, -1, algorithm.undesirable)):
            gain = one.log_ratio(p, g, one.logp, one.logp_ref) - level
            value = sigmoid(side * algorithm.beta * gain)
            answer.loss += weight * (1 - value) / (2 * prompts)
            slope = -side * weight * algorithm.beta * value * (1 - value) / (2 * prompts)
            answer.push(one, p, g, slope)
            answer.watch["accuracy"] += (side * gain > 0) / (2 * prompts)
            gains.append(gain)
        answer.watch["margin"] += abs(gains[0] - gains[1]) / prompts
    return answer
