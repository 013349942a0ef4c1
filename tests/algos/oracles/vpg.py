"""The sequence policy gradient response by response."""

from __future__ import annotations

from rlhf_cli.algos.vpg import VPG
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "vpg": [
        {},
        {"baseline": "batch", "responses": 3, "beta": 0.7},
        {"baseline": "constant", "level": -1.5, "responses": 2},
    ]
}
ALIVE_UNDER = {"level": {"baseline": "constant"}}  # the mean of the batch has no level to set


def judge(algorithm: VPG, one: Numbers) -> Answer:
    """The slope of each of a response's tokens is minus what the response was better by."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    gains = {}
    for p, group in enumerate(one.score):
        for g, score in enumerate(group):
            h = one.log_ratio(p, g, one.logp_old, one.logp_ref)
            gains[p, g] = score - algorithm.beta * h
    level = algorithm.level
    if algorithm.baseline == "batch":
        level = sum(gains.values()) / len(gains)
    for (p, g), gain in gains.items():
        slope = (level - gain) / len(gains)
        answer.loss += slope * one.log_ratio(p, g, one.logp, one.zeros())
        answer.push(one, p, g, slope)
    return answer
