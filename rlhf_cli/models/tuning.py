"""Which weights of a model learn: all, the top layers, or adapters beside frozen ones.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds (alpha / rank) B A to a frozen weight; B starts at 0, so the
model starts as what it was. peft puts the adapters into the model in place: it stays the class it was,
and without them it still is the model it was made from, which is how a policy is its own reference.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Lora, Tuning

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

HEADS = ("score", "lm_head", "embed_out")
"""Output layers: never given adapters; `score` is new and learns whole."""


def tuned(model: PreTrainedModel, tuning: Tuning, key: str, seed: int) -> PreTrainedModel:
    """The model, of which only what `tuning` names requires gradients; changed in place.

    key: the model's place in the configuration, for what there is to say; seed: of fresh adapters.
    Raises UserError if there is nothing of that name in it.
    """
    if tuning.lora is not None:
        _adapt(model, tuning.lora, key, seed)
    elif tuning.layers is not None:
        _freeze_below(model, tuning.layers, key)
    return model


def _adapt(model: PreTrainedModel, lora: Lora, key: str, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linear = {n.rpartition(".")[2]: m for n, m in model.named_modules() if _is_linear(m)}
    everywhere = lora.targets == ("all-linear",)
    targets = sorted(linear.keys() - set(HEADS)) if everywhere else list(lora.targets)
    # GPT-2 writes its linear layers the other way round.
    turned = any(not isinstance(linear.get(name), nn.Linear | None) for name in targets)
    made = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(made, model)
        except ValueError as error:
            raise UserError(
                f"{key}.tuning.lora.targets={list(lora.targets)} names no layer of the model; choose"
                f" from {', '.join(sorted(linear))}, or [all-linear]."
            ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score."))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _freeze_below(model: PreTrainedModel, layers: int, key: str) -> None:
    """Leaves the top layers, the norm after them and an output layer of its own to learn."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    stack = max(stacks, key=len)
    if layers > len(stack):
        raise UserError(
            f"{key}.tuning.layers={layers} is more than the {len(stack)} layers there are; set"
            f" {key}.tuning.layers=null to train them all."
        )
    model.requires_grad_(False)
    above = [
        child
        for child in model.base_model.children()
        if not isinstance(child, nn.Embedding | nn.ModuleList)
    ]
    heads = [getattr(model, name) for name in HEADS if hasattr(model, name)]
    for module in (*stack[len(stack) - layers :], *above, *heads):
        module.requires_grad_(True)
    if getattr(model.config, "tie_word_embeddings", False) and not hasattr(model, "score"):
        # The output layer is the input layer, which lies below.
        model.get_output_embeddings().requires_grad_(False)


def adapters(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers that have adapters."""
    if "peft" not in sys.modules:  # a second of start-up that most runs need not pay
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model that computes the same: a copy with every adapter added to its weight.

    The model itself where it has none.
    """
    if not adapters(model):
        return model
    plain = copy.deepcopy(model)
    names = {id(module): name for name, module in plain.named_modules()}
    for layer in adapters(plain):
        layer.merge()
        parent, _, child = names[id(layer)].rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        vars(plain).pop(leftover, None)
    return plain


@dataclass(frozen=True)
class WithoutAdapters:
    """The model as it was before its adapters: one set of weights is policy and reference."""

    model: PreTrainedModel

    def __call__(self, **asked: Any) -> Any:
        """As the model."""
        with self._off():
            return self.model(**asked)

    @contextmanager
    def _off(self) -> Iterator[None]:
        layers = adapters(self.model)
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.dtype


Policy: TypeAlias = PreTrainedModel | WithoutAdapters
"""What can be asked how likely a text is."""
