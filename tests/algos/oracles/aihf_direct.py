"""AIHF without a reward model, response by response."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log1p

from rlhf_cli.algos.aihf_direct import DirectAIHF, SelfPlayAIHF
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {
    "aihf_direct": [{}, {"beta": 0.7, "demo_weight": 1.6}],
    "aihf_selfplay": [{}, {"beta": 0.7, "play_beta": 0.4, "demo_weight": 1.6}],
}
LEARNS = {
    # The main stream alone: pairs labelled with the true reward, a demonstrator who is at the optimum.
    "aihf_direct": {},
    "aihf_selfplay": {"play_beta": 0.5, "demo_weight": 1.0},
}


def logistic(
    one: Numbers, better: int, worse: int, anchor: Grid, beta: float, weight: float
) -> Answer:
    """-weight log sigma(beta (gap of log-ratios to the anchor)), averaged over the prompts."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"accuracy": 0.0, "margin": 0.0})
    prompts = len(one.mask)
    for p in range(prompts):
        gap = one.log_ratio(p, better, one.logp, anchor) - one.log_ratio(p, worse, one.logp, anchor)
        z = beta * gap
        answer.loss += weight * (log1p(exp(-z)) if z > 0 else log1p(exp(z)) - z) / prompts
        slope = -weight * beta / (1 + exp(z)) / prompts
        answer.push(one, p, better, slope)
        answer.push(one, p, worse, -slope)
        answer.watch["accuracy"] += (gap > 0) / prompts
        answer.watch["margin"] += abs(gap) / prompts
    return answer


def judge(algorithm: DirectAIHF | SelfPlayAIHF, one: Numbers) -> Answer:
    """The pair of the main stream."""
    if isinstance(algorithm, DirectAIHF):
        return logistic(one, 0, 1, one.logp_ref, algorithm.beta, 1.0)
    demo, drawn = one.source.index("demo"), one.source.index("policy")
    return logistic(one, demo, drawn, one.logp_old, algorithm.play_beta, algorithm.demo_weight)


def side(algorithm: DirectAIHF | SelfPlayAIHF, one: Numbers) -> Answer:
    """A demonstration's likelihood, or a preference pair."""
    if isinstance(algorithm, SelfPlayAIHF):
        return replace(logistic(one, 0, 1, one.logp_ref, algorithm.beta, 1.0), watch={})
    answer = Answer(0.0, one.zeros(), one.zeros())
    for p in range(len(one.mask)):
        share = algorithm.demo_weight / len(one.mask)
        answer.loss -= share * one.log_ratio(p, 0, one.logp, one.zeros())
        answer.push(one, p, 0, -share)
    return answer
