"""P3O pair by pair."""

from __future__ import annotations

from math import exp

from rlhf_cli.algos.p3o import P3O
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    name: [{}, {"kl_at": "rollout", "beta": 0.3, "clip": 0.5, "clamp": 1.5}]
    for name in ("p3o_v1", "p3o_v2")
}


def between(x: float, low: float, high: float) -> float:
    """x, or the end it overshoots."""
    return low if x < low else high if x > high else x


def judge(algorithm: P3O, one: Numbers) -> Answer:
    """Each side of each pair keeps its slope unless the clipped branch is the worse loss."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    sides = cut_sides = 0
    share = 1 / (len(one.mask) * len(one.pairs()))
    for p in range(len(one.mask)):
        for i, j in one.pairs():
            for k, slope, loss, cut in pair(algorithm, one, p, i, j):
                answer.loss += share * loss
                answer.push(one, p, k, share * slope)
                sides, cut_sides = sides + 1, cut_sides + cut
    answer.watch["clip_fraction"] = cut_sides / sides
    return answer


def pair(
    algorithm: P3O, one: Numbers, p: int, i: int, j: int
) -> list[tuple[int, float, float, bool]]:
    """(response, d loss / d h, its share of the loss, whether cut) for both responses of a pair."""
    eps, c = algorithm.clip, algorithm.clamp
    h = [one.log_ratio(p, g, one.logp, one.logp_ref) for g in (i, j)]
    o = [one.log_ratio(p, g, one.logp_old, one.logp_ref) for g in (i, j)]
    at = h if algorithm.kl_at == "update" else o
    q = (one.score[p][i] - one.score[p][j]) - algorithm.beta * (at[0] - at[1])
    nats = [between(h[k] - o[k], -20.0, 20.0) for k in (0, 1)]
    rho = [exp(x) for x in nats]
    if algorithm.clipping == "joint":
        w = q * between(exp(nats[0] + nats[1]), 1 / c, c)
        moved = (h[0] - h[1]) - (o[0] - o[1])
        cut = moved > eps if w > 0 else moved < -eps if w < 0 else False
        gap = (o[0] - o[1]) + (between(moved, -eps, eps) if cut else moved)
        slope = 0.0 if cut else -w / 2
        return [(i, slope, -w * gap / 4, cut), (j, -slope, -w * gap / 4, cut)]
    sides = []
    for k, g, q_k in ((0, i, q), (1, j, -q)):
        w = q_k * between(rho[1 - k], 1 / c, c)
        cut = rho[k] > 1 + eps if w > 0 else rho[k] < 1 - eps if w < 0 else False
        kept = between(rho[k], 1 - eps, 1 + eps) if cut else rho[k]
        still = cut or abs(h[k] - o[k]) > 20.0
        sides.append((g, 0.0 if still else -w * rho[k] / 2, -w * kept / 2, cut))
    return sides
