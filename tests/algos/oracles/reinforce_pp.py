"""REINFORCE++ token by token."""

from __future__ import annotations

from math import exp, sqrt

from rlhf_cli.algos.reinforce_pp import ReinforcePP
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "reinforce_pp": [{}, {"whiten_advantage": False, "beta": 0.6, "clip": 0.05, "responses": 3}]
}
LEARNS = {
    # Moments over the rows of an enumeration would count likely and unlikely responses alike.
    "reinforce_pp": {"whiten_advantage": False}
}


def judge(algorithm: ReinforcePP, one: Numbers) -> Answer:
    """A token keeps its slope unless it has already gone beyond the clip in its own favour."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"clip_fraction": 0.0})
    places = list(one.tokens())
    worth = []
    for p, g, t in places:
        length = int(sum(one.mask[p][g]))
        u = [one.logp_old[p][g][s] - one.logp_ref[p][g][s] for s in range(t, length)]
        worth.append(one.score[p][g] - algorithm.beta * sum(u))
    mean, deviation = 0.0, 1.0
    if algorithm.whiten_advantage:
        mean = sum(worth) / len(worth)
        deviation = sqrt(sum((a - mean) ** 2 for a in worth) / len(worth) + 1e-8)
    for (p, g, t), raw in zip(places, worth, strict=True):
        a = (raw - mean) / deviation
        nats = one.logp[p][g][t] - one.logp_old[p][g][t]
        rho = exp(min(max(nats, -20.0), 20.0))
        edge = 1 + algorithm.clip if a > 0 else 1 - algorithm.clip
        cut = rho > edge if a > 0 else rho < edge
        answer.loss -= a * (edge if cut else rho) / len(places)
        answer.d_logp[p][g][t] = 0.0 if cut or abs(nats) > 20 else -a * rho / len(places)
        answer.watch["clip_fraction"] += cut / len(places)
    return answer
