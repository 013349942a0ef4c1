"""APA and AWR token by token."""

from __future__ import annotations

from math import exp, log, sqrt

from rlhf_cli.algos.apa import APA, AWR
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {
    name: [
        {},
        {"normalize_adv": False, "gamma": 0.9, "lam": 0.7, "beta": 0.6, "value_coef": 0.3},
        {"subtract_log_z": True, "beta": 0.5},
        {"normalize_adv": False, "subtract_log_z": True, "beta": 0.05},
    ]
    for name in ("apa", "awr")
}
LEARNS = {
    "apa": None,  # its advantages leave out the KL still to be paid: test_regression.py
    "awr": None,  # nothing holds it to the reference: test_regression.py
}


def estimated(algorithm: APA | AWR, one: Numbers) -> Grid:
    """GAE as the sum it abbreviates: A_t = sum over k of (gamma lambda)^k delta_{t+k}."""
    grid = one.zeros()
    for p, g, t in one.tokens():
        length = int(sum(one.mask[p][g]))
        value = [*one.value_old[p][g][:length], 0.0]
        for k in range(t, length):
            reward = one.score[p][g] if k == length - 1 else 0.0
            delta = reward + algorithm.gamma * value[k + 1] - value[k]
            grid[p][g][t] += (algorithm.gamma * algorithm.lam) ** (k - t) * delta
    return grid


def exponents(algorithm: APA | AWR, one: Numbers, raw: Grid) -> Grid:
    """A / beta of each response token, whitened and moved as the settings say."""
    listed = [raw[p][g][t] for p, g, t in one.tokens()]
    if algorithm.normalize_adv:
        mean = sum(listed) / len(listed)
        deviation = sqrt(sum((a - mean) ** 2 for a in listed) / len(listed) + 1e-8)
        listed = [(a - mean) / deviation for a in listed]
    listed = [a / algorithm.beta for a in listed]
    if algorithm.subtract_log_z:
        top = max(listed)
        z = sum(exp(a - top) for a in listed) / len(listed)
        listed = [a - top - log(z) for a in listed]
    grid = one.zeros()
    for (p, g, t), a in zip(one.tokens(), listed, strict=True):
        grid[p][g][t] = a
    return grid


def judge(algorithm: APA | AWR, one: Numbers) -> Answer:
    """Means over all response tokens."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"value_error": 0.0})
    raw = estimated(algorithm, one)
    aim = exponents(algorithm, one, raw)
    count = len(list(one.tokens()))
    for p, g, t in one.tokens():
        if isinstance(algorithm, APA):
            left = one.logp[p][g][t] - one.logp_ref[p][g][t] - aim[p][g][t]
            answer.loss += left * left / count
            answer.d_logp[p][g][t] = 2 * left / count
        else:
            weight = exp(min(max(aim[p][g][t], -20.0), 20.0))
            answer.loss -= weight * one.logp[p][g][t] / count
            answer.d_logp[p][g][t] = -weight / count
        off = one.value[p][g][t] - (raw[p][g][t] + one.value_old[p][g][t])
        answer.loss += algorithm.value_coef * off * off / 2 / count
        answer.d_value[p][g][t] = algorithm.value_coef * off / count
        answer.watch["value_error"] += off * off / count
    return answer
