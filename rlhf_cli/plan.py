"""One configuration to the chain of stages it stands for: their keys, what exists, what it costs.

A key is a hash of what determines a stage's numbers: its own values, the data, a revision raised
by hand, and the keys of the stages before it. How a stage is run (launch, track, paths) is in no
key, so more processes or another tracker never rename a run. Planning writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_cli import hub
from rlhf_cli.config import Recipe, recipe
from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Model
from rlhf_cli.store import pretrained
from rlhf_cli.store.key import key
from rlhf_cli.store.run import Run, Status

ENGINE_REVISION = 2
"""Raised by hand whenever the engine or a stage changes the numbers of a run."""

Stage = Literal["sft", "reward", "rl"]
Role = Literal["sft", "reward", "guide", "rl"]

DOING = {"missing": "build", "interrupted": "resume", "failed": "resume", "running": "wait"}
"""What is going to be done about a run in each status; one that is done stays as it is."""


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
    node: DictConfig
    """The configuration that is frozen into its run directory."""


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
        **{name: value for name, value in asdict(made.data).items() if name != "path"},  # type: ignore[call-overload]
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
        frozen = DictConfig({**node, "stage": stage})
        steps[stage] = Step(
            stage, stage, name, label, path, parents, Run(path).status(), science, made, frozen
        )

    add(
        "sft",
        f"{title}-{made.model.label}-s{made.sft.seed}",
        model=_identity(made.model),
        sft=asdict(made.sft),
    )
    scored = not made.data.pays and (made.eval.proxy or _needs_scores(made))
    if made.stage == "reward" or (made.stage == "rl" and scored):
        add(
            "reward",
            f"{title}-{made.reward.model.label}-s{made.reward.seed}",
            reward={**asdict(made.reward), "model": _identity(made.reward.model)},
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
        )
    return Plan(tuple(steps.values()))


def _guide(node: DictConfig) -> DictConfig:
    """The configuration of the run that trains the guide of this one."""
    guide = node.algo.guide
    return DictConfig({**node, "algo": guide.algo, "name": guide.name, "seed": guide.seed})


def check_downloads(plan: Plan) -> None:
    """Make sure that pretrained weights still to be fetched can be.

    Finds out in seconds what the libraries would find out in a minute, before any run is begun.
    Raises UserError.
    """
    policy, reward = plan.recipe.model, plan.recipe.reward.model
    missing = {step.stage for step in plan.steps if step.status != "done"}
    wanted = [("model", policy)] if "sft" in missing else []
    # A reward model like the policy starts from the SFT policy, which is there by then.
    wanted += [("reward.model", reward)] if "reward" in missing and reward != policy else []
    for group, model in wanted:
        if model.name is None or pretrained.is_local(model.name):
            continue
        if not hub.is_cached(model.name, model.revision) and hub.out_of_reach():
            raise UserError(
                f"{group}.name={model.name} is no local folder and the Hugging Face hub cannot be"
                " reached: use model=custom model.name=DIR for a local checkpoint, model=nano to"
                " train from scratch, or HF_HUB_OFFLINE=1 with a filled cache."
            )


def _identity(model: Model) -> dict[str, Any]:
    """What of a model enters a key: a local folder by its contents, so that moving it changes nothing."""
    values = asdict(model)
    if model.name is not None and pretrained.is_local(model.name):
        values["name"] = f"sha256:{pretrained.contents(model.name)}"
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
        table.add_row(step.role, step.key, DOING.get(step.status, "done"), str(step.path))
    blocks = dict.fromkeys(block for each in plans for block in arithmetic(each))
    return Group(table, *(Text(f"\n{block}") for block in blocks))


def arithmetic(plan: Plan) -> Iterator[str]:
    """How the stated totals come apart: a block of lines per stage, to be read at 80 columns."""
    made, stages = plan.recipe, {step.stage for step in plan.steps}
    supervised = ("sft", made.sft, "demonstrations"), ("reward", made.reward, "pairs")
    for stage, part, rows in supervised:
        if stage in stages:
            yield _block(
                f"{stage} on {made.data.title}",
                ("passes", f"{part.epochs:g}", f"over the {rows}"),
                ("batch", part.batch, f"{rows} per step, over all processes"),
            )
    if "rl" in stages:
        yield _block(f"{made.name} on {made.data.title}", *_derived(made))


def _derived(made: Recipe) -> Iterator[tuple[str, object, str]]:
    """What follows from the stated totals of an RL stage: quantity, value, arithmetic."""
    update, launch = made.algo.update, made.launch
    batch, epochs, minibatches = update.batch, update.epochs, update.minibatches
    group = made.algo.sampling().responses
    rollouts = update.episodes // batch
    share = batch // minibatches // launch.processes
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
        f"batch {batch} / minibatches {minibatches} / processes {launch.processes}",
    )
    yield "micro-batches", ceil(share / most), f"of at most {most} responses"
    yield "evaluations", 1 + points, f"step 0 and {points} more, on {made.eval.prompts} prompts"


def _block(title: str, *rows: tuple[str, object, str]) -> str:
    return "\n".join([title, *(f"  {what:<22}{value!s:>7}  {how}" for what, value, how in rows)])
