"""Online DPO and IPO: pairs of the policy's own, by the label of their scores."""

from __future__ import annotations

from rlhf_cli.algos.dpo_online import OnlineDPO
from tests.algos.oracles import Answer, Numbers
from tests.algos.oracles.dpo import compared, sigmoid

VARIANTS = {
    "dpo_online": [
        {"label": "soft"},
        {"label": "argmax"},
        {"label": "bernoulli", "beta": 0.7},
        {"label": "soft", "responses": 4},
    ],
    "ipo_online": [{"label": "soft"}, {"label": "argmax", "ipo_norm": "mean", "responses": 3}],
}
LEARNS = {
    "dpo_online": {"label": "soft"},  # argmax labels have no optimum
    "ipo_online": None,
}
ALIVE_UNDER = {"ipo_norm": {"pair_loss": "ipo"}}


def label(rule: str, one: Numbers, p: int, i: int, j: int) -> float:
    """Probability that response i is preferred to response j."""
    r_i, r_j = one.score[p][i], one.score[p][j]
    if rule == "argmax":
        return 0.0 if r_i < r_j else 1.0
    chance = sigmoid(r_i - r_j)
    if rule == "soft":
        return chance
    coin = one.coin[p][i] + one.coin[p][j]
    return 1.0 if (coin - 1 if coin >= 1 else coin) < chance else 0.0


def judge(algorithm: OnlineDPO, one: Numbers) -> Answer:
    """All pairs of the responses to a prompt."""
    places = [(p, i, j) for p in range(len(one.mask)) for i, j in one.pairs()]
    return compared(algorithm, one, {at: label(algorithm.label, one, *at) for at in places})
