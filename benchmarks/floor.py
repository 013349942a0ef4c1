"""What an online step costs at least: the arithmetic it cannot do without, at the best rate of the machine.

For P prompts of n tokens with G responses of T tokens, layers L, width w, vocabulary V, in floating-point
operations, of which a multiplication with its addition is two:

    token     24 L w^2     projections of attention (3 + 1) w^2 and of the perceptron (4 + 4) w^2
    pair       4 L w       a query and a key, a weight and a value; of earlier tokens and itself alone
    head       2 w V       a distribution over the next token

    drawing    n + G (T - 1) tokens and their pairs, G T heads: the last token drawn is not read again
    reference  the same: it is asked of what was drawn
    reward     n + G T tokens and their pairs, no head
    forward    as reference
    backward   twice the forward: a gradient to the inputs of each product and one to its weights

A prompt is read once for all its responses, and nothing is padded. `apart` is the work of a step that has
each response read with a prompt of its own and every prompt as long as the longest: G = 1, G P prompts.
Norms, activations, softmax, sampling, the optimiser and all that is moved in memory cost nothing here, so
no step reaches the floor.

The rate is that of `torch.matmul` at the shapes above, the best of them, measured in the same race.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.turns import Turns

WORK = 2e9
"""Operations at each shape in a turn: long enough to be sustained."""


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    layers: int
    width: int
    vocabulary: int

    def operations(self, tokens: float, pairs: float, heads: float) -> float:
        """Of a forward pass."""
        per_token = 24 * self.layers * self.width**2
        per_pair = 4 * self.layers * self.width
        return tokens * per_token + pairs * per_pair + heads * 2 * self.width * self.vocabulary


def step(
    shape: Shape, prompts: Sequence[int], each: int, reply: int, apart: bool = False
) -> dict[str, float]:
    """Operations of each part of a step; prompts: their lengths, in tokens."""
    lengths = list(prompts)
    if apart:
        lengths, each = [max(prompts)] * len(prompts) * each, 1
    read = _forward(shape, lengths, each, reply - 1, heads=reply)
    scored = _forward(shape, lengths, each, reply, heads=0)
    return {
        "drawing": read,
        "reference": read,
        "reward": scored,
        "forward": read,
        "backward": 2 * read,
    }


def _forward(shape: Shape, lengths: Sequence[int], each: int, reply: int, heads: int) -> float:
    tokens = sum(n + each * reply for n in lengths)
    pairs = sum(n * (n + 1) / 2 + each * (n * reply + reply * (reply + 1) / 2) for n in lengths)
    return shape.operations(tokens, pairs, len(lengths) * each * heads)


def products(turns: Turns, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Contestant: a part of a turn is `WORK` operations on matrices [n,i] and [i,o] of one size."""
    import torch

    pairs = {
        f"{n} x {i} x {o}": (torch.randn(n, i), torch.randn(i, o), round(WORK / (2 * n * i * o)))
        for n, i, o in sizes
    }
    turns.loaded()
    while True:
        with turns.turn():
            for name, (left, right, times) in pairs.items():
                with turns.part(name):
                    for _ in range(times):
                        torch.matmul(left, right)


def sizes(shape: Shape, tokens: int, heads: int) -> list[tuple[int, int, int]]:
    """Those that occur in a forward pass of so many tokens."""
    w = shape.width
    return [
        (tokens, w, 3 * w),
        (tokens, w, w),
        (tokens, w, 4 * w),
        (tokens, 4 * w, w),
        (heads, w, shape.vocabulary),
    ]


def rate(parts: Mapping[str, float]) -> float:
    """Operations per second at the best size of one turn."""
    return max(_done(name) / seconds for name, seconds in parts.items())


def _done(name: str) -> float:
    n, i, o = map(int, name.split(" x "))
    once = 2 * n * i * o
    return once * round(WORK / once)
