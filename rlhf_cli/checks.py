"""What the values of a recipe say about each other: contradictions no single bound can express.

Found before anything is loaded, each as one sentence with its arithmetic and a value that works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_cli import ds_config, shapes
from rlhf_cli.devices import GPUS
from rlhf_cli.hosts import slots, workers
from rlhf_cli.recipes import Classifier, Launch
from rlhf_cli.store import pretrained

if TYPE_CHECKING:
    from rlhf_cli.config import Recipe

_WORD = re.compile(r"[^\W_][\w.+-]*")


def faults(recipe: Recipe) -> Iterator[str]:
    """One sentence per contradiction."""
    if not recipe.paths.runs:
        yield "paths.runs is empty; set paths.runs=DIR, or RLHF_RUNS=DIR in the environment."
    yield from _names(recipe)
    yield from _launch(recipe)
    yield from _batches(recipe)
    yield from _models(recipe)
    yield from _scores(recipe)
    yield from _sampler(recipe)


def _names(recipe: Recipe) -> Iterator[str]:
    """Words that directories are called by: none may lead elsewhere."""
    words = {
        "name": recipe.name,
        "data.name": recipe.data.name,
        "model.label": recipe.model.label,
        "reward.model.label": recipe.reward.model.label,
    }
    for key, word in words.items():
        if not _WORD.fullmatch(word):
            yield (
                f"{key}={word} is not allowed: runs are called by it, so it must be of letters, digits and"
                f" ._+- alone and begin with a letter or digit; set {key}=WORD."
            )


def _scores(recipe: Recipe) -> Iterator[str]:
    kind = recipe.reward.source.kind
    if recipe.algo.trains_reward and kind != "learned":
        yield (
            f"reward.source.kind={kind}, but algo={recipe.name} trains the reward model as it goes; use"
            " reward=learned."
        )
    for part in recipe.reward.parts:
        if isinstance(part.source, Classifier):
            name, revision = part.source.name, part.source.revision
            fault = pretrained.fault("reward.source.name", name, revision)
            yield from [fault] if fault else []
    if recipe.reward.relative and recipe.data.pays:
        yield (
            f"reward.relative=true, but the task of data={recipe.data.title} pays by itself and scores no"
            " answer; set reward.relative=false."
        )
    if kind == "gold" and not recipe.data.has_gold:
        yield (
            f"reward.source.kind=gold, but data={recipe.data.title} has no gold reward; use"
            " data.source=embedded, or another reward."
        )


def _sampler(recipe: Recipe) -> Iterator[str]:
    if recipe.sampler.kind == "vllm" and recipe.data.pays:
        yield (
            f"sampler=vllm draws one response to a prompt, but data={recipe.data.title} is played in"
            " several turns; use sampler=native."
        )


def _launch(recipe: Recipe) -> Iterator[str]:
    launch, n = recipe.launch, recipe.launch.processes
    if launch.kind == "inline":
        for key, given in ("processes", n > 1 and n), ("hostfile", launch.hostfile):
            if given:
                yield f"launch.{key}={given} needs a launcher; add launch=deepspeed."
    here = launch.hostfile is None
    if here and n > 1 and 0 < (devices := _cuda_devices()) < n:
        yield (
            f"launch.processes={n} is more than this machine's {devices} CUDA devices; set"
            f" launch.processes={devices}."
        )
    least = {"none": 0, "optimizer": 1, "all": 3}[launch.offload]
    if launch.zero < least:
        yield (
            f"launch.offload={launch.offload} needs launch.zero={least}{' or more' * (least < 3)}, not"
            f" {launch.zero}; set launch=deepspeed launch.zero={least}."
        )
    if launch.gpu is not None and launch.gpu not in GPUS:
        yield (
            f"launch.gpu={launch.gpu} is not in the list of GPUs; set launch.gpu to one of"
            f" {', '.join(GPUS)}."
        )
    if recipe.stage == "rl":
        yield from placement(recipe)
    yield from _hosts(launch)
    if launch.ds_config is not None:
        yield from ds_config.faults(launch, recipe.model.precision)


def placement(recipe: Recipe) -> Iterator[str]:
    """Models that are not whole in every process cannot be asked by each when it pleases."""
    launch = recipe.launch
    # By value: naming the enum itself would import torch before an algorithm is even chosen.
    needs_q = "q" in {need.value for need in recipe.algo.needs}
    if launch.gather == "layers" and launch.zero < 3:
        yield "launch.gather=layers needs weights that are sharded; set launch.zero=3."
    if recipe.data.pays and (launch.gather == "layers" or launch.frozen == "sharded"):
        key = "gather" if launch.gather == "layers" else "frozen"
        yield (
            f"launch.{key}={getattr(launch, key)} makes all processes draw in step, which dialogues of"
            f" several turns (data={recipe.data.title}) do not; set launch.{key}=whole."
        )
    if launch.frozen == "host" and needs_q:
        yield (
            f"launch.frozen=host, but algo={recipe.name} asks the reference while it learns; set"
            " launch.frozen=whole or sharded."
        )


def _hosts(launch: Launch) -> Iterator[str]:
    """What says something about several hosts, and has nothing to say it about."""
    given = {
        "include": launch.include,
        "exclude": launch.exclude,
        "no_ssh": "true" if launch.no_ssh else None,
        "node_rank": launch.node_rank,
        "master_addr": launch.master_addr,
    }
    words = [f"launch.{key}={value}" for key, value in given.items() if value is not None]
    if launch.hostfile is None:
        yield from (
            f"{word} has no effect without a hostfile; add launch.hostfile=FILE." for word in words
        )
        return
    if launch.include and launch.exclude:
        yield (
            f"launch.include={launch.include} and launch.exclude={launch.exclude} exclude each other; leave"
            " one of them out."
        )
        return
    if not launch.no_ssh:
        if launch.node_rank is not None:
            yield f"launch.node_rank={launch.node_rank} is for launch.no_ssh=true alone; leave it out."
        return
    for key in ("node_rank", "master_addr", "master_port"):
        if getattr(launch, key) is None:
            yield (
                f"launch.no_ssh=true needs launch.{key}, {_NEEDED[key]}; give the same command on every host"
                " but for its node_rank."
            )
    rank, hosts = launch.node_rank, len(slots(launch))
    if rank is not None and rank >= hosts:
        yield f"launch.node_rank={rank} must be less than the {hosts} hosts in use; count them from 0."


_NEEDED = {
    "node_rank": "which host of the hostfile this is",
    "master_addr": "the address of the first host",
    "master_port": "a free port of the first host",
}


def _batches(recipe: Recipe) -> Iterator[str]:
    """Totals must divide: rounded silently, equal budgets would not be equal."""
    update, n = recipe.algo.update, workers(recipe.launch)
    responses = recipe.algo.sampling().responses
    share = responses * update.minibatches * n
    if update.batch % share:
        yield (
            f"algo.update.batch={update.batch} cannot be dealt out evenly: it must be a multiple"
            f" of {responses} responses per prompt x {update.minibatches} minibatches x {n}"
            f" processes = {share}; set algo.update.batch={_near(update.batch, share)}."
        )
    if update.episodes % update.batch:
        yield (
            f"algo.update.episodes={update.episodes} is no whole number of rollouts of"
            f" algo.update.batch={update.batch} responses; set"
            f" algo.update.episodes={_near(update.episodes, update.batch)}."
        )
    for stage, batch in ("sft", recipe.sft.batch), ("reward", recipe.reward.batch):
        if batch % n:
            yield (
                f"{stage}.batch={batch} cannot be dealt out evenly to {n} processes; set"
                f" {stage}.batch={_near(batch, n)}."
            )


def _models(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    longest = data.max_prompt_tokens + data.max_response_tokens
    for key, model in ("model", recipe.model), ("reward.model", recipe.reward.model):
        shape = model.scratch
        if shape is None and not model.name:
            yield f"{key}.name is missing; name a Hugging Face repository or a local folder."
        if shape is None and model.name:
            fault = pretrained.fault(f"{key}.name", model.name, model.revision)
            yield from [fault] if fault else []
            if (most := shapes.context(model)) is not None and most < longest:
                yield (
                    f"{key}.name={model.name} reads {most} tokens, fewer than data.max_prompt_tokens="
                    f"{data.max_prompt_tokens} + data.max_response_tokens={data.max_response_tokens};"
                    f" lower them to {most} together."
                )
        if shape and model.name:
            yield (
                f"{key}.name={model.name} has no effect on a model trained from scratch; choose"
                f" {_choice(key)}, or leave it out."
            )
        if shape and shape.width % shape.heads:
            yield (
                f"{key}.scratch.width={shape.width} must be a multiple of"
                f" {key}.scratch.heads={shape.heads}; set"
                f" {key}.scratch.width={_near(shape.width, shape.heads)}."
            )
        if shape and shape.context < longest:
            yield (
                f"{key}.scratch.context={shape.context} is shorter than data.max_prompt_tokens="
                f"{data.max_prompt_tokens} + data.max_response_tokens={data.max_response_tokens};"
                f" set {key}.scratch.context={longest}."
            )


def _choice(key: str) -> str:
    """The override that takes a model by its name."""
    return "model=custom" if key == "model" else f"model@{key}=custom"


def _near(number: int, unit: int) -> int:
    """The largest multiple of unit that is at most number, and at least one unit."""
    return max(unit, number // unit * unit)


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()
