"""AIHF prompt by prompt."""

from __future__ import annotations

from math import exp, log1p

from rlhf_cli.algos.aihf import AIHF
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "aihf": [
        {"demo_loss": "bt", "demo_weight": 0.7, "preference_weight": 1.9},
        {"demo_loss": "linear", "demo_weight": 1.3, "beta": 0.35, "responses": 2},
        {"demo_loss": "bt", "demo_weight": 0.0, "preference_weight": 0.0},
    ]
}


def falling(gap: float) -> tuple[float, float]:
    """-log sigma(gap) and its derivative."""
    return (log1p(exp(-gap)) if gap > 0 else log1p(exp(gap)) - gap), -1 / (1 + exp(gap))


def judge(algorithm: AIHF, one: Numbers) -> Answer:
    """Every draw of the policy against the other draws, and against the demonstration."""
    slopes = [[0.0 for _ in row] for row in one.score_now]
    answer = Answer(0.0, one.zeros(), one.zeros(), {"demo_accuracy": 0.0, "demo_gap": 0.0})
    answer.d_score = slopes
    drawn = [g for g, source in enumerate(one.source) if source == "policy"]
    demo = one.source.index("demo")
    share = 1 / (len(one.mask) * len(drawn))
    for p in range(len(one.mask)):
        gain = {
            g: one.score[p][g] - algorithm.beta * one.log_ratio(p, g, one.logp_old, one.logp_ref)
            for g in drawn
        }
        for g in drawn:
            others = [gain[j] for j in drawn if j != g]
            advantage = gain[g] - sum(others) / len(others)
            answer.loss -= share * advantage * one.log_ratio(p, g, one.logp, one.zeros())
            answer.push(one, p, g, -share * advantage)
            gap = one.score_now[p][demo] - one.score_now[p][g]
            if algorithm.demo_loss == "linear":
                loss, slope = -gap / algorithm.beta, -1 / algorithm.beta
            else:
                loss, slope = falling(gap)
            answer.loss += share * algorithm.demo_weight * loss
            slopes[p][demo] += share * algorithm.demo_weight * slope
            slopes[p][g] -= share * algorithm.demo_weight * slope
            answer.watch["demo_accuracy"] += share * (gap > 0)
            answer.watch["demo_gap"] += share * gap
    return answer


def side(algorithm: AIHF, one: Numbers) -> Answer:
    """The Bradley-Terry loss of a pair."""
    slopes = [[0.0 for _ in row] for row in one.score_now]
    answer = Answer(0.0, one.zeros(), one.zeros(), d_score=slopes)
    share = algorithm.preference_weight / len(one.mask)
    for (chosen, rejected), slope in zip(one.score_now, slopes, strict=True):
        loss, down = falling(chosen - rejected)
        answer.loss += share * loss
        slope[0], slope[1] = share * down, -share * down
    return answer
