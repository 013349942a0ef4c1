"""Online DPO pair by pair."""

from __future__ import annotations

from math import exp, log1p

from rlhf_cli.algos.dpo_online import OnlineDPO
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "dpo_online": [{"label": "soft"}, {"label": "argmax"}, {"label": "bernoulli", "beta": 0.7}]
}
LEARNS = {"dpo_online": {"label": "soft"}}  # argmax labels have no optimum


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + exp(-x))


def label(algorithm: OnlineDPO, one: Numbers, p: int, i: int, j: int) -> float:
    """Probability that response i is preferred to response j."""
    r_i, r_j = one.score[p][i], one.score[p][j]
    if algorithm.label == "argmax":
        return 0.0 if r_i < r_j else 1.0
    chance = sigmoid(r_i - r_j)
    if algorithm.label == "soft":
        return chance
    coin = one.coin[p][i] + one.coin[p][j]
    return 1.0 if (coin - 1 if coin >= 1 else coin) < chance else 0.0


def judge(algorithm: OnlineDPO, one: Numbers) -> Answer:
    """Cross-entropy of the label against sigma(beta (h_i - h_j)): slope sigma minus label."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0, "margin": 0.0})
    share = 1 / (len(one.mask) * len(one.pairs()))
    for p in range(len(one.mask)):
        for i, j in one.pairs():
            h_i, h_j = (one.log_ratio(p, g, one.logp, one.logp_ref) for g in (i, j))
            prefers_i = label(algorithm, one, p, i, j)
            z = algorithm.beta * (h_i - h_j)
            answer.loss += share * (log1p(exp(-z)) + (1 - prefers_i) * z)
            slope = share * algorithm.beta * (sigmoid(z) - prefers_i)
            answer.push(one, p, i, slope)
            answer.push(one, p, j, -slope)
            answer.watch["accuracy"] += share * ((h_i > h_j) == (prefers_i > 0.5))
            answer.watch["margin"] += share * abs(h_i - h_j)
    return answer
