"""SPPO response by response."""

from __future__ import annotations

from rlhf_cli.algos.sppo import SPPO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import sigmoid

VARIANTS = {"sppo": [{}, {"beta": 0.3, "responses": 2}]}
LEARNS = {"sppo": None}  # the anchor moves with the policy
TEACHES_ALONE = ("sppo",)  # a response that drew level is drawn back to where it was


def judge(algorithm: SPPO, one: Numbers) -> Answer:
    """Half the win rate's lead over the others' is the aim; the square has slope twice the miss."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    prompts, group = len(one.mask), len(one.mask[0])
    for p in range(prompts):
        for g, score in enumerate(one.score[p]):
            met = [sigmoid(score - other) for j, other in enumerate(one.score[p]) if j != g]
            aim = (sum(met) / len(met) - 0.5) / algorithm.beta
            miss = one.log_ratio(p, g, one.logp, one.logp_old) - aim
            answer.loss += miss**2 / (prompts * group)
            answer.push(one, p, g, 2 * miss / (prompts * group))
    return answer
