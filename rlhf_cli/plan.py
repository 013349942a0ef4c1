"""One configuration to the chain of stages it stands for: their keys, what exists, what it costs.

A key is a hash of what determines a stage's numbers: its own values, the data, a revision raised
by hand, and the keys of the stages before it. How a stage is run (launch, track, paths) is in no
key, so more processes or another tracker never rename a run. Planning writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, TypeAlias, get_args

from omegaconf import DictConfig
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_cli import cost, devices, hosts, hub, memory, shapes
from rlhf_cli.config import Recipe, recipe
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Classifier, Model
from rlhf_cli.store import pretrained
from rlhf_cli.store.key import key
from rlhf_cli.store.run import Run, Status

ENGINE_REVISION = 2
"""Raised by hand whenever the engine or a stage changes the numbers of a run."""

Stage = Literal["sft", "reward", "rl"]
Role = Literal["sft", "reward", "guide", "rl"]

UNREAD = frozenset({"path", "embedded", "on_bad_row", "tokenizer", "tokenizer_revision"})
"""Fields of a dataset that are in no key: where its rows lie, and what its fingerprint says by contents.
With another rule for bad rows a run either reads the same rows or does not begin."""

DOING = {"missing": "build", "interrupted": "resume", "failed": "resume", "running": "wait"}
"""What is going to be done about a run in each status; one that is done stays as it is."""


SCORING = ("source", "missing", "relative", "unended", "unended_adds")
"""Fields of a reward that say how an RL stage reads it; the others make the chain's own model."""


Row: TypeAlias = tuple[str, object, str]
"""Quantity, value, arithmetic."""


@dataclass(frozen=True)
class Step:
    """One stage of a chain."""

    role: Role
    """What it is to the last step of the chain."""
    stage: Stage
    key: str
    label: str
    """For people: what is trained, on what data, from which size, with which seed."""
    path: Path
    """The run directory, <runs>/<stage>/<label>-<key>."""
    parents: Mapping[str, str]
    """Role to key."""
    status: Status
    """What is on the disk at the time of planning."""
    science: Mapping[str, Any]
    """What the key is a hash of."""
    recipe: Recipe
    composed: DictConfig
    """The configuration of the whole chain."""

    @cached_property
    def node(self) -> DictConfig:
        """The configuration that is frozen into its run directory."""
        return DictConfig({**self.composed, "stage": self.stage})


@dataclass(frozen=True)
class Plan:
    """A chain in the order it is built; every step but the last is an ancestor of the last."""

    steps: tuple[Step, ...]

    @property
    def recipe(self) -> Recipe:
        """Of the last step."""
        return self.steps[-1].recipe

    def runs_of_parents(self, step: Step) -> dict[str, str]:
        """Role to run directory, relative to the folder of all runs."""
        by_key = {each.key: f"{each.stage}/{each.path.name}" for each in self.steps}
        return {role: by_key[key] for role, key in step.parents.items()}


def plan(node: DictConfig) -> Plan:
    """Type a configuration and lay out its chain.

    A reward model is part of an RL chain if the algorithm needs one or a critic, or if evaluations
    shall have a proxy reward, unless the dataset's task pays; a guide, if the algorithm needs one, is
    an RL run of its own.
    Raises UserError.
    """
    made = recipe(node)
    title = made.data.title.replace("-", "_")
    data = {
        **{name: value for name, value in asdict(made.data).items() if name not in UNREAD},  # type: ignore[call-overload]
        "fingerprint": made.data.fingerprint(),
    }
    steps: dict[Role, Step] = {}

    def add(stage: Stage, label: str, **reads: Any) -> None:
        parents: dict[str, str] = {parent.role: parent.key for parent in steps.values()}
        science = {
            "stage": stage,
            "revision": ENGINE_REVISION,
            "data": data,
            "parents": parents,
            **reads,
        }
        name = key(science)
        path = Path(made.paths.runs) / stage / f"{label}-{name}"
        steps[stage] = Step(
            stage, stage, name, label, path, parents, Run(path).status(), science, made, node
        )

    add(
        "sft",
        f"{title}-{made.model.label}-s{made.sft.seed}",
        model=_identity(made.model),
        sft=asdict(made.sft),
    )
    scored = not made.data.pays and (made.eval.proxy or _needs_scores(made))
    if made.stage == "reward" or (made.stage == "rl" and scored and made.reward.learned):
        add(
            "reward",
            f"{title}-{made.reward.model.label}-s{made.reward.seed}",
            reward={
                **{k: v for k, v in asdict(made.reward).items() if k not in SCORING},
                "model": _identity(made.reward.model),
            },
        )
    if made.stage == "rl" and "guide" in _needs(made):
        steps["guide"] = replace(plan(_guide(node)).steps[-1], role="guide")
    if made.stage == "rl":
        cls = type(made.algo)
        add(
            "rl",
            f"{made.name}-{title}-{made.model.label}-s{made.seed}",
            algo=asdict(made.algo),  # type: ignore[call-overload]
            algo_class=f"{cls.__module__}.{cls.__qualname__}",
            algo_revision=made.algo.revision,
            seed=made.seed,
            rollout=asdict(made.rollout),
            eval=asdict(made.eval),
            **_scoring(made),
            **({"sampler": made.sampler.kind} if made.sampler.kind != "native" else {}),
            **({"guard": asdict(made.guard)} if made.guard.action == "back_off" else {}),
        )
    return Plan(tuple(steps.values()))


