"""Trains undisturbed twins and runs that are stopped on the way; `tests/test_resume.py` compares them.

Run in one process, or by DeepSpeed's launcher in several: `python tests/resume_script.py FOLDER CASE...`, all
cases of `CASES` that so many processes can carry out if none is named. Undisturbed runs are kept in
FOLDER/whole, which the cases share, the others in FOLDER/stopped/CASE. Rank 0 writes FOLDER/out.json:
{case: [{run: STAGE/NAME, asked: how often its twin asked whether to stop, place: at which of these it heard a
signal, said: the sentence it ended with}...]}.

Rank 0 is the driver of the real command, but for one thing: it starts no launcher, since the other processes
are there already and wait for run directories to work on.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from rlhf_cli import launch
from rlhf_cli.config import compose
from rlhf_cli.engine.stop import Stop
from rlhf_cli.engine.world import World, start
from rlhf_cli.errors import Stopped
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.run import Run
from rlhf_cli.worker import work
from tests.algos.discovery import NAMES, shipped

SMALL = [
    "model.scratch.layers=1", "model.scratch.width=32", "model.scratch.heads=2",
    "model.scratch.vocab=320", "data.embedded.prompts=200", "data.embedded.demos=64",
    "data.embedded.pairs=64", "data.embedded.heldout=16", "data.max_prompt_tokens=160",
    "data.max_response_tokens=12", "eval.prompts=4", "eval.points=2", "reward.calibration=8",
    "reward.unended=null",  # so untrained, few answers end, and all of the others would score alike
    "sft.epochs=2", "sft.batch=16", "reward.epochs=2", "reward.batch=16",
]  # fmt: skip
"""Eight steps of SFT and of the reward model."""
ROLLOUTS = ["algo.update.episodes=144", "algo.update.batch=48", "algo.update.minibatches=2"]
"""Three rollouts that every number of responses up to four divides, also between two processes."""
LORA = "model.tuning.lora={rank: 4, alpha: 8, targets: [all-linear]}"
GUESS = [
    "data=guess", "data.max_prompt_tokens=104", "data.max_response_tokens=40", "algo.update.batch=16",
    "algo.update.episodes=48",
]  # fmt: skip
MEMORY = ["algo.kl_target=6", "algo.reward_scale=normalize", "algo.critic_rollouts=1"]
"""All that PPO may carry from one rollout to the next."""


def algorithm(name: str) -> list[str]:
    """The words for an algorithm on three rollouts of two steps."""
    words = [f"algo={name}", *ROLLOUTS]
    if getattr(shipped(name), "responses", 1) > 4:
        words.append("algo.responses=4")
    if name == "rto":
        words += [word.replace("algo.", "algo.guide.algo.") for word in ROLLOUTS]
    return words


VARIANTS = {
    "ppo-remembering": [
        *algorithm("ppo"), *MEMORY, "rollout.noise=0.5", "rollout.temperature=0.9",
    ],
    "copg-replay": [*algorithm("copg"), "algo.replay=3"],
    "xpo-replay": [*algorithm("xpo"), "algo.replay=2"],
    "apa-epochs": [*algorithm("apa"), "algo.update.epochs=2"],
    "ppo-lora": [*algorithm("ppo"), LORA],
    "etpo-lora": [*algorithm("etpo"), LORA],
    "p3o_v2-top-layer": [*algorithm("p3o_v2"), "model.tuning.layers=1"],
    "ppo-guess": [*algorithm("ppo"), *GUESS],
    "etpo-guess": [*algorithm("etpo"), *GUESS],
    "p3o_v2-tldr": [*algorithm("p3o_v2"), "data=tldr"],
    "rloo-normalise-none": [*algorithm("rloo"), "reward.normalise=none"],
    "ppo-eased": [*algorithm("ppo"), "guard.kl=1e-6", "guard.action=back_off"],
    "p3o_v2-wandb": [*algorithm("p3o_v2"), "track=wandb", "track.mode=offline"],
    "ppo-bf16": [*algorithm("ppo"), "model.precision=bf16"],
    "etpo-bf16": [*algorithm("etpo"), "model.precision=bf16"],
    # Runs of their own: as seed 1 they would be those of ZeRO 2, which adds up in another order.
    "ppo-zero-0": [*algorithm("ppo"), "launch.zero=0", "seed=2"],
    "ppo-zero-1": [*algorithm("ppo"), "launch.zero=1", "seed=3"],
    "etpo-zero-3": [*algorithm("etpo"), "launch.zero=3", "seed=2"],
}  # fmt: skip
STAGES = {"sft": ["stage=sft"], "reward": ["stage=reward"]}
CHAINS = {"chain": algorithm("rto")}
"""These begin with nothing, and are stopped once in every stage."""
CASES = {**STAGES, **{name: algorithm(name) for name in NAMES}, **VARIANTS, **CHAINS}
SHARDED = [name for name in VARIANTS if "-zero-" in name]
"""Cases that need several processes."""


@dataclass
class Signals:
    """Counts how often each run asks whether to stop, and sends it a signal at a chosen one of these."""

    asked: Counter[Path] = field(default_factory=Counter)
    due: dict[Path, int] = field(default_factory=dict)
    """Run directory to place, from 1 on."""

    def listen(self) -> None:
        """Stands between the loops and what they ask."""
        answer = Stop.asked

        def asked(stop: Stop) -> str:
            run = stop._file.parents[1]
            self.asked[run] += 1
            if self.asked[run] == self.due.get(run):
                signal.raise_signal(signal.SIGTERM)
            return answer(stop)

        Stop.asked = asked  # type: ignore[method-assign]


def composed(words: list[str], store: Path, world: World) -> Plan:
    """What the command would do with these words."""
    launched = [] if world.size == 1 else ["launch=deepspeed", f"launch.processes={world.size}"]
    return plan(compose([*SMALL, *launched, "track=off", *words, f"paths.runs={store}"]))


def ended(chain: Plan) -> str:
    """The sentence with which a signal ended the chain, "" if it came to its end."""
    try:
        launch.execute(chain, "tests/resume_script.py")
    except Stopped as stopped:
        return str(stopped)
    return ""


def case(folder: Path, name: str, world: World, signals: Signals) -> list[dict[str, Any]]:
    """Trains a case undisturbed, then again with a signal in each stage that is built.

    An algorithm is stopped when it has learned something: an RL stage asks twice before its first step.
    """
    undisturbed = composed(CASES[name], folder / "whole", world)
    assert ended(undisturbed) == ""
    disturbed = composed(CASES[name], folder / "stopped" / name, world)
    found, rng = [], random.Random(name)
    for step, twin in zip(disturbed.steps, undisturbed.steps, strict=True):
        if step is not disturbed.steps[-1] and name not in CHAINS:
            shutil.copytree(twin.path, step.path)
            continue
        asked = signals.asked[twin.path]
        first = 3 if step.stage == "rl" else 1
        signals.due[step.path] = place = rng.randint(first, asked)
        run = f"{step.stage}/{step.path.name}"
        found.append({"run": run, "asked": asked, "place": place, "said": ended(disturbed)})
    assert ended(disturbed) == ""
    return found


def together(run: Run, *_: object) -> None:
    """In place of the launcher: hands the run directory to the other processes, and works on it too."""
    dist.broadcast_object_list([str(run.path)])
    work(run.path)


def serve() -> None:
    """What every process but the first does."""
    while path := _received():
        with contextlib.suppress(Stopped):
            work(Path(path))


def _received() -> str:
    box = [""]
    dist.broadcast_object_list(box)
    return box[0]


def main(folder: str, *names: str) -> None:
    world, signals, found = start(600), Signals(), {}
    if not world.is_main:
        serve()
        return
    launch._launch = together
    signals.listen()
    for name in names or [name for name in CASES if world.size > 1 or name not in SHARDED]:
        began = time.perf_counter()
        found[name] = case(Path(folder), name, world, signals)
        print(f"{time.perf_counter() - began:6.1f} s  {name}", flush=True)
    if world.size > 1:
        dist.broadcast_object_list([""])
    Path(folder, "out.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
