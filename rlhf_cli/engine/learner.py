"""One optimiser step through DeepSpeed, and the only place where terms become one number.

Denominators are counted over the whole minibatch, all processes and micro-batches, before the first
backward pass. Each micro-batch then contributes its own sums, so the loss and its gradient do not
depend on how the minibatch was cut up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.core.algorithm import Terms
from rlhf_cli.core.masked import averages
from rlhf_cli.ds_config import merged, read
from rlhf_cli.engine import masters, pulse
from rlhf_cli.engine.world import World
from rlhf_cli.recipes import Launch, Optim

Part = TypeVar("Part")


@dataclass(frozen=True)
class Judged:
    """What one micro-batch says: terms to minimise, terms to log, and how they are averaged."""

    loss: Terms
    watch: Terms
    mask: Tensor
    """[P,G,T] of the micro-batch."""
    counts: Mapping[int, float]
    """`core.masked.denominators` of the whole minibatch it is a part of."""


class Learner:
    """A module under DeepSpeed with AdamW and a learning-rate schedule."""

    def __init__(
        self,
        module: nn.Module,
        optim: Optim,
        steps: int,
        launch: Launch,
        world: World,
        precision: str,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """rates: peak learning rate by submodule name, where it is not `optim.lr`."""
        self.optim, self.steps, self.world, self.launch = optim, steps, world, launch
        module.to(world.device)
        if launch.checkpointing:
            for model in module.modules():
                if isinstance(model, PreTrainedModel):
                    model.gradient_checkpointing_enable({"use_reentrant": False})
        self._copy: nn.Module | None = None
        if launch.zero == 3 and launch.gather == "whole":
            self._copy = copy.deepcopy(module)
        elif launch.zero == 3 and world.is_main:
            self._copy = copy.deepcopy(module).cpu()
        groups = _groups(module, optim.lr, rates or {})
        self._names, self._peaks = ["", *(rates or {})], [group["lr"] for group in groups]
        # A rate of 0 until `step` sets it: some wrappers take a step on no gradient to make room.
        still = [{**group, "lr": 0.0} for group in groups]
        optimiser = torch.optim.AdamW(
            still,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            # On a CPU by itself it would go through the weights a dozen times.
            fused=True if world.device.type == "cpu" else None,
        )
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimiser,
            config=deepspeed_config(optim, launch, world, precision),
            dist_init_required=False,
        )
        masters.begin(self.engine)
        self.step_index = 0
        self.ease = 1.0
        """Factor on all learning rates beside their schedule."""

    def step(
        self, parts: Sequence[Part], judge: Callable[[Part], Judged], only: str | None = None
    ) -> dict[str, float]:
        """One optimiser step over this process's `parts` of a minibatch.

        only: the one submodule that learns, if not all do. Returns averaged terms over all processes:
        the loss, each of its terms, each watched term, the gradient norm, the rate of the policy, and
        `skipped`: 1 if the gradient was no number, and weights and moments stay as they are.
        """
        self.engine.train()
        totals: dict[str, float] = {}
        for place, part in enumerate(parts):
            self.engine.set_gradient_accumulation_boundary(place + 1 == len(parts))
            judged = judge(part)
            losses = averages(judged.loss, judged.mask, judged.counts)
            loss = torch.stack(list(losses.values())).sum()
            # DeepSpeed averages gradients over processes; our shares already add up to the mean.
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
            with torch.no_grad():
                seen = {
                    "loss": loss,
                    **losses,
                    **averages(judged.watch, judged.mask, judged.counts),
                }
            for name, value in seen.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach())
        factor = self.ease * schedule(self.optim, self.step_index, self.steps)
        rates = [
            peak * factor if only in (None, name) else 0.0
            for name, peak in zip(self._names, self._peaks, strict=True)
        ]
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        norm = self._gradient_norm()
        if norm is None:  # a wrapper that looks at the gradient by itself, and reports it
            scale = self._scale()
            self.engine.step()
            # Under fp16 an overflow is how the largest scale of the loss is found.
            taken = self.engine.was_step_applied() or self._scale() < scale
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        elif taken := math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.optimizer.zero_grad()
        self.step_index += 1
        pulse.beat(self.step_index)
        totals = self.world.sum(totals)
        return {**totals, "grad_norm": norm, "lr": rates[0], "skipped": float(not taken)}

    def rehearse(self, *inputs: object) -> None:
        """Goes once through the module and back through what it says of `inputs`, and forgets both.

        With the largest micro-batch there may be, memory that cannot suffice runs out before the first step
        instead of hours later. Not under ZeRO 3, whose hooks would take it for a step.
        """
        if self.launch.zero == 3:
            return
        self.engine.train()
        learning = [p for p in self.engine.module.parameters() if p.requires_grad]
        said = self.engine.module(*inputs)  # not through the engine, which would count it
        terms = said.values() if isinstance(said, Mapping) else [said]
        sums = [term.float().sum() for term in terms if term.requires_grad]
        torch.autograd.grad(torch.stack(sums).sum(), learning, allow_unused=True)

    @torch.no_grad()
    def follow(self, leader: str, follower: str, keep: float) -> None:
        """follower <- keep * follower + (1 - keep) * leader, two submodules of one shape."""
        pairs = [
            (ahead, behind)
            for (_, ahead), (_, behind) in zip(
                self.engine.module.get_submodule(leader).named_parameters(),
                self.engine.module.get_submodule(follower).named_parameters(),
                strict=True,
            )
        ]
        flat = [parameter for pair in pairs for parameter in pair]
        sharded = self.launch.zero == 3
        with deepspeed.zero.GatheredParameters(flat, modifier_rank=0, enabled=sharded):
            if not sharded or self.world.is_main:
                for ahead, behind in pairs:
                    behind.lerp_(ahead.to(behind.dtype), 1 - keep)

    def _gradient_norm(self) -> float | None:
        """Global L2 norm before clipping; None if DeepSpeed's own optimiser wrapper reports it."""
        if self.launch.zero > 0 or self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            return None
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))

    def _scale(self) -> float:
        """What the loss is multiplied by before the backward pass; 1 but under fp16."""
        return float(self.engine.optimizer.loss_scale) if self.engine.fp16_enabled() else 1.0

    @contextmanager
    def whole(self, to_save: bool = False) -> Iterator[nn.Module]:
        """The module as it can be drawn from and asked, or with `to_save` be written to a disk.

        Under ZeRO 3 the weights are gathered into a copy, one after the other, unless `launch.gather` says
        that each layer is to be gathered when it is its turn: then the module itself is handed out, and the
        copy, which the main process alone has and in the host's memory, is for the disk.
        """
        if self.launch.zero < 3 or (self.launch.gather == "layers" and not to_save):
            yield self.engine.module.eval()
            return
        copies = {} if self._copy is None else dict(self._copy.named_parameters())
        with torch.no_grad():
            for name, shard in self.engine.module.named_parameters():
                with deepspeed.zero.GatheredParameters([shard]):
                    if name in copies:
                        copies[name].copy_(shard)
        yield (self.engine.module if self._copy is None else self._copy).eval()


def deepspeed_config(optim: Optim, launch: Launch, world: World, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration; accumulation is driven by `Learner.step`, so it counts as 1 here.

    What `launch.ds_config` says on top is not checked here.
    """
    zero: dict[str, Any] = {"stage": launch.zero}
    if launch.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    if launch.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world.size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},  # with DeepSpeed's own scaling of the loss
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW, as everywhere else: DeepSpeed's for the CPU is compiled where it runs.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    return ours if launch.ds_config is None else merged(ours, read(launch.ds_config))


def schedule(optim: Optim, step: int, steps: int) -> float:
    """Share of the peak learning rate at optimiser step `step` of `steps` (see `recipes.Optim`)."""
    warm = min(1.0, (step + 1) / (optim.warmup * steps)) if optim.warmup > 0 else 1.0
    done = step / max(steps, 1)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[optim.schedule]
    return warm * decay


def _groups(module: nn.Module, lr: float, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """AdamW groups: one per submodule in `rates`, the rest first."""
    named = {name: [] for name in ("", *rates)}  # type: dict[str, list[nn.Parameter]]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            named[next((r for r in rates if name.startswith(r + ".")), "")].append(parameter)
    return [{"params": ps, "lr": rates.get(name, lr)} for name, ps in named.items()]
