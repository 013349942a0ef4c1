"""DPO and IPO pair by pair, and what the other preference oracles have in common."""

from __future__ import annotations

from math import exp, log1p

from rlhf_cli.algos.dpo import DPO
from tests.algos.oracles import Answer, Grid, Numbers

VARIANTS = {
    "dpo": [
        {},
        {"noise": 0.1, "beta": 0.5},
        {"noise": 0.2, "robust": True},
        {"ipo_norm": "mean"},
    ],
    "ipo": [{}, {"ipo_norm": "mean", "beta": 0.4}, {"noise": 0.3}, {"noise": 0.3, "robust": True}],
}
LEARNS = {
    "dpo": {},
    "ipo": None,  # linear in the preference, where the closed form is linear in its log-odds
}
ALIVE_UNDER = {
    "ipo_norm": {"pair_loss": "ipo"},
    "noise": {"noise": 0.2},
    "robust": {"noise": 0.2},
}


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + exp(-x)) if x > 0 else exp(x) / (1 + exp(x))


def surprise(x: float) -> float:
    """-log sigmoid(x)."""
    return log1p(exp(-x)) if x > 0 else log1p(exp(x)) - x


def length(one: Numbers, p: int, g: int) -> int:
    """Tokens of a response."""
    return int(sum(one.mask[p][g]))


def place(one: Numbers, p: int, g: int, base: Grid, per_token: bool) -> tuple[float, float]:
    """log pi - base of a response, and what one token's log-probability moves it by."""
    share = 1 / length(one, p, g) if per_token else 1.0
    return one.log_ratio(p, g, one.logp, base) * share, share


def cost(kind: str, beta: float, gap: float) -> tuple[float, float]:
    """What a pair costs if its first response is the better one, and the slope in the gap."""
    if kind == "ipo":
        off = gap - 0.5 / beta
        return off * off, 2 * off
    return surprise(beta * gap), -beta * sigmoid(-beta * gap)


def either(kind: str, beta: float, gap: float, chance: float) -> tuple[float, float]:
    """The same if its first response is the better one with some chance only."""
    (won, up), (lost, down) = cost(kind, beta, gap), cost(kind, beta, -gap)
    return chance * won + (1 - chance) * lost, chance * up - (1 - chance) * down


def compared(algorithm: object, one: Numbers, chance: dict[tuple[int, int, int], float]) -> Answer:
    """Every pair (p, i, j) costs by its gap and by the chance that i is preferred to j."""
    kind, beta = algorithm.pair_loss, algorithm.beta  # type: ignore[attr-defined]
    per_token = kind == "ipo" and algorithm.ipo_norm == "mean"  # type: ignore[attr-defined]
    words = ("accuracy", "margin", "implicit_chosen", "implicit_rejected")
    answer = Answer(0.0, one.zeros(), one.zeros(), dict.fromkeys(words, 0.0))
    share = 1 / len(chance)
    for (p, i, j), prefers_i in chance.items():
        (h_i, move_i), (h_j, move_j) = (place(one, p, g, one.logp_ref, per_token) for g in (i, j))
        loss, slope = either(kind, beta, h_i - h_j, prefers_i)
        answer.loss += share * loss
        answer.push(one, p, i, share * slope * move_i)
        answer.push(one, p, j, -share * slope * move_j)
        answer.watch["accuracy"] += share * ((h_i > h_j) == (prefers_i > 0.5))
        answer.watch["margin"] += share * abs(h_i - h_j)
        better, worse = (i, j) if prefers_i > 0.5 else (j, i)
        for word, g in (("implicit_chosen", better), ("implicit_rejected", worse)):
            answer.watch[word] += share * beta * one.log_ratio(p, g, one.logp, one.logp_ref)
    return answer


def judge(algorithm: DPO, one: Numbers) -> Answer:
    """The first response is the preferred one, but for the noise in the labels."""
    eps = algorithm.noise
    chance = 1 - eps
    if algorithm.robust:
        # Solves chance (1 - eps) + (1 - chance) eps = 1: on average over wrong labels it is right.
        chance = 1 + eps / (1 - 2 * eps)
    return compared(algorithm, one, {(p, 0, 1): chance for p in range(len(one.mask))})
