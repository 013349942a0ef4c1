"""XPO: one pair, the policy's response first, and the reference's pushed down."""

from __future__ import annotations

from types import SimpleNamespace

from rlhf_cli.algos.xpo import XPO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import compared
from tests.algos.oracles.dpo_online import label

VARIANTS = {
    "xpo": [
        {},
        {"beta": 0.5, "alpha": 0.2},
        {"alpha": 0.05, "label": "bernoulli"},
        {"alpha": 0.0, "label": "argmax"},
    ]
}
LEARNS = {"xpo": {"alpha": 0.0}}  # a bonus moves the optimum away from the reference


def judge(algorithm: XPO, one: Numbers) -> Answer:
    """A pair's cost as in DPO; each token of the second response also costs alpha log pi."""
    pair = SimpleNamespace(pair_loss="sigmoid", beta=algorithm.beta)
    chance = {(p, 0, 1): label(algorithm.label, one, p, 0, 1) for p in range(len(one.mask))}
    answer = compared(pair, one, chance)
    answer.watch["unheld"] = 0.0
    share = 1 / len(one.mask)
    for (p, _, ref), prefers_first in chance.items():
        answer.loss += share * algorithm.alpha * one.log_ratio(p, ref, one.logp, one.zeros())
        answer.push(one, p, ref, share * algorithm.alpha)
        answer.watch["unheld"] += share * (algorithm.beta * (1 - prefers_first) <= algorithm.alpha)
    return answer
