"""What AdamW knows, as whole fp32 tensors by name, however DeepSpeed keeps or shards it.

Of a parameter that learns: its master weights and both moments; of any other: its weights. A checkpoint
of these can be read by any number of processes and any ZeRO stage, without unpickling anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn.functional import pad

WEIGHT, MOMENTS, STEPS = "weight", ("exp_avg", "exp_avg_sq"), "steps"


def begin(engine: Any) -> None:
    """Counts steps from 0, whatever was taken to make room for the moments.

    DeepSpeed's wrapper of low-precision weights without ZeRO takes one, and AdamW's bias correction of the
    first real step would be that of the second.
    """
    for state in _adam(engine).state.values():
        state["step"].zero_()


def gathered(engine: Any, zero: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, whole and on the CPU, in every process; one after the other.

    engine: DeepSpeed's; zero: its stage. All processes must go through it together.
    """
    adam, masters = _adam(engine), _masters(engine) if zero == 0 else {}
    (steps,) = {float(state["step"]) for state in adam.state.values()}
    yield STEPS, torch.tensor(steps)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=zero == 3):
                yield f"{WEIGHT}/{name}", parameter.detach().cpu().clone()
            continue
        if zero == 0:
            master = masters.get(parameter, parameter)
            found = {WEIGHT: master, **{m: adam.state[master][m] for m in MOMENTS}}
        else:
            found = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
            found[WEIGHT] = safe_get_full_fp32_param(parameter)
        for kind, value in found.items():
            yield f"{kind}/{name}", value.detach().float().cpu().clone()


def restore(engine: Any, zero: int, read: Callable[[str], Tensor]) -> None:
    """Puts back what `gathered` gave; read: from a name to its tensor. Raises KeyError if one is missing."""
    adam, masters = _adam(engine), _masters(engine) if zero == 0 else {}
    for name, parameter in engine.module.named_parameters():
        weight = read(f"{WEIGHT}/{name}").to(parameter.device)
        if parameter.requires_grad:
            moments = {m: read(f"{m}/{name}").to(parameter.device) for m in MOMENTS}
            if zero == 0:
                _put(adam, masters.get(parameter, parameter), weight, moments)
            elif zero == 3:
                _put_shard(parameter, weight, moments)
            else:
                safe_set_full_fp32_param(parameter, weight)
                for moment, value in moments.items():
                    safe_set_full_optimizer_state(parameter, value, moment)
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=zero == 3),
        ):
            parameter.copy_(weight.view_as(parameter))
    steps = read(STEPS)
    for state in adam.state.values():
        state["step"] = steps.clone()


def _adam(engine: Any) -> torch.optim.AdamW:
    """Below whatever wraps it, with the state that it would make at its first step."""
    adam: torch.optim.AdamW = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = (group["params"] for group in adam.param_groups)
    # ZeRO 3 hands its shards over for the time of a step only.
    for weight in getattr(engine.optimizer, "fp32_partitioned_groups_flat", [*chain(*groups)]):
        if not adam.state[weight]:
            adam.state[weight] = {"step": torch.tensor(0.0)}
            adam.state[weight] |= {m: torch.zeros_like(weight) for m in MOMENTS}
    # ZeRO 1 and 2 find the moments of a parameter only once this has been called.
    getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", lambda: None)()
    return adam


def _masters(engine: Any) -> Mapping[Tensor, Tensor]:
    """Low-precision parameter to its fp32 copy, where DeepSpeed keeps them whole beside each other."""
    low = getattr(engine.optimizer, "fp16_groups", [])
    high = getattr(engine.optimizer, "fp32_groups", [])
    return {
        one: other
        for ones, others in zip(low, high, strict=True)
        for one, other in zip(ones, others, strict=True)
    }


def _put(
    adam: torch.optim.AdamW, master: Tensor, weight: Tensor, moments: Mapping[str, Tensor]
) -> None:
    with torch.no_grad():
        master.copy_(weight)
    adam.state[master].update({name: value.clone() for name, value in moments.items()})


def _put_shard(parameter: Any, weight: Tensor, moments: Mapping[str, Tensor]) -> None:
    """This process's shard of a parameter under ZeRO 3; the last one is filled up with zeros.

    DeepSpeed's own function for whole tensors cannot cut the last shard of a size that does not divide.
    """
    each = safe_get_local_fp32_param(parameter).numel()
    rank = torch.distributed.get_rank()

    def mine(whole: Tensor) -> Tensor:
        flat = whole.flatten()
        return pad(flat, (0, max(0, each * (rank + 1) - len(flat))))[
            each * rank : each * (rank + 1)
        ]

    safe_set_local_fp32_param(parameter, mine(weight))
    for name, value in moments.items():
        safe_set_local_optimizer_state(parameter, mine(value), name)
