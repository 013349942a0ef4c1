"""RAFT response by response."""

from __future__ import annotations

from math import floor

from rlhf_cli.algos.raft import RAFT
from tests.algos.oracles import Answer, Numbers

VARIANTS = {
    "raft": [
        {},
        {"rank": "score", "responses": 2},
        {"select": "top", "share": 0.3, "responses": 3},
        {"select": "top", "share": 0.01, "rank": "score"},
        {"select": "threshold", "threshold": 0.4, "beta": 0.6},
        {"select": "threshold", "threshold": 50.0},
    ]
}
LEARNS = {
    "raft": None
}  # rank knows order and not size; where it leads instead is a test of its own
TEACHES_ALONE = ("raft",)  # the best of equals is learned, however equal they are
ALIVE_UNDER = {"share": {"select": "top"}, "threshold": {"select": "threshold"}}


def selected(algorithm: RAFT, one: Numbers) -> list[tuple[int, int]]:
    """(p, g) of each response that is learned from."""
    rank = {}
    for p, group in enumerate(one.score):
        for g, score in enumerate(group):
            cost = 0.0
            if algorithm.rank == "regularised":
                cost = algorithm.beta * one.log_ratio(p, g, one.logp_old, one.logp_ref)
            rank[p, g] = score - cost
    if algorithm.select == "threshold":
        return [place for place, s in rank.items() if s >= algorithm.threshold]
    # Sorting is stable in Python, and `max` returns the first of equals.
    if algorithm.select == "top":
        order = sorted(rank, key=lambda place: -rank[place])
        return order[: max(1, floor(algorithm.share * len(order)))]
    return [
        max(((p, g) for g in range(len(group))), key=lambda place: rank[place])
        for p, group in enumerate(one.score)
    ]


def judge(algorithm: RAFT, one: Numbers) -> Answer:
    """The mean over the selected of minus the log-probability of all their tokens."""
    answer = Answer(0.0, one.zeros(), one.zeros())
    kept = selected(algorithm, one)
    for p, g in kept:
        answer.loss -= one.log_ratio(p, g, one.logp, one.zeros()) / len(kept)
        answer.push(one, p, g, -1 / len(kept))
    answer.watch = {"selected": len(kept) / sum(len(group) for group in one.score)}
    return answer
