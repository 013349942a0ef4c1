"""SPIN: the policy's response comes first, the demonstration second."""

from __future__ import annotations

from rlhf_cli.algos.spin import SPIN
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import sigmoid, surprise

VARIANTS = {"spin": [{}, {"beta": 0.7}]}


def judge(algorithm: SPIN, one: Numbers) -> Answer:
    """Log-loss of the demonstration's gain on the sampling policy over the sample's."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0, "margin": 0.0})
    share = 1 / len(one.mask)
    for p in range(len(one.mask)):
        drawn, shown = (one.log_ratio(p, g, one.logp, one.logp_old) for g in (0, 1))
        lead = shown - drawn
        answer.loss += share * surprise(algorithm.beta * lead)
        slope = share * algorithm.beta * sigmoid(-algorithm.beta * lead)
        answer.push(one, p, 0, slope)
        answer.push(one, p, 1, -slope)
        answer.watch["accuracy"] += share * (lead > 0)
        answer.watch["margin"] += share * abs(lead)
    return answer
