"""ReMax token by token; the drawn response comes first, the greedy one second."""

from __future__ import annotations

from rlhf_cli.algos.remax import ReMax
from tests.algos.oracles import Answer, Numbers

VARIANTS = {"remax": [{}, {"baseline": "regularised", "beta": 0.6}]}
TEACHES_ALONE = ("remax",)  # scores cancel, the KL of the draw does not


def judge(algorithm: ReMax, one: Numbers) -> Answer:
    """Only the draw has slopes; from its score and the KL to come the greedy level is taken."""
    assert one.source == ("policy", "greedy")
    answer = Answer(0.0, one.zeros(), one.zeros())
    prompts = len(one.score)
    for p, (drawn, level) in enumerate(one.score):
        if algorithm.baseline == "regularised":
            level -= algorithm.beta * one.log_ratio(p, 1, one.logp_old, one.logp_ref)
        to_come = 0.0
        for t in reversed(range(int(sum(one.mask[p][0])))):
            to_come += one.logp_old[p][0][t] - one.logp_ref[p][0][t]
            better = drawn - level - algorithm.beta * to_come
            answer.loss -= better * one.logp[p][0][t] / prompts
            answer.d_logp[p][0][t] = -better / prompts
    return answer
