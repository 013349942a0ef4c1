"""REBEL pair by pair."""

from __future__ import annotations

from rlhf_cli.algos.rebel import REBEL
from tests.algos.oracles import Answer, Numbers

VARIANTS = {"rebel": [{}, {"eta": 0.4, "beta": 0.0, "responses": 3}]}


def judge(algorithm: REBEL, one: Numbers) -> Answer:
    """Half the slope of a square is what is left: how far the pair moved minus how far it should."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    share = 1 / (len(one.mask) * len(one.pairs()))
    for p in range(len(one.mask)):
        for i, j in one.pairs():
            moved, reward = [], []
            for g in (i, j):
                spent = one.log_ratio(p, g, one.logp_old, one.logp_ref)
                moved.append(one.log_ratio(p, g, one.logp, one.logp_old))
                reward.append(one.score[p][g] - algorithm.beta * spent)
            left = moved[0] - moved[1] - algorithm.eta * (reward[0] - reward[1])
            answer.loss += share * left**2
            answer.push(one, p, i, 2 * share * left)
            answer.push(one, p, j, -2 * share * left)
    return answer
