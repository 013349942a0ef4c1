"""PPO token by token."""

from __future__ import annotations

from math import exp, sqrt
from typing import Protocol

from rlhf_cli.algos.ppo import PPO
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {
    "ppo": [
        {},
        {"whiten_advantage": False, "gamma": 0.9, "lam": 0.7, "beta": 0.4, "clip": 0.1},
        {"reward_scale": "scale", "whiten_reward": True, "advantage_clip": 0.5, "ptx_coef": 0.7},
        {"clip": None, "clip_value": None, "entropy_coef": 0.3, "kl_target": 1.0},
        {"ratio_to": "ref", "reward_clip": 0.4, "entropy_coef": 0.2, "entropy_target": 1.1},
    ],
    "ppo_max": [{}, {"reward_clip": 0.3, "advantage_clip": 0.2, "whiten_advantage": True}],
}
LEARNS = {
    # Moments over the rows of an enumeration would count likely and unlikely responses alike.
    "ppo": {"whiten_advantage": False},
    # Scores in other units or cut short have another optimum; test_ppo_max.py says which.
    "ppo_max": {"reward_scale": "none", "reward_clip": None},
}
ALIVE_UNDER = {"kl_horizon": {"kl_target": 1.0}, "entropy_target": {"entropy_coef": 0.1}}


class Clipped(Protocol):
    """The settings that PPO and its relatives have in common."""

    gamma: float
    lam: float
    whiten_advantage: bool
    clip: float | None
    clip_value: float | None
    value_coef: float


def held(x: float, limit: float | None) -> float:
    """x, or the end of [-limit, limit] it overshoots."""
    if limit is None or abs(x) <= limit:
        return x
    return limit if x > 0 else -limit


def spread(listed: list[float], lost: int) -> tuple[float, float]:
    """Mean, and the squares about it divided by n - lost (0 of a single number)."""
    mean = sum(listed) / len(listed)
    return mean, sum((x - mean) ** 2 for x in listed) / max(len(listed) - lost, 1)


def whitened(grid: Grid, one: Numbers, shifted: bool) -> Grid:
    """The numbers at response tokens with variance 1, and mean 0 if shifted."""
    mean, variance = spread([grid[p][g][t] for p, g, t in one.tokens()], lost=0)
    white = one.zeros()
    for p, g, t in one.tokens():
        white[p][g][t] = (grid[p][g][t] - mean) / sqrt(variance + 1e-8) + (0 if shifted else mean)
    return white


def paid(algorithm: PPO, one: Numbers) -> Grid:
    """The reward of each token at the first rollout."""
    mean, variance = spread([x for row in one.score for x in row], lost=1)
    scale = sqrt(variance) or 1.0
    grid = one.zeros()
    for p, g, t in one.tokens():
        grid[p][g][t] = -algorithm.beta * (one.logp_old[p][g][t] - one.logp_ref[p][g][t])
        if t == sum(one.mask[p][g]) - 1:
            score = {
                "none": one.score[p][g],
                "scale": one.score[p][g] / scale,
                "normalize": (one.score[p][g] - mean) / scale,
            }[algorithm.reward_scale]
            grid[p][g][t] += held(score, algorithm.reward_clip)
    return whitened(grid, one, shifted=False) if algorithm.whiten_reward else grid


def advantages(algorithm: Clipped, one: Numbers, reward: Grid) -> Grid:
    """GAE as the sum it abbreviates: A_t = sum over k of (gamma lambda)^k delta_{t+k}."""
    grid = one.zeros()
    for p, g, t in one.tokens():
        length = int(sum(one.mask[p][g]))
        value = [*one.value_old[p][g][:length], 0.0]
        for k in range(t, length):
            delta = reward[p][g][k] + algorithm.gamma * value[k + 1] - value[k]
            grid[p][g][t] += (algorithm.gamma * algorithm.lam) ** (k - t) * delta
    return grid


def clipped(
    algorithm: Clipped, one: Numbers, reward: Grid, drawer: Grid, limit: float | None = None
) -> Answer:
    """Means over all response tokens of the clipped surrogate and of half the clipped square.

    drawer: log-probabilities in the ratio's denominator; limit: of the advantages.
    """
    answer = Answer(0.0, one.zeros(), one.zeros())
    raw = advantages(algorithm, one, reward)
    white = whitened(raw, one, shifted=True) if algorithm.whiten_advantage else raw
    places = list(one.tokens())
    count = {"clip_fraction": 0.0, "value_clip_fraction": 0.0, "value_error": 0.0}
    eps = float("inf") if algorithm.clip is None else algorithm.clip
    reach = float("inf") if algorithm.clip_value is None else algorithm.clip_value
    for p, g, t in places:
        a = held(white[p][g][t], limit)
        nats = one.logp[p][g][t] - drawer[p][g][t]
        rho = exp(held(nats, 20.0))
        cut = rho > 1 + eps if a > 0 else rho < 1 - eps
        edge = 1 + eps if a > 0 else 1 - eps
        answer.loss -= a * (edge if cut else rho) / len(places)
        answer.d_logp[p][g][t] = 0.0 if cut or abs(nats) > 20 else -a * rho / len(places)

        ret = raw[p][g][t] + one.value_old[p][g][t]
        value, old = one.value[p][g][t], one.value_old[p][g][t]
        near = min(max(value, old - reach), old + reach)
        free, kept = (value - ret) ** 2, (near - ret) ** 2
        answer.loss += algorithm.value_coef * 0.5 * max(free, kept) / len(places)
        slope = 0.0 if kept > free else value - ret
        answer.d_value[p][g][t] = algorithm.value_coef * slope / len(places)

        count["clip_fraction"] += cut
        count["value_clip_fraction"] += abs(value - old) > reach
        count["value_error"] += free
    answer.watch = {name: total / len(places) for name, total in count.items()}
    return answer


def judge(algorithm: PPO, one: Numbers) -> Answer:
    """The clipped losses on processed rewards, and the entropy if it counts."""
    drawer = one.logp_ref if algorithm.ratio_to == "ref" else one.logp_old
    answer = clipped(algorithm, one, paid(algorithm, one), drawer, algorithm.advantage_clip)
    if algorithm.entropy_coef > 0:
        answer.d_entropy = one.zeros()
        share = algorithm.entropy_coef / len(list(one.tokens()))
        for p, g, t in one.tokens():
            entropy, target = one.entropy[p][g][t], algorithm.entropy_target
            above = target is not None and entropy > target
            miss = -entropy if target is None else abs(entropy - target)
            answer.loss += share * miss
            answer.d_entropy[p][g][t] = share if above else -share
    return answer


def side(algorithm: PPO, one: Numbers) -> Answer:
    """Mean negative log-likelihood of the demonstrations' tokens."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    places = list(one.tokens())
    for p, g, t in places:
        answer.loss -= algorithm.ptx_coef * one.logp[p][g][t] / len(places)
        answer.d_logp[p][g][t] = -algorithm.ptx_coef / len(places)
    return answer