def _scoring(made: Recipe) -> dict[str, Any]:
    """How an RL stage scores, unless its task pays."""
    if made.data.pays:
        return {}
    read = {name: value for name, value in asdict(made.reward).items() if name in SCORING}
    return {"scoring": {**read, "source": _by_contents(read["source"])}}


def _guide(node: DictConfig) -> DictConfig:
    """The configuration of the run that trains the guide of this one."""
    guide = node.algo.guide
    return DictConfig({**node, "algo": guide.algo, "name": guide.name, "seed": guide.seed})


def check_downloads(plan: Plan) -> None:
    """Make sure that pretrained weights still to be fetched can be, and are for texts of this length.

    Finds out in seconds what the libraries would find out in a minute, before any run is begun.
    Raises UserError.
    """
    policy, reward = plan.recipe.model, plan.recipe.reward.model
    missing = {step.stage for step in plan.steps if step.status != "done"}
    wanted = [("model", policy)] if "sft" in missing else []
    # A reward model like the policy starts from the SFT policy, which is there by then.
    wanted += (
        [("reward.model", reward)] if "reward" in missing and not reward.starts_like(policy) else []
    )
    for group, model in wanted:
        if model.name is not None:
            _check_download(
                group,
                model.name,
                model.revision,
                "model=custom model.name=DIR for a local checkpoint, model=nano to train from scratch",
            )
    if "rl" in missing:
        for part in plan.recipe.reward.parts:
            if isinstance(part.source, Classifier):
                name, revision = part.source.name, part.source.revision
                _check_download("reward.source", name, revision, "a folder")
    recipe(plan.steps[-1].node)  # once more, now that each config.json is here to be read


def _check_download(group: str, name: str, revision: str | None, instead: str) -> None:
    if pretrained.is_local(name):
        return
    ways = f"use {instead}, or HF_HUB_OFFLINE=1 with a filled cache."
    if hub.out_of_reach():
        if hub.is_cached(name, revision):
            return hub.work_offline()
        raise UserError(
            f"{group}.name={name} is no local folder, the cache of the Hugging Face hub does not have it at"
            f" revision {revision}, and the hub cannot be reached at {hub.address()}: {ways}"
        )
    try:
        hub.fetch_config(name, revision)
    except Exception as error:  # the library raises many unrelated types, all meaning the same here
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{group}.name={name} cannot be had from the Hugging Face hub ({first}): {ways}"
        ) from error


def _identity(model: Model) -> dict[str, Any]:
    """What of a model enters a key."""
    return _by_contents(asdict(model))


def _by_contents(values: Any) -> Any:
    """Values with each local folder under `name` told by its contents, so that moving it changes nothing."""
    if isinstance(values, Mapping):
        name = values.get("name")
        told = {key: _by_contents(value) for key, value in values.items()}
        if isinstance(name, str) and pretrained.is_local(name):
            told["name"] = f"sha256:{pretrained.contents(name)}"
        return told
    if isinstance(values, tuple | list):
        return [_by_contents(value) for value in values]
    return values


def _needs(made: Recipe) -> set[str]:
    # By value: naming the enum itself would import torch before an algorithm is even chosen.
    return {need.value for need in made.algo.needs}


def _needs_scores(made: Recipe) -> bool:
    return bool(_needs(made) & {"reward", "critic"})


