"""GRPO and its relatives token by token."""

from __future__ import annotations

from math import exp, sqrt

from rlhf_cli.algos.grpo import GRPO
from tests.algos.oracles import Answer, Numbers, Row

NAMES = ("grpo", "dr_grpo", "dapo", "gspo")
VARIANTS = {
    "grpo": [{}, {"scale": "population", "beta": 0.0, "clip_high": 0.5, "responses": 3}],
    "dr_grpo": [{"max_tokens": 13}, {"max_tokens": 7, "responses": 3, "ratio_level": "sequence"}],
    "dapo": [
        {},
        # Two responses, so that a response drawn twice leaves nothing to compare.
        {"responses": 2, "max_tokens": 5, "overlong": 0.6, "std_eps": 0.3},
        {"responses": 2, "max_tokens": 5, "overlong": 1.0, "aggregate": "response"},
    ],
    "gspo": [{}, {"aggregate": "token", "clip_low": 0.05, "clip_high": 0.1, "responses": 4}],
}
LEARNS = dict.fromkeys(NAMES)  # the KL in the loss pulls the other way round: test_grpo.py
TEACHES_ALONE = NAMES  # the KL does, where the reward has nothing to say
ALIVE_UNDER = {
    "std_eps": {"scale": "sample"},
    "max_tokens": {"aggregate": "constant"},
    "overlong": {"max_tokens": 5},
}


def advantages(algorithm: GRPO, one: Numbers, p: int) -> Row:
    """Of the responses to one prompt, before any prompt is left out."""
    rewards = []
    for g, score in enumerate(one.score[p]):
        length, room = sum(one.mask[p][g]), algorithm.overlong * algorithm.max_tokens
        over = length - algorithm.max_tokens + room
        rewards.append(score - (min(over / room, 1.0) if over > 0 and room > 0 else 0.0))
    mean = sum(rewards) / len(rewards)
    if algorithm.scale == "none":
        return [r - mean for r in rewards]
    divisor = len(rewards) - (algorithm.scale == "sample")
    deviation = sqrt(sum((r - mean) ** 2 for r in rewards) / divisor)
    return [(r - mean) / (deviation + algorithm.std_eps) for r in rewards]


def shares(algorithm: GRPO, one: Numbers, prompts: list[int]) -> list[Row]:
    """[p][g] weight of each token in a mean over some prompts alone, 0 in the others."""
    lengths = [[sum(row) for row in group] for group in one.mask]
    tokens = sum(sum(lengths[p]) for p in prompts)
    count = len(prompts) * len(one.mask[0])

    def weight(length: float) -> float:
        if algorithm.aggregate == "token":
            return 1 / tokens
        return 1 / count / (algorithm.max_tokens if algorithm.aggregate == "constant" else length)

    return [[weight(x) if p in prompts else 0.0 for x in row] for p, row in enumerate(lengths)]


def judge(algorithm: GRPO, one: Numbers) -> Answer:
    """A clipped surrogate over the prompts that are kept and a KL estimate over all."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"clip_fraction": 0.0})
    everyone = list(range(len(one.mask)))
    kept = [p for p in everyone if not algorithm.drop_equal or len(set(one.score[p])) > 1]
    share, all_share = shares(algorithm, one, kept), shares(algorithm, one, everyone)
    total = len(list(one.tokens()))
    for p in everyone:
        advantage = advantages(algorithm, one, p)
        for g, a in enumerate(advantage):
            length = int(sum(one.mask[p][g]))
            nats = [one.logp[p][g][t] - one.logp_old[p][g][t] for t in range(length)]
            if algorithm.ratio_level == "sequence":
                nats = [sum(nats) / length] * length
            slopes = []
            for t, x in enumerate(nats):
                rho = exp(min(max(x, -20.0), 20.0))
                low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
                cut = rho > high if a > 0 else rho < low
                cut = cut and a != 0 and p in kept
                edge = high if a > 0 else low
                answer.loss -= share[p][g] * a * (edge if cut else rho)
                slopes.append(0.0 if cut or abs(x) > 20 else -share[p][g] * a * rho)
                answer.watch["clip_fraction"] += cut / total
                u = one.logp[p][g][t] - one.logp_ref[p][g][t]
                back = exp(min(max(-u, -20.0), 20.0))
                answer.loss += all_share[p][g] * algorithm.beta * (back - 1 + u)
                slope = 1.0 if abs(u) > 20 else 1 - back
                answer.d_logp[p][g][t] += all_share[p][g] * algorithm.beta * slope
            if algorithm.ratio_level == "sequence":
                slopes = [sum(slopes) / length] * length
            for t, slope in enumerate(slopes):
                answer.d_logp[p][g][t] += slope
    return answer
