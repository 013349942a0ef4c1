"""The processes of one stage: who am I, on what device, and what do the others have.

DeepSpeed owns the process group (gloo on CPU, nccl on CUDA), also when there is one process.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes: metrics, samples, progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The contiguous share of `count` items that is this process's; counts divide evenly."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, mine: Tensor) -> Tensor:
        """Concatenates the equal-shaped shares of all processes along axis 0, on every process."""
        if self.size == 1:
            return mine
        carried = mine.to(torch.uint8) if mine.dtype == torch.bool else mine.contiguous()
        parts = [torch.empty_like(carried) for _ in range(self.size)]
        dist.all_gather(parts, carried)
        return torch.cat(parts).to(mine.dtype)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Adds up named numbers over all processes, in double precision."""
        if self.size == 1:
            return values
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(list(values.values()), dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier()


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(timeout: int) -> World:
    """Joins the process group; alone if no launcher set RANK and WORLD_SIZE.

    timeout: seconds without word from a peer after which a collective raises.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce at first use, half a minute wherever there
        # is a compiler and another sum wherever there is none; gloo serves everywhere.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, patience = "nccl" if cuda else "gloo", timedelta(seconds=timeout)
    if "RANK" not in os.environ and not dist.is_initialized():
        # Nobody to meet, so no port that another run may take between its choice and its use. RANK stays
        # unset: whoever this process starts has a world of its own.
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=patience, store=alone, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed will look for it
    if cuda:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
