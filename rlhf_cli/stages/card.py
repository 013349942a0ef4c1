"""The model card of a finished stage, in Hugging Face's format: enough to judge the model without its run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE
from rlhf_cli.printable import as_code
from rlhf_cli.store.metrics import read
from rlhf_cli.store.pretrained import is_local

if TYPE_CHECKING:
    from rlhf_cli.recipes import Model
    from rlhf_cli.stages.context import Context

TASKS = {"sft": "text-generation", "reward": "text-classification", "rl": "text-generation"}
"""What the hub calls the use of each stage's model."""

KL = (
    "KL is that of whole responses to the SFT policy, `{sft}`: the sum of log pi - log pi_ref over the"
    " tokens of a response, end token included, in nats. It is the mean over one response to each of"
    " {prompts:.0f} held-out prompts, drawn from pi at temperature 1 (the estimator k1)."
)
POLICY = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

A prompt ends where the answer begins, and an answer ends with the end token."""
SCORER = f"""\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ids = [
    *tokenizer(prompt)["input_ids"],
    *tokenizer(response, add_special_tokens=False)["input_ids"],
    tokenizer.eos_token_id,
]
raw = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
score = (raw - model.config.{SCORE_OFFSET}) / model.config.{SCORE_SCALE}
```

Responses of the SFT policy score 0 on average, with standard deviation 1. sigma of a difference of raw
scores is the probability that an answer is preferred."""


def model_card(ctx: Context) -> str:
    """What the model is, what it came from, how well it does and how that was measured."""
    recipe, stage = ctx.recipe, ctx.recipe.stage
    kind = {
        "sft": "A policy fine-tuned on demonstrations (SFT)",
        "reward": "A Bradley-Terry reward model with a scalar head",
        "rl": f"A policy trained by `{recipe.name}`",
    }[stage]
    sections = {
        "Use": SCORER if stage == "reward" else POLICY,
        "Result": "\n".join(_result(ctx)),
        "Data": "\n".join(_data(ctx)),
        "Origin": "\n".join(_origin(ctx)),
    }
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    return (
        f"---\n{_front(ctx)}\n---\n# {ctx.run.path.name}\n\n"
        f"{kind} on `{ctx.corpus.title}`, made by rlhf-cli.\n{body}"
    )


def _front(ctx: Context) -> str:
    """The head that the hub reads. It takes repositories alone: a folder's name would mean nothing to it."""
    recipe, base = ctx.recipe, _base(ctx)
    stage = {"reward": "reward-model"}.get(recipe.stage, recipe.stage)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": TASKS[recipe.stage],
        "tags": ["rlhf", "rlhf-cli", stage, *([recipe.name] if recipe.stage == "rl" else [])],
    }
    if repositories := recipe.data.repositories:
        front["datasets"] = list(repositories)
    if base.name is not None and not is_local(base.name):
        front["base_model"] = base.name
    # JSON is YAML, and needs no library to be written safely.
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())


def _base(ctx: Context) -> Model:
    """Where the first weights came from."""
    return ctx.recipe.reward.model if ctx.recipe.stage == "reward" else ctx.recipe.model


def _result(ctx: Context) -> Iterator[str]:
    """The last evaluation; after RL, that is the run's last point on the frontier."""
    rows = [row for row in read(ctx.run.metrics_path) if any(name[:5] == "eval/" for name in row)]
    last = rows[-1] if rows else {}
    if ctx.recipe.stage == "sft":
        yield f"Held-out loss: {_number(last, 'eval/loss')} nats per token of a response."
        return
    if ctx.recipe.stage == "reward":
        yield (
            f"Held-out pairs ranked as labelled: {_number(last, 'eval/accuracy')} (95% interval"
            f" {_number(last, 'eval/accuracy_low')} to {_number(last, 'eval/accuracy_high')})."
        )
        rule = json.loads(ctx.run.report_path.read_text())["length_rule"]
        yield f"Length alone, preferring the {rule['prefers']} answer: {rule['heldout']:.4g}."
        return
    yield f"After {last.get('episodes', 0):.0f} sampled responses:\n"
    yield "| | mean | standard error |\n|---|---|---|"
    units = {"kl": "KL, nats", "reward": "reward", "gold": "gold reward"}
    for name, title in units.items():
        if f"eval/{name}" in last:
            mean, se = _number(last, f"eval/{name}"), _number(last, f"eval/{name}_se")
            yield f"| {title} | {mean} | {se} |"
    sft = ctx.parents["sft"].name
    yield "\n" + KL.format(sft=sft, prompts=last.get("eval/prompts", math.nan))
    if (heat := ctx.recipe.rollout.temperature) != 1.0:
        yield f"In training, responses were drawn and log-probabilities taken at temperature {heat:g}."
    if "reward" in ctx.parents:
        yield f"The reward model is `{ctx.parents['reward'].name}`, whose scores have mean 0 and standard"
        yield "deviation 1 over responses of its SFT policy."


def _number(row: Mapping[str, float], name: str) -> str:
    value = row.get(name, math.nan)
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _data(ctx: Context) -> Iterator[str]:
    corpus, repositories = ctx.corpus, ctx.recipe.data.repositories
    yield f"`{corpus.title}`, SHA-256 of its rows `{corpus.digest}`.\n"
    for cause, where in corpus.drops.items():
        yield f"- rows left out: {len(where)} ({cause})"
    if not corpus.drops:
        yield "- rows left out: none"
    for name, commit in repositories.items():
        yield f"- from the hub: [{name}](https://huggingface.co/datasets/{name}) at `{commit}`"
    if corpus.gold is not None:
        yield "\nThe rows were generated by rlhf-cli."
    else:
        yield "\nThe rows have licences of their own, which may bear on what is made from them; this card"
        yield "grants nothing. Look them up before you publish the model."


def _origin(ctx: Context) -> Iterator[str]:
    manifest, base = ctx.run.manifest(), _base(ctx)
    for role, path in ctx.parents.items():
        yield f"- {role}: `{path.name}`"
    if base.name is None:
        yield f"- first weights: random (`{base.label}`)"
    elif is_local(base.name):
        yield f"- first weights: a local folder (`{base.label}`), under its own licence"
    else:
        yield f"- first weights: `{base.name}` at `{base.revision}`, under its own licence"
    yield f"- command: {as_code(manifest.get('command', '-'))}"
    changed = f", with changes ({manifest['patch']})" if manifest.get("patch") else ""
    yield f"- commit of rlhf-cli: {manifest.get('commit') or 'unknown'}{changed}"
