"""SimPO pair by pair."""

from __future__ import annotations

from rlhf_cli.algos.simpo import SimPO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import place, sigmoid, surprise

VARIANTS = {"simpo": [{}, {"beta": 0.5, "gamma": 0.0}]}
LEARNS = {"simpo": None}  # no reference to stay close to


def judge(algorithm: SimPO, one: Numbers) -> Answer:
    """Log-loss of the lead in mean log-probability over gamma; a token moves a mean by 1 / length."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0})
    share = 1 / len(one.mask)
    for p in range(len(one.mask)):
        (m_w, move_w), (m_l, move_l) = (place(one, p, g, one.zeros(), True) for g in (0, 1))
        lead = algorithm.beta * (m_w - m_l) - algorithm.gamma
        answer.loss += share * surprise(lead)
        slope = -share * algorithm.beta * sigmoid(-lead)
        answer.push(one, p, 0, slope * move_w)
        answer.push(one, p, 1, -slope * move_l)
        answer.watch["accuracy"] += share * (m_w > m_l)
    return answer
