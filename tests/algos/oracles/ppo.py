"""PPO token by token."""

from __future__ import annotations

from math import exp, sqrt

from rlhf_cli.algos.ppo import PPO
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {
    "ppo": [{}, {"whiten_advantage": False, "gamma": 0.9, "lam": 0.7, "beta": 0.4, "clip": 0.1}]
}
LEARNS = {
    # Moments over the rows of an enumeration would count likely and unlikely responses alike.
    "ppo": {"whiten_advantage": False}
}


def advantages(algorithm: PPO, one: Numbers) -> Grid:
    """GAE as the sum it abbreviates: A_t = sum over k of (gamma lambda)^k delta_{t+k}."""
    grid = one.zeros()
    for p, g, t in one.tokens():
        length = int(sum(one.mask[p][g]))
        value = [*one.value_old[p][g][:length], 0.0]
        for k in range(t, length):
            u = one.logp_old[p][g][k] - one.logp_ref[p][g][k]
            reward = -algorithm.beta * u + (one.score[p][g] if k == length - 1 else 0.0)
            delta = reward + algorithm.gamma * value[k + 1] - value[k]
            grid[p][g][t] += (algorithm.gamma * algorithm.lam) ** (k - t) * delta
    return grid


def judge(algorithm: PPO, one: Numbers) -> Answer:
    """Means over all response tokens of the clipped surrogate and of half the clipped square."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    raw = advantages(algorithm, one)
    places = list(one.tokens())
    listed = [raw[p][g][t] for p, g, t in places]
    mean = sum(listed) / len(listed)
    deviation = sqrt(sum((a - mean) ** 2 for a in listed) / len(listed) + 1e-8)
    count = {"clip_fraction": 0.0, "value_clip_fraction": 0.0, "value_error": 0.0}
    for p, g, t in places:
        a = (raw[p][g][t] - mean) / deviation if algorithm.whiten_advantage else raw[p][g][t]
        rho = exp(one.logp[p][g][t] - one.logp_old[p][g][t])
        cut = rho > 1 + algorithm.clip if a > 0 else rho < 1 - algorithm.clip
        edge = 1 + algorithm.clip if a > 0 else 1 - algorithm.clip
        answer.loss -= a * (edge if cut else rho) / len(places)
        answer.d_logp[p][g][t] = 0.0 if cut else -a * rho / len(places)

        ret = raw[p][g][t] + one.value_old[p][g][t]
        value, old = one.value[p][g][t], one.value_old[p][g][t]
        reach = algorithm.clip_value
        near = min(max(value, old - reach), old + reach)
        free, held = (value - ret) ** 2, (near - ret) ** 2
        answer.loss += algorithm.value_coef * 0.5 * max(free, held) / len(places)
        slope = 0.0 if held > free else value - ret
        answer.d_value[p][g][t] = algorithm.value_coef * slope / len(places)

        count["clip_fraction"] += cut
        count["value_clip_fraction"] += abs(value - old) > reach
        count["value_error"] += free
    answer.watch = {name: total / len(places) for name, total in count.items()}
    return answer
