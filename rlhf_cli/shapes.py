"""The sizes of a decoder's parts, without loading or fetching it.

A model trained from scratch states its shape, models of `conf/model` are in a table, and a folder or the
cache of the hub has a `config.json`. What a layer keeps for its backward pass is not published: it was
counted, tensor by tensor, in transformers 5.23 (tests/test_cost.py counts again).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cli import hub
from rlhf_cli.recipes import Classifier, Model
from rlhf_cli.store import pretrained

POSITIONS = ("max_position_embeddings", "n_positions")
"""What a `config.json` calls the longest sequence."""


class Unknown(Exception):
    """Why the shape of a model is not known."""


@dataclass(frozen=True)
class Shape:
    """A decoder."""

    layers: int
    width: int
    heads: int
    attention: int
    """Width of the queries of all heads."""
    kv: int
    """Keys and values that a token leaves in one layer."""
    vocab: int
    layer: int
    """Parameters of a layer."""
    edges: int
    """Inputs and outputs of all matrices of a layer: what adapters of rank 1 have parameters."""
    rest: int
    """Parameters around the layers: input embedding, positions, the last norm."""
    head: int
    """Parameters of the output layer."""
    tied: bool
    """Whether the output layer is the input embedding."""
    kept: int
    """Numbers that a layer keeps of a token for its backward pass, scores of attention aside."""
    flow: int
    """Numbers of a token that there are at once in a pass that keeps nothing."""
    eager: bool = False
    """Whether transformers has no kernel for it that does without a matrix of scores."""

    @property
    def parameters(self) -> int:
        """Of the language model."""
        return self.layers * self.layer + self.rest + (0 if self.tied else self.head)

    @property
    def scorer(self) -> int:
        """Of the same trunk with one score for an output."""
        return self.layers * self.layer + self.rest + self.width

    def scores(self, attention: str, number: int) -> int:
        """Numbers of the scores that a layer keeps per token and column, where `number` bytes are one.

        In fp32 their softmax; in bf16 that takes the place of two, and the bf16 copy is a third.
        """
        matrix = attention == "eager" or (self.eager and attention != "flash_attention_2")
        return self.heads * (1 if number == 4 else 3) if matrix else 0


def shape(model: Model | Classifier, key: str) -> Shape:
    """The shape of a model; key: its place in the configuration. Raises Unknown."""
    if isinstance(model, Model) and (own := model.scratch) is not None:
        return neox(own.layers, own.width, own.heads, own.vocab)
    name = str(model.name)
    if name in PUBLISHED:
        return PUBLISHED[name]
    file = _config(name, model.revision)
    if file is None:
        raise Unknown(f"no config.json of {key}.name={name} is here yet")
    return read(file, f"{key}.name={name}")


def context(model: Model) -> int | None:
    """Longest sequence in tokens that a pretrained model was made for; None if its `config.json` is not
    here, or does not say.
    """
    file = _config(str(model.name), model.revision)
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with the file
    return next((int(config[name]) for name in POSITIONS if name in config), None)


def _config(name: str, revision: str | None) -> Path | None:
    """Where a model's `config.json` is: in its folder, or in the cache of the hub."""
    if pretrained.is_local(name):
        return Path(name) / "config.json"
    return hub.cached_config(name, revision)


