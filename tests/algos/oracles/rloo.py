"""RLOO response by response."""

from __future__ import annotations

from math import exp

from rlhf_cli.algos.rloo import RLOO
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "rloo": [
        {},
        {"responses": 4, "beta": 0.6},
        {"variant": "outside", "responses": 3},
        {"ratio": "clip", "responses": 3, "clip": 0.1},
        {"variant": "outside", "ratio": "clip", "beta": 0.6},
    ]
}
ALIVE_UNDER = {"clip": {"ratio": "clip"}}  # without a ratio there is nothing to clip


def surrogate(algorithm: RLOO, gain: float, nats: float) -> tuple[float, float, bool]:
    """(loss, d loss / d log pi, whether cut) of a response or token that moved by so many nats."""
    rho, low, high = exp(min(max(nats, -20.0), 20.0)), 1 - algorithm.clip, 1 + algorithm.clip
    cut = rho > high if gain > 0 else rho < low
    if cut:
        return -gain * (high if gain > 0 else low), 0.0, True
    return -gain * rho, 0.0 if abs(nats) > 20.0 else -gain * rho, False


def judge(algorithm: RLOO, one: Numbers) -> Answer:
    """Every response, or each of its tokens, is pulled by its lead over the siblings' mean."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    by_token, clipped = algorithm.variant == "outside", algorithm.ratio == "clip"
    count = sum(len(group) for group in one.score)
    seen = cuts = 0
    for p, group in enumerate(one.score):
        worth = [
            score
            - (0.0 if by_token else algorithm.beta)
            * one.log_ratio(p, g, one.logp_old, one.logp_ref)
            for g, score in enumerate(group)
        ]
        for g in range(len(group)):
            siblings = [worth[j] for j in range(len(group)) if j != g]
            lead = worth[g] - sum(siblings) / len(siblings)
            length = int(sum(one.mask[p][g]))
            # What is judged as one: each token, or all of them together.
            units = [[t] for t in range(length)] if by_token else [list(range(length))]
            for unit in units:
                gain = lead
                if by_token:
                    for s in range(unit[0], length):
                        u = one.logp_old[p][g][s] - one.logp_ref[p][g][s]
                        gain -= algorithm.beta * u
                logp = sum(one.logp[p][g][t] for t in unit)
                loss, slope, cut = -gain * logp, -gain, False
                if clipped:
                    old = sum(one.logp_old[p][g][t] for t in unit)
                    loss, slope, cut = surrogate(algorithm, gain, logp - old)
                answer.loss += loss / count
                for t in unit:
                    answer.d_logp[p][g][t] += slope / count
                seen, cuts = seen + 1, cuts + cut
    if clipped:
        answer.watch = {"clip_fraction": cuts / seen}
    return answer
