"""The model card of a finished stage, in Hugging Face's format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cli.stages.context import Context

KL_DEFINITION = (
    "KL is the sum over response tokens of log pi - log pi_ref to the SFT policy, in nats, "
    "averaged over sampled responses (temperature 1)."
)


def model_card(ctx: Context) -> str:
    """What the model is, what it came from and how KL is defined."""
    recipe = ctx.recipe
    front = {
        "library_name": "transformers",
        "tags": ["rlhf", recipe.stage, *([recipe.name] if recipe.stage == "rl" else [])],
        "datasets": [ctx.corpus.title],
        **({"base_model": recipe.model.name} if recipe.model.name else {}),
    }
    # JSON is YAML, and needs no library to be written safely.
    header = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    parents = "".join(f"- {stage}: `{path.name}`\n" for stage, path in ctx.parents.items())
    return (
        f"---\n{header}\n---\n# {ctx.run.path.name}\n\n"
        f"Stage `{recipe.stage}` on `{ctx.corpus.title}`, made by rlhf-cli.\n\n"
        f"Parents:\n{parents or '- none'}\n\n{KL_DEFINITION}\n"
    )
