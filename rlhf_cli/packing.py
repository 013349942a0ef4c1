"""How rows are cut into micro-batches and which of them share a sequence: whole numbers alone.

The engine goes by these rules (`engine.forward`, `models.sequence`), and estimates of memory with it.
"""

from __future__ import annotations

PARTS, ALIKE = 4, 8
"""Parts that a batch is cut into on a CPU for its lengths' sake, and groups that each has at least."""


def parts(groups: int, most: int, on_cpu: bool) -> int:
    """Into how many micro-batches of at most `most` so many groups are cut.

    On a CPU, where a call costs little beside its arithmetic, into more than memory asks for: what is
    sorted by length then has less padding. It depends on nothing but the number of groups, so that processes
    with as many rows make as many calls.
    """
    needed = -(-groups // most)
    return max(needed, min(PARTS, groups // ALIKE)) if on_cpu else needed


def largest(rows: int, most: int, group: int, on_cpu: bool) -> int:
    """Rows of the largest micro-batch that `rows` are cut into, at least a group of them."""
    groups = max(1, rows // group)
    return -(-groups // parts(groups, max(1, most // group), on_cpu)) * group


def together(hidden: int, prompt: int, response: int, group: int) -> int:
    """How many of `group` responses to a prompt go into one sequence behind it: what costs least.

    hidden: the model's width d; prompt, response: tokens. By the multiplications of a layer, which are 24 d^2
    for each token in its matrices and 4 d for each pair of tokens in its attention; pairs of tokens of two
    responses are formed too, and masked.
    """

    def cost(each: int) -> int:
        tokens = prompt + each * response
        return group // each * tokens * (6 * hidden + tokens)

    return min((each for each in range(1, group + 1) if group % each == 0), key=cost)
