"""Where models that do not learn are while they are not asked (`launch.frozen`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import deepspeed
import torch
from torch import nn

from rlhf_cli.engine.world import World
from rlhf_cli.recipes import Launch

Frozen = TypeVar("Frozen", bound=nn.Module)


def placed(model: Frozen, launch: Launch, world: World) -> Frozen:
    """The model, put where it is to wait.

    Sharded, every module gathers its weights before its forward pass and lets go of them after it, so all
    processes must call it equally often.
    """
    if launch.frozen == "host":
        return model.cpu()
    model = model.to(world.device).requires_grad_(False)
    if launch.frozen == "sharded":
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(next(model.parameters()).dtype)
        deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "train_batch_size": world.size,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                **({half: {"enabled": True}} if half else {}),
            },
            dist_init_required=False,
        )
    return model.eval()


def in_step(launch: Launch) -> bool:
    """Whether some model's layers are gathered from all processes whenever it is called."""
    return launch.frozen == "sharded" or (launch.zero == 3 and launch.gather == "layers")


@contextmanager
def present(models: Iterable[nn.Module | None], device: torch.device) -> Iterator[None]:
    """While those that wait in the host's memory are on the device."""
    away = [m for m in models if m is not None and next(m.parameters()).device.type != device.type]
    try:
        for model in away:
            model.to(device)
        yield
    finally:
        for model in away:
            model.cpu()
