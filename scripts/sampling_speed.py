"""Times how fast responses are drawn: by our loop, and by transformers' `generate` with two of its caches.

    python scripts/sampling_speed.py [MODEL] [PROMPTS] [ROUNDS]

MODEL is a choice of the group `model` (nano) whose shape is known without downloading. Its weights are
random; precision and limits are those of `model=MODEL data=tldr data.source=embedded`. Four responses are
drawn to each of the PROMPTS (32), which are from half to all of their limit long. The three take turns for
ROUNDS (5) rounds, so that whatever else the machine does hits all of them alike; one round before these is
not counted.

No response ends before its limit, which favours `generate`: our loop drops rows that have ended.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from rlhf_cli import shapes
from rlhf_cli.config import compose, recipe
from rlhf_cli.engine.sampler import Expert, draw, left_pad, uniforms
from rlhf_cli.models.load import DTYPES

RESPONSES = 4
PAD, NEVER = 0, -1
"""NEVER is no token, so nothing ends."""


def model_of(words: list[str]) -> tuple[PreTrainedModel, int, int]:
    """Random weights of the shape that a configuration names, and the limits of prompt and response."""
    made = recipe(compose(words))
    shape = shapes.shape(made.model, "model")
    config = GPTNeoXConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTNeoXForCausalLM(config).to(device, DTYPES[made.model.precision]).eval()
    return model, made.data.max_prompt_tokens, made.data.max_response_tokens


def ways(
    model: PreTrainedModel, prompts: list[list[int]], width: int, longest: int
) -> dict[str, Callable[[], Tensor]]:
    """By name, what draws the responses to all prompts once: [N, width + longest]."""
    uniform = uniforms(0, "speed", 0, range(len(prompts) * RESPONSES), longest)
    ids, real = (x.to(model.device) for x in left_pad(prompts, width, PAD))

    def generate(**cache: str) -> Tensor:
        said = model.generate(
            ids,
            attention_mask=real.long(),
            num_return_sequences=RESPONSES,
            max_new_tokens=longest,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=PAD,
            **cache,
        )
        assert isinstance(said, Tensor)
        return said

    def ours() -> Tensor:
        return draw([Expert(model)], prompts, RESPONSES, uniform, width, NEVER, PAD).tokens

    return {
        "our loop": ours,
        "generate, default cache": generate,
        "generate, static cache": lambda: generate(cache_implementation="static"),
    }


def main(name: str = "nano", count: str = "32", rounds: str = "5") -> None:
    """Print tokens per second."""
    model, width, longest = model_of([f"model={name}", "data=tldr", "data.source=embedded"])
    vocab = model.config.vocab_size
    lengths = torch.linspace(width // 2, width, int(count)).long().tolist()
    prompts = [torch.randint(1, vocab, (length,)).tolist() for length in lengths]
    tokens = len(prompts) * RESPONSES * longest
    took: dict[str, list[float]] = {}
    for number in range(int(rounds) + 1):
        for way, act in ways(model, prompts, width, longest).items():
            began = time.perf_counter()
            said = act()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            assert said.shape == (len(prompts) * RESPONSES, width + longest)
            if number:
                took.setdefault(way, []).append(tokens / seconds)
    print(
        f"{name} on {model.device.type}, {model.dtype}: {len(prompts)} prompts of up to {width} tokens,"
        f" {RESPONSES} responses of {longest} each; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    for way, rates in took.items():
        print(
            f"{way:24} {statistics.median(rates):10,.0f} tokens/s"
            f" ({min(rates):,.0f} to {max(rates):,.0f})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
