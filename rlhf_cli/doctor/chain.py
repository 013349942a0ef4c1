"""What the chain of one command needs of this machine, before any of it is begun."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_cli import cost, devices, hosts, hub, memory, shapes
from rlhf_cli.config import Recipe
from rlhf_cli.doctor.finding import Finding, sized
from rlhf_cli.errors import UserError
from rlhf_cli.plan import DOING, Plan, Step, check_downloads
from rlhf_cli.recipes import Model
from rlhf_cli.store import pretrained
from rlhf_cli.store.files import nearest
from rlhf_cli.store.run import Run

SAVED, MOMENTS = 4, 8
"""Bytes of a checkpoint: of every parameter, and of one that learns besides."""


def chain(plan: Plan) -> Iterator[Finding]:
    """What is there of it, and whether the rest fits on this machine."""
    yield parents(plan)
    missing = [step for step in plan.steps if step.status != "done"]
    if missing:
        yield room(missing)
        yield space(missing)
    try:
        check_downloads(plan)
    except UserError as error:
        yield Finding("weights", "not all are here", "fault", str(error))
        return
    yield Finding("weights", "here, or drawn at random, or to be had from the hub")
    for key, model in models(plan.recipe).items():
        yield tokenizer(key, model)
        yield context(key, model, plan.recipe)


def parents(plan: Plan) -> Finding:
    """How far each run of the chain is, and why one has failed."""
    told = ", ".join(f"{step.role}: {DOING.get(step.status, 'done')}" for step in plan.steps)
    failed = [step for step in plan.steps if step.status == "failed"]
    if failed:
        reason = Run(failed[0].path).manifest().get("reason")
        fix = f"its reason, should it come again: {reason}"
        return Finding("chain", f"{told}; {failed[0].role} failed before", "note", fix)
    return Finding("chain", told)


def room(steps: list[Step]) -> Finding:
    """The largest stage's estimate of memory beside what a process has here."""
    try:
        costs = [found for step in steps if (found := _cost(step))]
        peaks = {step.role: memory.of_stage(*_stage(step)).peak for step in steps}
    except shapes.Unknown as reason:
        return Finding("room", f"unknown: {reason}", "note", "try a few steps before a long run")
    if not costs:
        return Finding("room", "the models are so small that any machine will do")
    launch = steps[-1].recipe.launch
    largest = max(peaks, key=lambda role: peaks[role])
    # Other hosts cannot be asked from here: each is taken to be like this one.
    needed, (have, kind) = peaks[largest], _memory(max(hosts.slots(launch).values()))
    told = f"{largest} needs about {sized(needed)} a process; a {kind} here has {sized(have)}"
    if needed > have:
        fix = "lower launch.micro_batch, set launch.checkpointing=true, or shard: launch.zero=3"
        return Finding("room", told, "fault", fix)
    if kind == "process":
        hours = sum(found.gpu_hours for found in costs)
        card = devices.named(launch.gpu).title
        fix = f"it would take {hours:.3g} hours of an {card}, and very many of a CPU"
        return Finding("room", told, "note", fix)
    return Finding("room", told)


def space(steps: list[Step]) -> Finding:
    """What the checkpoints of the largest stage take, beside what the disk has."""
    recipe = steps[-1].recipe
    free = shutil.disk_usage(nearest(Path(recipe.paths.runs))).free
    try:
        one = max(_checkpoint(step) for step in steps)
    except shapes.Unknown as reason:
        return Finding("checkpoints", f"size unknown: {reason}", "note", f"{sized(free)} are free")
    # The one that is being written, and the finished model at the end.
    needed = one * (recipe.checkpoint.keep + 1)
    told = f"{sized(one)} each, checkpoint.keep={recipe.checkpoint.keep}; {sized(free)} free"
    if needed > free:
        fix = f"make room for {sized(needed)}, or choose another disk with paths.runs=DIR"
        return Finding("checkpoints", told, "fault", fix)
    return Finding("checkpoints", told)


def models(recipe: Recipe) -> Mapping[str, Model]:
    """The policy, and a reward model that does not start like it."""
    reward = recipe.reward.model
    other = {} if reward.starts_like(recipe.model) else {"reward.model": reward}
    return {"model": recipe.model, **other}


def tokenizer(key: str, model: Model) -> Finding:
    """Whether a model's tokenizer can end, pad and start a text."""
    if model.scratch is not None:
        told = f"{key}: made of the rows, with an end and a padding token, no start token"
        return Finding("tokenizer", told)
    assert model.name is not None
    if not pretrained.is_local(model.name) and not hub.is_cached(model.name, model.revision):
        return Finding("tokenizer", f"{key}: comes with its weights from the hub")
    from rlhf_cli.data.tokens import uses_bos
    from rlhf_cli.models.tokenizer import load_tokenizer

    try:
        found = load_tokenizer(model.name, model.revision)
    except UserError as error:
        return Finding("tokenizer", f"{key}: cannot be used", "fault", str(error))
    start = f"start {found.bos_token!r}" if uses_bos(found) else "no start token"
    return Finding(
        "tokenizer", f"{key}: end {found.eos_token!r}, padding {found.pad_token!r}, {start}"
    )


def context(key: str, model: Model, recipe: Recipe) -> Finding:
    """How long a text may be; a plan whose texts are longer is refused before this."""
    most = model.scratch.context if model.scratch else shapes.context(model)
    asked = f"{recipe.data.max_prompt_tokens} + {recipe.data.max_response_tokens} are asked for"
    if most is None:
        return Finding("context", f"{key}: unknown; {asked}", "note", "see what its card says")
    return Finding("context", f"{key}: {most} tokens; {asked}")


def _cost(step: Step) -> cost.Cost | None:
    return cost.of_stage(*_stage(step))


def _stage(step: Step) -> tuple[str, Recipe, bool]:
    return step.stage, step.recipe, "reward" in step.parents


def _checkpoint(step: Step) -> float:
    """Bytes of a checkpoint of one stage. Raises `shapes.Unknown`."""
    desk = cost.Desk.longest(step.recipe)
    if step.stage == "sft":
        nets = [desk.net("policy", step.recipe.model, learns=True)]
    elif step.stage == "reward":
        nets = [desk.net("reward", step.recipe.reward.model, learns=True, head=False)]
    else:
        cast = desk.cast("reward" in step.parents)
        nets = [net for name, net in cast.items() if name not in cost.FROZEN]
    return sum(SAVED * net.parameters + MOMENTS * net.learned for net in nets)


def _memory(processes: int) -> tuple[float, str]:
    """Bytes that each process has, and on what."""
    import psutil
    import torch

    if torch.cuda.is_available():
        every = (torch.cuda.mem_get_info(place)[1] for place in range(torch.cuda.device_count()))
        return float(min(every)), "GPU"
    return psutil.virtual_memory().available / processes, "process"
