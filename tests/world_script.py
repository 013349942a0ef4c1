"""A miniature RL run without files: prints what each ZeRO stage makes of three rollouts.

Run in one process, or by DeepSpeed's launcher in several: `python tests/world_script.py OUT [CASE…]`, a case
being a ZeRO stage and words after it: lora for adapters alone, optimizer or all for what is offloaded, layers
for a policy that is gathered layer by layer, sharded or host for where frozen models are.
Rank 0 writes OUT, a JSON of {algorithm-case: [losses and gradient norms]}, and of several processes what
came of responses of which the first process's end at once and the others' never ("uneven").
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from rlhf_cli.config import compose, recipe
from rlhf_cli.core.algorithm import Model as Needed
from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.order import shuffled
from rlhf_cli.engine.placement import in_step, placed
from rlhf_cli.engine.rollout import PLAIN, Asked, Collector, Judges
from rlhf_cli.engine.world import World, start
from rlhf_cli.models.heads import Actor, Scorer
from rlhf_cli.models.load import new_policy, new_reward_model, zero_head
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.models.tuning import tuned
from rlhf_cli.recipes import Guard as GuardRule
from rlhf_cli.recipes import Launch, Lora, Model, Optim, Scratch, Tuning, Update
from rlhf_cli.stages.guard import Guard
from rlhf_cli.stages.rl import Stream, _step

ALGORITHMS = ("p3o_v2", "ppo", "aihf")
"""One without a second model that learns, one with a critic, one with a reward model and two streams."""
PROMPTS = [Asked(list(range(5, 5 + n))) for n in (3, 9, 5, 7, 4, 6, 8, 3)]
MODEL = Model("tiny", "nano", Scratch(2, 32, 2, 300, 64, 3), None, None, "fp32", Tuning(None, None))
OPTIM = Optim(3e-4, "linear", 0.1, (0.9, 0.95), 1e-4, 0.0, 0.5)
"""eps is large: with 1e-8 Adam makes a step of full size out of a gradient that is rounding alone."""
UPDATE = Update(episodes=48, batch=16, epochs=1, minibatches=2)


def shipped(name: str) -> Any:
    """An algorithm as shipped, on this script's budget and optimiser."""
    return replace(recipe(compose([f"algo={name}"])).algo, update=UPDATE, optim=OPTIM)


def a_launch(**changes: Any) -> Launch:
    """As shipped, but for some of it."""
    return replace(recipe(compose([])).launch, timeout=60, **changes)


def launched(case: str, world: World, micro_batch: int) -> tuple[Launch, Tuning]:
    """What the words of a case mean."""
    zero, *words = case.split("-")
    lora = Lora(4, 8, ("all-linear",)) if "lora" in words else None

    def among(choices: tuple[str, ...], otherwise: str) -> str:
        return next((word for word in words if word in choices), otherwise)

    launch = a_launch(
        kind="deepspeed", processes=world.size, zero=int(zero), micro_batch=micro_batch,
        offload=among(("optimizer", "all"), "none"), gather=among(("layers",), "whole"),
        frozen=among(("sharded", "host"), "whole"),
    )  # fmt: skip
    return launch, Tuning(lora, None)


def run(world: World, algo: Any, case: str, micro_batch: int) -> list[dict[str, float]]:
    """Metrics of every optimiser step of three rollouts."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300, 64)
    launch, tuning = launched(case, world, micro_batch)
    policy, ref = (
        tuned(new_policy(MODEL, tokenizer), tuning, "model", 1),
        new_policy(MODEL, tokenizer),
    )
    judge = new_reward_model(MODEL, None, tokenizer, 1)
    has_critic, has_q = (model in algo.needs for model in (Needed.CRITIC, Needed.Q))
    actor = Actor(
        policy,
        critic=new_reward_model(MODEL, None, tokenizer, 1) if has_critic else None,
        reward=new_reward_model(MODEL, None, tokenizer, 1) if algo.trains_reward else None,
        q=zero_head(new_policy(MODEL, tokenizer)) if has_q else None,
    )
    rates = {n: 3e-4 for n in ("critic", "reward", "q") if getattr(actor, n) is not None}
    learner = Learner(actor, OPTIM, 6, launch, world, "fp32", rates)
    ref, scorer = placed(ref, launch, world), placed(Scorer(judge), launch, world)
    collector = Collector(
        world, tokenizer, Judges(ref, scorer), micro_batch, 12, 1,
        soft_beta=0.1 if has_q else None, together=world.size > 1 and in_step(launch),
    )  # fmt: skip
    ctx = SimpleNamespace(
        recipe=SimpleNamespace(algo=algo, launch=launch, rollout=PLAIN),
        world=world,
        guard=Guard(GuardRule(skips=0, kl=None, action="warn"), print),
    )
    seen, state = [], {}
    for index in range(3):
        sampling, side = algo.sampling(), algo.side()
        prompts = PROMPTS * max(1, 2 // sampling.responses)
        with learner.whole() as actor:
            rollout, _ = collector.collect(actor, given(prompts, sampling), sampling, "a", index)
            beside = []
            if side.responses:
                read, _ = collector.collect(actor, given(prompts, side), side, "b", index)
                beside = [Stream(read, Targets(), second=True)]
        targets, state = algo.prepare(rollout, state)
        streams = [Stream(rollout, targets), *beside]
        for part in shuffled(len(prompts), 1, index).reshape(2, -1):
            prompts_now = torch.from_numpy(part)
            seen.append(_step(ctx, learner, collector, streams, prompts_now, None))
    return seen


def given(prompts: list[Asked], sampling: Sampling) -> list[Asked]:
    """The prompts with as many responses as are not drawn."""
    count = sampling.dataset + sampling.demo + sampling.mismatch
    return [
        replace(each, given=tuple([7 + i, 9, 11 + n, 0] for n in range(count)))
        for i, each in enumerate(prompts)
    ]


def uneven(world: World) -> dict[str, Any]:
    """Tokens of a response of each process: twice, the second time with another end on the first process."""
    launch, _ = launched("3-layers", world, 4)
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300, 64)
    learner = Learner(Actor(new_policy(MODEL, tokenizer)), OPTIM, 1, launch, world, "fp32")
    drawn = []
    for end in (None, "first token"):
        rank = torch.distributed.get_rank()
        eos = drawn[0][0][0] if end and rank == 0 else -1
        words = SimpleNamespace(eos_token_id=eos, pad_token_id=0)
        collector = Collector(world, words, Judges(None, None), 4, 12, 1, together=True)  # type: ignore[arg-type]
        with learner.whole() as actor:
            said, _ = collector.collect(actor, PROMPTS[: world.size], Sampling(policy=1), "u", 0)
        rows = zip(said.tokens[:, 0, -12:], said.mask[:, 0].bool(), strict=True)
        drawn.append([row[mask].tolist() for row, mask in rows])
    return {"before": drawn[0], "after": drawn[1]}


def main(out: str, cases: list[str]) -> None:
    world = start(60)
    rows: dict[str, Any] = {
        f"{name}-{case}": run(world, shipped(name), case, 4)
        for case in cases
        for name in (ALGORITHMS if case in "0123" else ALGORITHMS[:1])
    }
    rows["p3o_v2-0-micro-16"] = run(world, shipped("p3o_v2"), "0", 16)
    if world.size > 1:
        rows["uneven"] = uneven(world)
    if world.is_main:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
