"""Nash-MD: the policy's response, its opponent, and the penalty."""

from __future__ import annotations

from rlhf_cli.algos.nash_md import NashMD
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import sigmoid

VARIANTS = {"nash_md": [{}, {"beta": 0.4, "mixture": 0.125}]}
LEARNS = {"nash_md": None}  # win rates, not rewards
TEACHES_ALONE = ("nash_md",)  # the penalty does


def judge(algorithm: NashMD, one: Numbers) -> Answer:
    """Only the first response is pushed, up by its advantage."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"win_rate": 0.0})
    prompts = len(one.mask)
    for p, (ours, theirs) in enumerate(one.score):
        chance = sigmoid(ours - theirs)
        spent = algorithm.beta * one.log_ratio(p, 0, one.logp_old, one.logp_ref)
        slope = (0.5 + spent - chance) / prompts
        answer.loss += slope * one.log_ratio(p, 0, one.logp, one.zeros())
        answer.push(one, p, 0, slope)
        answer.watch["win_rate"] += chance / prompts
    return answer
