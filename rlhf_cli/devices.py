"""GPUs by the names that `launch.gpu` knows, as their data sheets describe them; nothing was measured.

Rates are of dense matrices with sums in fp32, at which bf16 and fp16 are equal on all of these; fp32 is
without TF32, which torch leaves off. Links are counted one way. How much of each a program reaches is the
business of `rlhf_cli.cost`. What a data sheet calls a GB of memory is 2^30 bytes on most of these cards; that
7% more is left to CUDA's runtime, to NCCL and to what an allocator cannot fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class GPU:
    """One device, and what joins it to others."""

    title: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second between its memory and its arithmetic."""
    half: float
    """FLOP per second in bf16 or fp16."""
    single: float
    """FLOP per second in fp32."""
    link: float
    """Bytes per second that it sends to the others of its host."""
    network: float
    """Bytes per second that it sends to other hosts: its share of their adapters."""

    def flops(self, precision: Precision) -> float:
        """FLOP per second."""
        return self.single if precision == "fp32" else self.half


PCIE4 = 31.5e9
"""Sixteen lanes of PCI Express 4.0: 16 GT/s each, 128 of 130 bits are data."""
ETHERNET = 100e9 / 8 / 8
"""A share of one adapter of 100 Gbit/s among eight cards; ours, where no maker's host sets a standard."""

GPUS: Mapping[str, GPU] = {
    # NVIDIA A100 Tensor Core GPU data sheet (2021), SXM; DGX A100 data sheet: NVLink 600 GB/s both ways,
    # eight adapters of 200 Gbit/s for eight GPUs
    "a100-40": GPU("A100-40GB", 40e9, 1.555e12, 312e12, 19.5e12, 300e9, 25e9),
    "a100-80": GPU("A100-80GB", 80e9, 2.039e12, 312e12, 19.5e12, 300e9, 25e9),
    # NVIDIA H100 and H200 data sheets, SXM, where half is stated with sparsity, twice this; DGX H100 and
    # H200 data sheets: NVLink 900 GB/s both ways, eight adapters of 400 Gbit/s
    "h100": GPU("H100-80GB", 80e9, 3.35e12, 989e12, 67e12, 450e9, 50e9),
    "h200": GPU("H200-141GB", 141e9, 4.8e12, 989e12, 67e12, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet, an eighth of the whole: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s both ways,
    # eight adapters of 400 Gbit/s; NVIDIA HGX data sheet for the rates
    "b200": GPU("B200-180GB", 180e9, 8e12, 2250e12, 75e12, 900e9, 50e9),
    # NVIDIA L40S data sheet
    "l40s": GPU("L40S-48GB", 48e9, 0.864e12, 362e12, 91.6e12, PCIE4, ETHERNET),
    # NVIDIA RTX A6000 data sheet and Ampere GA102 white paper
    "a6000": GPU("RTX A6000-48GB", 48e9, 0.768e12, 154.8e12, 38.7e12, PCIE4, ETHERNET),
    # NVIDIA Ada GPU architecture white paper, appendix A
    "rtx4090": GPU("RTX 4090-24GB", 24e9, 1.008e12, 165.2e12, 82.6e12, PCIE4, ETHERNET),
}
"""What `launch.gpu` may be."""

STATED = "a100-80"
"""What times are stated for where `launch.gpu` names nothing."""


def named(gpu: str | None) -> GPU:
    """The GPU of a name of `GPUS`, or the one that times are stated for."""
    return GPUS[gpu or STATED]
