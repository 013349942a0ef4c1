"""A miniature RL run without files: prints what each ZeRO stage makes of three rollouts.

Run in one process, or by DeepSpeed's launcher in several: `python tests/world_script.py OUT [STAGE…]`.
Rank 0 writes OUT, a JSON of {stage: [losses and gradient norms]}.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch

from rlhf_cli.algos.p3o import P3O
from rlhf_cli.algos.ppo import PPO
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.order import shuffled
from rlhf_cli.engine.rollout import Collector, Judges
from rlhf_cli.engine.world import start
from rlhf_cli.models.heads import Actor, Scorer
from rlhf_cli.models.load import new_policy, new_reward_model
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.recipes import Launch, Model, Optim, Scratch, Update
from rlhf_cli.stages.rl import _step

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 5, 7, 4, 6, 8, 3)]
MODEL = Model("tiny", "nano", Scratch(2, 32, 2, 300, 64, 3), None, None, "fp32")
OPTIM = Optim(1e-3, "linear", 0.1, (0.9, 0.95), 1e-8, 0.0, 0.5)
UPDATE = Update(episodes=48, batch=16, epochs=1, minibatches=2)
P3O_V2 = P3O("joint", 0.1, 0.2, 10.0, 2, "update", UPDATE, OPTIM)
PPO_ = PPO(0.1, 1.0, 0.95, 0.2, 0.2, 0.1, True, 1e-3, UPDATE, OPTIM)


def run(world, algo, zero: int, micro_batch: int) -> list[dict[str, float]]:
    """Metrics of every optimiser step of three rollouts."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300, 64)
    policy, ref = new_policy(MODEL, tokenizer), new_policy(MODEL, tokenizer)
    judge = new_reward_model(MODEL, None, tokenizer, 1)
    critic = new_reward_model(MODEL, None, tokenizer, 1) if isinstance(algo, PPO) else None
    launch = Launch("deepspeed", world.size, zero, micro_batch, 60)
    rates = {"critic": 1e-3} if critic else {}
    learner = Learner(Actor(policy, critic), OPTIM, 6, launch, world, "fp32", rates)
    collector = Collector(world, tokenizer, Judges(ref, Scorer(judge)), micro_batch, 16, 12, 1)
    ctx = SimpleNamespace(recipe=SimpleNamespace(algo=algo, launch=launch), world=world)
    seen, state = [], {}
    for index in range(3):
        sampling = algo.sampling()
        prompts = PROMPTS * (2 // sampling.responses)
        with learner.whole() as actor:
            rollout, _ = collector.collect(actor, prompts, sampling, "train", index)
        targets, state = algo.prepare(rollout, state)
        for part in shuffled(len(prompts), 1, index).reshape(2, -1):
            seen.append(_step(ctx, learner, rollout, targets, torch.from_numpy(part)))
    return seen


def main(out: str, stages: list[int]) -> None:
    world = start(60)
    rows = {
        f"{name}-{zero}": run(world, algo, zero, 4)
        for name, algo in (("p3o", P3O_V2), ("ppo", PPO_))
        for zero in stages
    }
    rows["p3o-0-micro-16"] = run(world, P3O_V2, 0, 16)
    if world.is_main:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
