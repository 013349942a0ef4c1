"""ORPO pair by pair."""

from __future__ import annotations

from math import exp, log

from rlhf_cli.algos.orpo import ORPO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import place, sigmoid, surprise

VARIANTS = {"orpo": [{}, {"lam": 1.5}]}
LEARNS = {"orpo": None}  # its own test says where
TEACHES_ALONE = ("orpo",)  # fine-tuning learns from the response itself


def odds(level: float) -> tuple[float, float]:
    """Log-odds of a probability per token and their slope 1 / (1 - p); cut just short of certainty."""
    if level >= -1e-6:
        return -1e-6 - log(1e-6 - 5e-13), 0.0
    # 1 - exp(x) by its series where the difference would cancel.
    rest = -level * (1 + level / 2 + level**2 / 6) if level > -1e-4 else 1 - exp(level)
    return level - log(rest), 1 / rest


def judge(algorithm: ORPO, one: Numbers) -> Answer:
    """The preferred response's surprise per token, and lambda times the log-loss of its odds."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0})
    share = 1 / len(one.mask)
    for p in range(len(one.mask)):
        (m_w, move_w), (m_l, move_l) = (place(one, p, g, one.zeros(), True) for g in (0, 1))
        (odds_w, steep_w), (odds_l, steep_l) = odds(m_w), odds(m_l)
        answer.loss += share * (algorithm.lam * surprise(odds_w - odds_l) - m_w)
        slope = -share * algorithm.lam * sigmoid(odds_l - odds_w)
        answer.push(one, p, 0, (slope * steep_w - share) * move_w)
        answer.push(one, p, 1, -slope * steep_l * move_l)
        answer.watch["accuracy"] += share * (odds_w > odds_l)
    return answer
