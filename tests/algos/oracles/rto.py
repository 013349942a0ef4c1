"""RTO token by token: PPO's losses on the rewards of this file."""

from __future__ import annotations

from rlhf_cli.algos.rto import RTO
from tests.algos.oracles import Answer, Grid, Numbers
from tests.algos.oracles.ppo import clipped, held

VARIANTS = {
    "rto": [
        {},
        {"guide_coef": 0.7, "guide_clip": 0.1, "score_coef": 0.3, "reward_clip": 0.5},
        {"guide_clip": None, "reward_clip": None, "whiten_advantage": False, "gamma": 0.9},
    ]
}
LEARNS = {
    # The guide of those worlds is the reference, so that what it pays is 0; for moments see ppo.py.
    "rto": {"whiten_advantage": False}
}


def judge(algorithm: RTO, one: Numbers) -> Answer:
    """The guide's preference, the penalty and the score at the end, then PPO."""
    guided: Grid = one.zeros()
    reward: Grid = one.zeros()
    for p, g, t in one.tokens():
        ref = one.logp_ref[p][g][t]
        guided[p][g][t] = algorithm.guide_coef * held(
            one.logp_guide[p][g][t] - ref, algorithm.guide_clip
        )
        reward[p][g][t] = guided[p][g][t] - algorithm.beta * (one.logp_old[p][g][t] - ref)
        if t == sum(one.mask[p][g]) - 1:
            reward[p][g][t] += algorithm.score_coef * held(one.score[p][g], algorithm.reward_clip)
    answer = clipped(algorithm, one, reward, one.logp_old)
    places = list(one.tokens())
    answer.watch["guide_reward"] = sum(guided[p][g][t] for p, g, t in places) / len(places)
    return answer
