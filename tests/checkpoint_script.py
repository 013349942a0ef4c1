"""Saves a learner after three steps, goes on for three more, and again from the checkpoint: are both equal?

Run in one process, or by DeepSpeed's launcher in several: `python tests/checkpoint_script.py FOLDER READ`.
Rank 0 writes FOLDER/out.json: {case: digests of all tensors after three steps and after six, then the same of
what was resumed}. With READ, a folder that another number of processes wrote, only its checkpoints are
resumed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from rlhf_cli.engine import checkpoint, masters
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.world import World, start
from rlhf_cli.recipes import Optim
from tests.world_script import a_launch

OPTIM = Optim(1e-2, "linear", 0.1, (0.9, 0.95), 1e-8, 0.01, 0.5)
CASES = [
    *((zero, precision, "none") for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)),
    *((zero, "fp32", "optimizer") for zero in (1, 2, 3)),
    (3, "fp32", "all"),
]
"""ZeRO stage, precision, what is offloaded."""
NAMES = ["-".join(map(str, case)) for case in CASES]


def learner(world: World, zero: int, precision: str, offload: str, seed: int) -> Learner:
    """Sizes that no number of processes divides, and a part that does not learn."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.GELU(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 3)
    )
    module[3].requires_grad_(False)
    if precision == "bf16":
        module = module.bfloat16()
    launch = a_launch(
        kind="deepspeed", processes=world.size, zero=zero, offload=offload, micro_batch=4
    )
    return Learner(module, OPTIM, 10, launch, world, precision)


def go_on(learner: Learner, world: World, steps: int) -> None:
    """Steps on rows that depend on the step alone."""
    for _ in range(steps):
        random = torch.Generator().manual_seed(learner.step_index)
        rows = torch.randn(8, 7, generator=random)[world.share(8)]
        rows = rows.to(next(learner.engine.module.parameters()).dtype)
        learner.engine.train()
        loss = learner.engine(rows).float().pow(2).sum() / 8
        learner.engine.set_gradient_accumulation_boundary(True)
        learner.engine.backward(loss * world.size, scale_wrt_gas=False)
        for group in learner.engine.optimizer.param_groups:
            group["lr"] = OPTIM.lr
        learner.engine.step()
        learner.step_index += 1


def digest(learner: Learner) -> str:
    """Of every tensor, bit by bit."""
    sha = hashlib.sha256()
    for name, tensor in masters.gathered(learner.engine, learner.launch.zero):
        sha.update(name.encode() + tensor.float().numpy().tobytes())
    return sha.hexdigest()


def main(folder: str, read: str = "") -> None:
    world, found = start(60), {}
    for case, name in zip(CASES, NAMES, strict=True):
        place = Path(read or folder) / name
        if not read:
            gone_on = learner(world, *case, seed=0)
            go_on(gone_on, world, 3)
            checkpoint.save(place, gone_on, world, {"mean": torch.ones(2)}, {"wall": 1.5}, 2)
            found[name] = [digest(gone_on)]
            go_on(gone_on, world, 3)
            found[name].append(digest(gone_on))
        resumed = learner(world, *case, seed=1)
        kept = checkpoint.resume(place, resumed)
        assert kept is not None and kept[0]["mean"].tolist() == [1, 1] and kept[1]["wall"] == 1.5
        assert resumed.step_index == 3
        found.setdefault(name, []).append(digest(resumed))
        go_on(resumed, world, 3)
        found[name].append(digest(resumed))
    if world.is_main:
        Path(folder, "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
