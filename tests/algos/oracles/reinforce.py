"""REINFORCE on the first rollout of a run, when nothing has been earned before.

What the later ones are compared with is told in `tests/algos/test_policy_gradient.py`.
"""

from __future__ import annotations

from rlhf_cli.algos.reinforce import Reinforce
from tests.algos.oracles import Answer, Numbers

VARIANTS = {"reinforce": [{}, {"baseline": "none", "responses": 3, "beta": 0.6}]}


def judge(algorithm: Reinforce, one: Numbers) -> Answer:
    """The slope of each of a response's tokens is minus what the response earned."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    count = sum(len(group) for group in one.score)
    for p, group in enumerate(one.score):
        for g, score in enumerate(group):
            earned = score - algorithm.beta * one.log_ratio(p, g, one.logp_old, one.logp_ref)
            answer.loss -= earned / count * one.log_ratio(p, g, one.logp, one.zeros())
            answer.push(one, p, g, -earned / count)
    return answer
