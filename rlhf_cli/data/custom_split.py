"""Examples of one split to what the stages read: demonstrations, pairs and prompts.

Answers become pairs: each one labelled good with each one labelled bad, and of scored ones the best with
the worst, one pair a prompt. Preferred answers, and good ones, are the demonstrations of a split that has
none of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from rlhf_cli.data.corpus import BadRow, Demo, Drops, Pair, Split, unique
from rlhf_cli.data.custom_rows import Example, Shape


def split_of(examples: Sequence[Example], drops: Drops) -> Split:
    """What the examples of a split are to the stages."""
    by_shape: dict[Shape, list[Example]] = {}
    for example in examples:
        by_shape.setdefault(example.shape, []).append(example)
    pairs = [_compared(each) for each in by_shape.get("preference", [])]
    good = [each for each in by_shape.get("labelled", []) if each.worth]
    for group in _by_prompt(by_shape.get("labelled", [])):
        pairs += _labelled(group, drops)
    for group in _by_prompt(by_shape.get("scored", [])):
        pairs += _scored(group, drops)
    demos = tuple(_demo(each) for each in by_shape.get("demonstration", []))
    preferred = [Demo(pair.prompt, pair.chosen, pair.where) for pair in pairs]
    preferred += [_demo(each) for each in good]
    return Split(demos or unique(preferred), tuple(pairs), unique(each.prompt for each in examples))


def _demo(example: Example) -> Demo:
    (response,) = example.answers
    return Demo(example.prompt, response, example.where)


def _compared(example: Example) -> Pair:
    chosen, rejected = example.answers
    return Pair(example.prompt, chosen, rejected, where=example.where)


def _by_prompt(examples: Iterable[Example]) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    return list(groups.values())


def _labelled(group: Sequence[Example], drops: Drops) -> Iterator[Pair]:
    """Each good answer to a prompt with each bad one."""
    good, bad = ([each for each in group if bool(each.worth) is kind] for kind in (True, False))
    if not (good and bad):
        for each in group:
            drops.add(f"no {'bad' if good else 'good'} answer to compare with", each.where)
    for one, other in product(good, bad):
        yield from _pair(one, other, drops)


def _scored(group: Sequence[Example], drops: Drops) -> Iterator[Pair]:
    """The best answer to a prompt with the worst; the first of equals."""
    best, worst = max(group, key=lambda each: each.worth), min(group, key=lambda each: each.worth)
    if best.worth == worst.worth:
        cause = "all scores are the same" if len(group) > 1 else "no other answer to compare with"
        for each in group:
            drops.add(cause, each.where)
    else:
        yield from _pair(best, worst, drops)


def _pair(one: Example, other: Example, drops: Drops) -> Iterator[Pair]:
    if one.answers == other.answers:
        what = f"the same answer to the same prompt is judged otherwise in {one.where}"
        drops.bad(BadRow("identical pair", other.where, what))
    else:
        (chosen,), (rejected,) = one.answers, other.answers
        yield Pair(one.prompt, chosen, rejected, where=f"{one.where} and {other.where}")
