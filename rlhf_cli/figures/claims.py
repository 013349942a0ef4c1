"""When a claim of a paper holds: the parts it is made of, each a difference that should be above 0.

It holds if the interval of every part lies above 0; asking that of all parts at once needs no correction.
It does not hold if some part is below 0 by more than chance, corrected for the number of parts that were
looked at (Holm 1979). Anything else is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.evals.bootstrap import Interval
from rlhf_cli.evals.matched import holm
from rlhf_cli.figures.result import Verdict

ALPHA = 0.05
"""Of the refutation, as of the intervals."""


@dataclass(frozen=True)
class Part:
    """One difference that a claim says is above 0."""

    said: str
    """What minus what, and where."""
    difference: Interval

    @property
    def sentence(self) -> str:
        """With its interval."""
        one = self.difference
        alone = ", one seed" if one.seeds == 1 else ""
        return f"{self.said}: {one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]{alone}"


def judge(parts: Sequence[Part]) -> tuple[Verdict, str]:
    """The verdict on the claim made of these parts, and the numbers behind it; open if there are none."""
    if not parts:
        return "open", "Nothing that the claim is about could be measured."
    reason = "; ".join(part.sentence for part in parts) + " (intervals of 95%)."
    if all(part.difference.low > 0 for part in parts):
        return "holds", reason
    corrected = holm([part.difference.p for part in parts])
    against = (part.difference.value < 0 for part in parts)
    if any(below and p < ALPHA for below, p in zip(against, corrected, strict=True)):
        return "does not hold", reason
    return "open", reason
