"""Each algorithm again, one response and one token at a time: plain Python numbers, no tensors.

An oracle is the module of its algorithm's module name and derives its gradients by hand. It shares no
line with the code under test, not even the mean. It has

    judge(algorithm, one)   what `prepare`, `loss` and `watch` come to
    side(algorithm, one)    the same of `side_loss`, where there is a second stream
    VARIANTS                yaml name -> settings beside the shipped ones to compare under; [{}] if absent
    LEARNS                  yaml name -> settings under which enumerated gradients lead to
                            pi_ref exp(r / beta) / Z on the toy worlds, or None if theory says they lead
                            elsewhere (then a test of the family's own says where); {} if absent
    TEACHES_ALONE           yaml names that learn something even from equal responses; () if absent
    ALIVE_UNDER             field -> other settings without which that field is rightly without effect
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

Row = list[float]
Grid = list[list[Row]]


@dataclass(frozen=True)
class Numbers:
    """A case as nested lists; per-token entries are [p][g][t], per-response ones [p][g]."""

    mask: Grid
    logp_old: Grid
    logp_ref: Grid
    score: list[Row]
    value_old: Grid
    coin: list[Row]
    logp: Grid
    value: Grid
    logp_guide: Grid
    entropy: Grid
    score_now: list[Row]
    source: tuple[str, ...]
    logps: list[Grid]
    """[p][g][t][v], like the next two."""
    logps_ref: list[Grid]
    q: list[Grid]
    q_taken: Grid
    reward: Grid | None = None

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """The places of all response tokens."""
        for p, group in enumerate(self.mask):
            for g, row in enumerate(group):
                for t, here in enumerate(row):
                    if here:
                        yield p, g, t

    def pairs(self) -> list[tuple[int, int]]:
        """The unordered pairs of responses to one prompt."""
        return list(combinations(range(len(self.mask[0])), 2))

    def log_ratio(self, p: int, g: int, top: Grid, bottom: Grid) -> float:
        """Sum over the tokens of one response of top - bottom."""
        length = int(sum(self.mask[p][g]))
        return sum(top[p][g][t] - bottom[p][g][t] for t in range(length))

    def zeros(self) -> Grid:
        """A gradient to add to."""
        return [[[0.0 for _ in row] for row in group] for group in self.mask]


@dataclass
class Answer:
    """What an oracle says: the averaged loss, its gradients, the averaged watched numbers."""

    loss: float
    d_logp: Grid
    d_value: Grid
    watch: dict[str, float] = field(default_factory=dict)
    d_entropy: Grid | None = None
    """None where the algorithm does not look at it."""
    d_score: list[Row] | None = None
    """Likewise, as the next three."""
    d_logps: list[Grid] | None = None
    d_q: list[Grid] | None = None
    d_q_taken: Grid | None = None

    def push(self, one: Numbers, p: int, g: int, slope: float) -> None:
        """Add d loss / d h of one response to each of its tokens: h is their sum."""
        for t in range(int(sum(one.mask[p][g]))):
            self.d_logp[p][g][t] += slope
