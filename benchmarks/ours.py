"""A run of this project as it is, timed between the batches of its own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from benchmarks.turns import Turns


def online(turns: Turns, words: list[str], parts: bool = False) -> None:
    """An RL stage whose parents are there: a turn is a batch, with all that is done and written for it.

    No response ends before its limit, so that all contestants draw equally many tokens. parts: whether to
    note what takes how long.
    """
    rollout, rl = (_module(name) for name in ("engine.rollout", "stages.rl"))
    drawing, asked = rollout.draw, rl.Feed.batch
    again = _gate(turns)

    def endless(
        experts: Any, prompts: Any, n: Any, u: Any, width: Any, end: Any, *rest: Any
    ) -> Any:
        with turns.part("drawing"):
            return drawing(experts, prompts, n, u, width, -1, *rest)

    def batch(feed: Any, count: int, index: int) -> Any:
        again()
        return asked(feed, count, index)

    rl.check_drawing = lambda *given: None  # takes a batch of its own, before the first turn
    rl.Feed.batch = batch
    rollout.draw = endless
    if parts:
        _note(turns)
    _run(turns, words)


def supervised(turns: Turns, words: list[str], stage: str) -> None:
    """A stage that learns from given rows, sft or reward: a turn is an optimiser step."""
    module = _module(f"stages.{stage}")
    fit, again = module.fit, _gate(turns)

    def gated(
        ctx: Any,
        learner: Any,
        rows: int,
        batch: int,
        seed: int,
        collate: Any,
        *rest: Any,
        **more: Any,
    ) -> None:
        def collated(index: Sequence[int]) -> Any:
            again()
            return collate(index)

        fit(ctx, learner, rows, batch, seed, collated, *rest, **more)

    module.fit = gated
    _run(turns, words)


def _gate(turns: Turns) -> Callable[[], None]:
    """What is to be called where a step begins, which is where the one before it ends."""
    begun: list[bool] = []

    def again() -> None:
        if begun:
            turns.end()
        turns.begin()
        begun.append(True)

    return again


def _module(name: str) -> Any:
    """One of ours, of which something is replaced in this process."""
    return import_module(f"rlhf_cli.{name}")


def _run(turns: Turns, words: list[str]) -> None:
    from rlhf_cli.config import compose
    from rlhf_cli.launch import execute
    from rlhf_cli.plan import plan

    learners = _module("engine.learner").Learner
    rehearse = learners.rehearse

    def rehearsed(learner: Any, *inputs: Any) -> None:
        turns.loaded()  # nothing has been computed before it
        rehearse(learner, *inputs)

    learners.rehearse = rehearsed
    execute(plan(compose(words)), "python -m benchmarks")


def _note(turns: Turns) -> None:
    """Has the parts of a step of RL noted, each without what is in another."""
    learners = _module("engine.learner").Learner
    collectors = _module("engine.rollout").Collector
    step = learners.step

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def within(*given: Any, **more: Any) -> Any:
            with turns.part(name):
                return call(*given, **more)

        return within

    def learned(learner: Any, parts: Any, judge: Any, *rest: Any) -> Any:
        if not hasattr(learner, "timed"):
            learner.engine.backward = timed("backward", learner.engine.backward)
            learner.engine.step = timed("optimiser", learner.engine.step)
            learner.timed = True
        return step(learner, parts, timed("forward", judge), *rest)

    collectors._ask = timed("reference", collectors._ask)
    collectors._score = timed("reward", collectors._score)
    learners.step = learned
