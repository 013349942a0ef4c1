"""The pairwise policy gradient pair by pair."""

from __future__ import annotations

from rlhf_cli.algos.ppg import PPG
from tests.algos.oracles import Answer, Numbers

VARIANTS = {"ppg": [{}, {"responses": 4, "beta": 0.6}]}


def judge(algorithm: PPG, one: Numbers) -> Answer:
    """Half the difference of two gains pulls the two log-probabilities apart."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    share = 1 / (len(one.mask) * len(one.pairs()))
    for p in range(len(one.mask)):
        for i, j in one.pairs():
            gain = one.score[p][i] - one.score[p][j]
            for g, sign in ((i, -1), (j, 1)):
                kl = one.log_ratio(p, g, one.logp_old, one.logp_ref)
                gain += sign * algorithm.beta * kl
            apart = sum(
                sign * one.log_ratio(p, g, one.logp, one.zeros()) for g, sign in ((i, 1), (j, -1))
            )
            answer.loss -= share * gain * apart / 2
            answer.push(one, p, i, -share * gain / 2)
            answer.push(one, p, j, share * gain / 2)
    return answer