def read(file: Path, what: str) -> Shape:
    """The shape that a `config.json` states; what: whose it is. Raises Unknown."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        reader = FAMILIES.get(config["model_type"])
        if reader is None:
            known = ", ".join(FAMILIES)
            raise Unknown(f"{what} is a {config['model_type']}, none of {known}")
        return reader(config)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise Unknown(f"the config.json of {what} states no shape") from error


def neox(layers: int, width: int, heads: int, vocab: int, inner: int = 0) -> Shape:
    """GPT-NeoX: biases everywhere, two norms a layer, an output layer of its own."""
    inner = inner or 4 * width
    return Shape(
        layers, width, heads, width, 2 * width, vocab,
        layer=4 * width**2 + 2 * width * inner + 9 * width + inner,
        edges=8 * width + 2 * inner,
        rest=vocab * width + 2 * width, head=vocab * width, tied=False,
        kept=18 * width, flow=4 * width + 2 * inner,
    )  # fmt: skip


def gpt2(layers: int, width: int, heads: int, vocab: int, positions: int, inner: int = 0) -> Shape:
    """GPT-2: as GPT-NeoX, with learned positions and tied embeddings."""
    inner = inner or 4 * width
    return Shape(
        layers, width, heads, width, 2 * width, vocab,
        layer=4 * width**2 + 2 * width * inner + 9 * width + inner,
        edges=8 * width + 2 * inner,
        rest=(vocab + positions) * width + 2 * width, head=vocab * width, tied=True,
        kept=28 * width, flow=5 * width + 4 * inner,
    )  # fmt: skip


def gptj(layers: int, width: int, heads: int, vocab: int, inner: int = 0) -> Shape:
    """GPT-J: attention without biases, one norm a layer, an output layer with a bias."""
    inner = inner or 4 * width
    return Shape(
        layers, width, heads, width, 2 * width, vocab,
        layer=4 * width**2 + 2 * width * inner + 3 * width + inner,
        edges=10 * width + 2 * inner,
        rest=vocab * width + 2 * width, head=vocab * (width + 1), tied=False,
        kept=28 * width, flow=7 * width + 4 * inner, eager=True,
    )  # fmt: skip


def llama(
    layers: int,
    width: int,
    heads: int,
    keys: int,
    inner: int,
    vocab: int,
    tied: bool = False,
    each: int = 0,
    kin: str = "llama",
) -> Shape:
    """Llama and its kin: no biases, a gated MLP, fewer heads of keys than of queries.

    each: width of a head, if not width / heads. Qwen 2 has biases on queries, keys and values, Qwen 3 norms.
    """
    each = each or width // heads
    queries, kv = heads * each, 2 * keys * each
    extra = {"qwen2": queries + kv, "qwen3": 2 * each}.get(kin, 0)
    return Shape(
        layers, width, heads, queries, kv, vocab,
        layer=width * (2 * queries + kv + 3 * inner + 2) + extra,
        edges=7 * width + 2 * queries + kv + 3 * inner,
        rest=(vocab + 1) * width, head=vocab * width, tied=tied,
        kept=(19 if kin == "qwen3" else 13) * width + 4 * inner, flow=4 * width + 3 * inner,
    )  # fmt: skip


def _of_neox(config: Mapping[str, Any]) -> Shape:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    return neox(*(int(config[name]) for name in (*names, "intermediate_size")))


def _of_gpt(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    layers, width, heads = (int(config[name]) for name in ("n_layer", "n_embd", "n_head"))
    return layers, width, heads, int(config["vocab_size"])


def _of_llama(config: Mapping[str, Any]) -> Shape:
    heads = int(config["num_attention_heads"])
    return llama(
        int(config["num_hidden_layers"]),
        int(config["hidden_size"]),
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config["intermediate_size"]),
        int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        each=int(config.get("head_dim") or 0),
        kin=config["model_type"],
    )


FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Shape]] = {
    "gpt_neox": _of_neox,
    "gpt2": lambda c: gpt2(*_of_gpt(c), int(c["n_positions"]), int(c.get("n_inner") or 0)),
    "gptj": lambda c: gptj(*_of_gpt(c), int(c.get("n_inner") or 0)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _of_llama),
}
"""`model_type` to what reads the rest of a configuration."""

PUBLISHED: Mapping[str, Shape] = {
    # Biderman et al. 2023 (arXiv:2304.01373), table 1, and the vocabularies of the checkpoints
    "EleutherAI/pythia-70m": neox(6, 512, 8, 50304),
    "EleutherAI/pythia-160m": neox(12, 768, 12, 50304),
    "EleutherAI/pythia-410m": neox(24, 1024, 16, 50304),
    "EleutherAI/pythia-1b": neox(16, 2048, 8, 50304),
    "EleutherAI/pythia-1.4b": neox(24, 2048, 16, 50304),
    "EleutherAI/pythia-2.8b": neox(32, 2560, 32, 50304),
    "EleutherAI/pythia-6.9b": neox(32, 4096, 32, 50432),
    "EleutherAI/pythia-12b": neox(36, 5120, 40, 50688),
    # Radford et al. 2019
    "openai-community/gpt2": gpt2(12, 768, 12, 50257, 1024),
    "openai-community/gpt2-medium": gpt2(24, 1024, 16, 50257, 1024),
    "openai-community/gpt2-large": gpt2(36, 1280, 20, 50257, 1024),
    "openai-community/gpt2-xl": gpt2(48, 1600, 25, 50257, 1024),
    # Wang and Komatsuzaki 2021
    "EleutherAI/gpt-j-6b": gptj(28, 4096, 16, 50400),
    # Touvron et al. 2023 (arXiv:2307.09288), Grattafiori et al. 2024 (arXiv:2407.21783)
    "meta-llama/Llama-2-7b-hf": llama(32, 4096, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-13b-hf": llama(40, 5120, 40, 40, 13824, 32000),
    "meta-llama/Llama-2-70b-hf": llama(80, 8192, 64, 8, 28672, 32000),
    "meta-llama/Llama-3.1-8B": llama(32, 4096, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.2-1B": llama(16, 2048, 32, 8, 8192, 128256, tied=True),
    "meta-llama/Llama-3.2-3B": llama(28, 3072, 24, 8, 8192, 128256, tied=True),
    # Roziere et al. 2023 (arXiv:2308.12950)
    "codellama/CodeLlama-34b-hf": llama(48, 8192, 64, 8, 22016, 32000),
    # Yang et al. 2024 (arXiv:2412.15115)
    "Qwen/Qwen2.5-0.5B": llama(24, 896, 14, 2, 4864, 151936, tied=True, kin="qwen2"),
    "Qwen/Qwen2.5-1.5B": llama(28, 1536, 12, 2, 8960, 151936, tied=True, kin="qwen2"),
    "Qwen/Qwen2.5-3B": llama(36, 2048, 16, 2, 11008, 151936, tied=True, kin="qwen2"),
    "Qwen/Qwen2.5-7B": llama(28, 3584, 28, 4, 18944, 152064, kin="qwen2"),
}
"""What `conf/model` names on the hub, and the larger ones of docs/scale.md."""
