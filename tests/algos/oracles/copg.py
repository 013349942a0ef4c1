"""CoPG by the paper's gradient: each response pushed by how far it exceeds the others."""

from __future__ import annotations

from rlhf_cli.algos.copg import CoPG
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "copg": [{}, {"beta": 0.7, "responses": 4}],
    "copg_offline": [{}, {"beta": 0.05}],
}
ALIVE_UNDER = {"responses": {"data": "online"}}  # a preference pair has two


def judge(algorithm: CoPG, one: Numbers) -> Answer:
    """d loss / d log pi of response i is minus the mean over pairs of R_i - R_j."""
    answer = Answer(0.0, one.zeros(), one.zeros(), {"regularised_variance": 0.0})
    prompts = len(one.mask)
    for p, group in enumerate(one.score):
        size = len(group)
        gains = [
            score - algorithm.beta * one.log_ratio(p, g, one.logp, one.logp_ref)
            for g, score in enumerate(group)
        ]
        mean = sum(gains) / size
        variance = sum((gain - mean) ** 2 for gain in gains) / (size - 1)
        # The mean squared difference of a pair is twice the variance.
        answer.loss += variance / algorithm.beta / prompts
        answer.watch["regularised_variance"] += variance / prompts
        for g, gain in enumerate(gains):
            above = sum(gain - other for other in gains)
            answer.push(one, p, g, -above / (size * (size - 1) / 2) / prompts)
    return answer
