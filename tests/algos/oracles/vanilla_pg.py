"""The token policy gradient with a critic, token by token."""

from __future__ import annotations

from rlhf_cli.algos.vanilla_pg import VanillaPG
from tests.algos.oracles import Answer, Numbers

VARIANTS = {"vanilla_pg": [{}, {"beta": 0.6, "value_coef": 2.0}]}


def judge(algorithm: VanillaPG, one: Numbers) -> Answer:
    """What is still to come minus what the critic had said; the critic learns what came."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"value_error": 0.0})
    places = list(one.tokens())
    for p, g, t in places:
        come = one.score[p][g]
        for s in range(t, int(sum(one.mask[p][g]))):
            come -= algorithm.beta * (one.logp_old[p][g][s] - one.logp_ref[p][g][s])
        better = come - one.value_old[p][g][t]
        answer.loss -= better * one.logp[p][g][t] / len(places)
        answer.d_logp[p][g][t] = -better / len(places)
        wrong = one.value[p][g][t] - come
        answer.loss += algorithm.value_coef * wrong * wrong / 2 / len(places)
        answer.d_value[p][g][t] = algorithm.value_coef * wrong / len(places)
        answer.watch["value_error"] += wrong * wrong / len(places)
    return answer