def describe(*plans: Plan) -> Group:
    """Draw plans for a terminal: every distinct run once, then the arithmetic of the batches."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "key", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("directory", overflow="fold")
    for step in {step.path: step for each in plans for step in each.steps}.values():
        table.add_row(step.role, step.key, DOING.get(step.status, "done"), Text(str(step.path)))
    blocks = list(dict.fromkeys(block for each in plans for block in arithmetic(each)))
    blocks += dict.fromkeys(said for each in plans if (said := _fits(each)))
    if total := _total(*plans):
        blocks.append(total)
    return Group(table, *(Text(f"\n{block}") for block in blocks))


def arithmetic(plan: Plan) -> Iterator[str]:
    """How the stated totals come apart and what they cost: a block of lines per stage.

    To be read at 80 columns.
    """
    for step in plan.steps:
        made = step.recipe
        if step.stage == "rl":
            title = f"{made.name} on {made.data.title}"
            yield _block(title, *_derived(made), *_memory(step), *_costs(step))
            continue
        part, rows = (made.sft, "demonstrations") if step.stage == "sft" else (made.reward, "pairs")
        yield _block(
            f"{step.stage} on {made.data.title}",
            ("passes", f"{part.epochs:g}", f"over the {rows}"),
            ("batch", part.batch, f"{rows} per step, over all processes"),
            *_memory(step),
            *_costs(step),
        )


def _derived(made: Recipe) -> Iterator[Row]:
    """What follows from the stated totals of an RL stage: quantity, value, arithmetic."""
    update, launch, processes = made.algo.update, made.launch, hosts.workers(made.launch)
    batch, epochs, minibatches = update.batch, update.epochs, update.minibatches
    group = made.algo.sampling().responses
    rollouts = update.episodes // batch
    share = batch // minibatches // processes
    most = max(1, launch.micro_batch // group) * group
    points = min(made.eval.points, rollouts)
    yield "rollouts", rollouts, f"episodes {update.episodes} / batch {batch}"
    yield "prompts per rollout", batch // group, f"batch {batch} / responses per prompt {group}"
    yield (
        "optimiser steps",
        rollouts * epochs * minibatches,
        f"rollouts {rollouts} x epochs {epochs} x minibatches {minibatches}",
    )
    yield (
        "responses per process",
        share,
        f"batch {batch} / minibatches {minibatches} / processes {processes}",
    )
    yield "micro-batches", ceil(share / most), f"of at most {most} responses"
    yield "evaluations", 1 + points, f"step 0 and {points} more, on {made.eval.prompts} prompts"


def _memory(step: Step) -> Iterator[Row | str]:
    """What a stage holds in each process: its fullest moment and, of models of some size, every part."""
    launch = step.recipe.launch
    try:
        found = memory.of_stage(*_stage(step))
        small = _cost(step) is None
    except shapes.Unknown:
        return  # as the cost says
    phase = max(found.phases, key=found.at)
    unit, size = ("MB", 1e6) if small else ("GB", 1e9)
    card = devices.named(launch.gpu)
    room = f"; {card.title} has {card.memory / size:,.0f}" if launch.gpu else ""
    yield f"{unit} per process", _in(found.peak, size), f"at its fullest, while {phase}{room}"
    if not small:
        yield _table(found)
    most = max(hosts.slots(launch).values())
    if held := found.host(most):
        yield f"{unit} of host memory", _in(held, size), f"of {most} processes on a host"
    if found.copies:
        told = "gathered once per rollout and evaluation, to draw and to score with"
        if launch.gpu and found.peak > card.memory:
            told += f"; launch.gather=layers does without, if all does not fit into {card.title}"
        yield f"{unit} of whole copies", _in(found.copies, size), told
    elif launch.zero == 3:
        sent = sum(each.weights for each in found.parts) * hosts.workers(launch)
        yield (
            f"{unit} per token",
            _in(sent, size),
            "WARNING: gathered by every process for every token that is drawn (launch.gather=layers),"
            " which is many times slower than from a whole copy; launch.gather=whole if that fits",
        )


def _table(found: memory.Memory) -> str:
    """Gigabytes of every model, in the columns that say something."""
    columns: dict[str, list[float]] = {
        "weights": [part.weights for part in found.parts],
        "states": [part.states for part in found.parts],
        **{phase: [part.adds.get(phase, 0.0) for part in found.parts] for phase in found.phases},
        "host": [part.host for part in found.parts],
    }
    foot = {phase: found.at(phase) for phase in found.phases}
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    names = [part.name for part in found.parts]
    lines = [["", *shown]]
    for name, *cells in zip(names, *shown.values(), strict=True):
        lines.append([name, *(_in(cell, 1e9) if cell else "" for cell in cells)])
    lines.append(["all at its fullest", *(_in(foot[n], 1e9) if n in foot else "" for n in shown)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + " ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def _fits(plan: Plan) -> str | None:
    """Under which preset a chain fits into the GPU that `launch.gpu` names."""
    launch = plan.recipe.launch
    if launch.gpu is None:
        return None
    gpu, n = devices.named(launch.gpu), hosts.workers(launch)
    stages = [_stage(step) for step in plan.steps]
    try:
        found = memory.fitting(stages, gpu, n)
        more = None if found else memory.enough(stages, gpu, n)
    except shapes.Unknown:
        return None
    room = f"{gpu.memory / 1e9:,.0f} GB"
    if found:
        preset, peak = found
        said = (
            f"{preset.words(launch)} is the first preset that fits, with {_giga(peak)} of {room}."
        )
    elif more:
        words = replace(launch, hostfile=None, processes=more)
        preset, peak = memory.fitting(stages, gpu, more)  # type: ignore[misc]
        said = (
            f"no preset fits, but on {more} of them {preset.words(words)} does, with {_giga(peak)} of"
            f" {room}."
        )
    else:
        said = (
            "no preset fits, nor on any number of them; lower launch.micro_batch, set"
            " launch.checkpointing=true, train adapters (model.tuning.lora), or take another GPU or"
            " another tool (docs/scale.md)."
        )
    return fill(f"on {n} x {gpu.title}: {said}", 80, break_on_hyphens=False)


def _stage(step: Step) -> tuple[str, Recipe, bool]:
    """What costs are asked for with."""
    return step.stage, step.recipe, "reward" in step.parents


def _cost(step: Step) -> cost.Cost | None:
    return cost.of_stage(*_stage(step))


def _costs(step: Step) -> Iterator[Row]:
    """What a stage costs, said as `_derived` says the rest; nothing of small models."""
    try:
        found = _cost(step)
    except shapes.Unknown as reason:
        yield "cost", "unknown", f"{reason}"
        return
    if found is None:
        return
    shares = [
        f"{name} {found.share(name):.0%}"
        for name in get_args(cost.Activity)
        if found.share(name) >= 0.005
    ]
    drawn = f"; {_short(found.drawn / 1e6)} drawn" if found.drawn else ""
    yield "million tokens", _short(found.learned / 1e6), f"learned from{drawn}"
    unknown = f", for every {found.rows:,} rows" if found.rows else ""
    yield "PFLOP", _short(found.flop / 1e15), f"over all processes{unknown}"
    card = devices.named(step.recipe.launch.gpu)
    yield "GPU-hours", _short(found.gpu_hours), f"{card.title}{unknown}: {', '.join(shares)}"


def _total(*plans: Plan) -> str | None:
    """What all that is not done costs, where that is known."""
    steps = {step.path: step for each in plans for step in each.steps if step.status != "done"}
    try:
        found = [each for step in steps.values() if (each := _cost(step))]
    except shapes.Unknown:
        return None
    if not found or any(each.rows for each in found):
        return None
    return (
        f"cost of what is not done: {_short(sum(each.gpu_hours for each in found))} GPU-hours. An"
        " estimate, easily off by a factor of two, with every text as long as data.max_prompt_tokens"
        " and data.max_response_tokens allow."
    )


def _giga(size: float) -> str:
    return _in(size, 1e9)


def _in(size: float, unit: float) -> str:
    return f"{size / unit:,.{1 if unit == 1e9 else 0}f}"


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _block(title: str, *rows: Row | str) -> str:
    """A title and its lines; what is to be said of a number goes on below itself."""
    lines = [title]
    for row in rows:
        if isinstance(row, str):
            lines.append(row)
            continue
        what, value, how = row
        head = f"  {what:<22}{value!s:>7}  "
        below = " " * len(head)
        lines.append(
            fill(how, 80, initial_indent=head, subsequent_indent=below, break_on_hyphens=False)
        )
    return "\n".join(lines)
