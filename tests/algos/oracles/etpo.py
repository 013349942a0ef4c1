"""ETPO token by token, and for each the whole vocabulary."""

from __future__ import annotations

from math import exp

from rlhf_cli.algos.etpo import ETPO
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {"etpo": [{}, {"beta": 0.9, "huber": 0.4, "value_coef": 0.3, "gamma": 0.6, "lam": 0.3}]}


def aims(algorithm: ETPO, one: Numbers) -> Grid:
    """What is paid after a token plus the soft value of the state in which the next one is chosen."""
    grid = one.zeros()
    for p, g, t in reversed(list(one.tokens())):
        later = [k for k in range(t + 1, len(one.mask[p][g])) if one.mask[p][g][k]]
        single = 0.0 if later else one.score[p][g]
        paid = single if one.reward is None else one.reward[p][g][t]
        if later:
            discount = 1.0 if later[0] == t + 1 else algorithm.gamma
            n, lam = later[0], algorithm.lam
            u = one.logp_old[p][g][n] - one.logp_ref[p][g][n]
            along = grid[p][g][n] - algorithm.beta * u
            paid += discount * ((1 - lam) * one.value_old[p][g][n] + lam * along)
        grid[p][g][t] = paid
    return grid


def judge(algorithm: ETPO, one: Numbers) -> Answer:
    """d/d log pi(a) of pi(a) (beta log ratio - Q) is that once more, plus beta pi(a)."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"value_error": 0.0})
    answer.d_q_taken = one.zeros()
    answer.d_logps = [[[[0.0] * len(v) for v in row] for row in group] for group in one.logps]
    places, aim = list(one.tokens()), aims(algorithm, one)
    share = 1 / len(places)
    for p, g, t in places:
        for a, logp in enumerate(one.logps[p][g][t]):
            ratio = logp - one.logps_ref[p][g][t][a]
            cost = exp(logp) * (algorithm.beta * ratio - one.q[p][g][t][a])
            answer.loss += share * cost
            answer.d_logps[p][g][t][a] = share * (cost + algorithm.beta * exp(logp))
        error = one.q_taken[p][g][t] - aim[p][g][t]
        delta, weight = algorithm.huber, share * algorithm.value_coef
        if abs(error) <= delta:
            answer.loss += weight * error * error / 2
        else:
            answer.loss += weight * delta * (abs(error) - delta / 2)
        answer.d_q_taken[p][g][t] = weight * max(-delta, min(delta, error))
        answer.watch["value_error"] += share * error * error
    return answer
