"""The far end of `vllm.Served`: what the workers of a vLLM server need in order to take weights.

    vllm serve FOLDER --worker-extension-cls rlhf_cli.engine.vllm_worker.Weights

vLLM makes `Weights` a base of its own worker class, whose `rank`, `device`, `model_config` and `model_runner`
are used here. Its endpoint /collective_rpc lets strings through, so every argument is JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch


class Weights:
    """Methods that each worker has beside its own."""

    def rlhf_about(self: Any) -> dict[str, Any]:
        """What the worker serves."""
        config = self.model_config.hf_config
        return shape(config, config.architectures[0])

    def rlhf_join(self: Any, where: str) -> None:
        """Meets the trainer, the one of rank 0; where: [host, port, processes]."""
        host, port, size = json.loads(where)
        self.rlhf_line = line(host, port, size, rank=1 + self.rank, device=self.device)

    def rlhf_take(self: Any, listed: str) -> None:
        """Takes weights as they come; listed: [name, dtype, shape] of each."""
        for name, dtype, size in json.loads(listed):
            weight = torch.empty(size, dtype=getattr(torch, dtype), device=self.device)
            self.rlhf_line.broadcast(weight, src=0)
            self.model_runner.model.load_weights([(name, weight)])


def line(host: str, port: int, size: int, rank: int, device: torch.device) -> Any:
    """Meets `size - 1` others at the address, which is that of rank 0, and can then broadcast to them."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=size)
    return PyNcclCommunicator(group, device=device)


def shape(config: Any, architecture: str) -> dict[str, Any]:
    """What two models must have in common for the weights of one to fit the other."""
    return {
        "architecture": architecture,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. bfloat16, which is how vLLM calls it too."""
    return str(dtype).removeprefix("torch.")
