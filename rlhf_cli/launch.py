"""From a plan to finished runs: builds what is missing, stage by stage, in this process or in several.

The driver owns a run: it holds the lock, freezes the configuration, writes the manifest, starts the
workers and says `done` last. Workers only ever read the run directory.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from rlhf_cli import config, neighbours
from rlhf_cli.config import Recipe
from rlhf_cli.data.corpus import Corpus, Split
from rlhf_cli.errors import OutOfMemory, StageFailed, Stopped, UserError
from rlhf_cli.hosts import HERE, slots, workers
from rlhf_cli.plan import Plan, Step
from rlhf_cli.recipes import Launch
from rlhf_cli.store.files import check_writable
from rlhf_cli.store.provenance import provenance
from rlhf_cli.store.run import Run

KINDS = {"demos": "demonstrations", "pairs": "preference pairs", "prompts": "prompts"}
"""What rows are called."""
GRACE_SECONDS = 10
"""How long workers have to leave after a signal before they are killed."""
WORD_SECONDS = 10
"""How long what another host has written may take to be seen here."""
POLL_SECONDS = 0.5
"""Between two looks at what another host has written."""


def set_deadline(plans: Sequence[Plan]) -> None:
    """Say from when on every process of this command is to stop; an outer command's word stands."""
    hours = [plan.recipe.train.max_hours for plan in plans]
    if known := [each for each in hours if each is not None]:
        from rlhf_cli.engine.stop import DEADLINE

        os.environ.setdefault(DEADLINE, str(time.monotonic() + 3600 * min(known)))


def execute(plan: Plan, command: str) -> Path:
    """Builds every run of the plan that is not done yet; returns the directory of the last one.

    Where the same command is given on several hosts, the first of them does, and the others lend it workers.
    """
    if plan.recipe.launch.node_rank:
        return _follow(plan)
    check_writable(Path(plan.recipe.paths.runs))
    neighbours.settle()
    if any(step.status != "done" for step in plan.steps):
        from rlhf_cli.worker import corpus_of

        # Faulty rows are found before a run directory exists that could fail over them.
        _check_rows(plan, corpus_of(cast(Hashable, plan.recipe.data)))
    for step in plan.steps:
        run = Run(step.path)
        if run.status() == "done" and not any(run.checkpoints.glob("[0-9]*")):
            continue
        with run.lock(on_wait=partial(_say_waiting, run)):
            if run.status() == "done":  # and was killed before it had dropped them
                _drop_resume_points(run)
            else:
                parents = plan.runs_of_parents(step)
                for at in parents.values():
                    Run(run.path.parents[1] / at).check_final()
                _build(run, step, parents, command)
    return plan.steps[-1].path


def _check_rows(plan: Plan, corpus: Corpus) -> None:
    """UserError if a later stage would find no rows of a kind it reads, once the earlier ones are done."""
    for step in plan.steps:
        wanted = {"reward": {"pairs"}, "sft": {"demos"}, "rl": {"prompts"}}[step.stage]
        if step.stage == "rl":
            for stream in (step.recipe.algo.sampling(), step.recipe.algo.side()):
                wanted |= {"pairs"} if stream.dataset or stream.mismatch else set()
                wanted |= {"demos"} if stream.demo else set()
        splits = {"training": corpus.train, "held-out": corpus.heldout}
        if step.stage == "rl":  # evaluations ask the held-out prompts, which every split has
            splits.pop("held-out")
            if step.recipe.reward.relative:
                _check_answers(corpus.title, corpus.train)
        for name, split in splits.items():
            for kind in sorted(kind for kind in wanted if not getattr(split, kind)):
                raise UserError(
                    f"data={corpus.title} has no {name} {KINDS[kind]}, which the stage {step.role} of"
                    " this chain reads; give data that have some, or stop before it with stage=sft."
                )


def _check_answers(title: str, split: Split) -> None:
    """UserError if scores are to be relative to answers that the data lack."""
    if missing := len(set(split.prompts) - split.answers().keys()):
        raise UserError(
            f"reward.relative=true, but data={title} has no answer to {missing} of its"
            f" {len(split.prompts)} training prompts; leave those out, or set reward.relative=false."
        )


def _say_waiting(run: Run, holder: str) -> None:
    print(f"waiting for {holder} that builds {run.path}", flush=True)


def _build(run: Run, step: Step, parent_runs: dict[str, str], command: str) -> None:
    """Runs one stage from `running` to `done`; on any fault the manifest says `failed` and why."""
    recipe = step.recipe
    manifest = {
        "key": step.key,
        "stage": step.stage,
        "label": step.label,
        "title": recipe.data.title,
        "model": recipe.model.label,
        "algo": recipe.name if step.stage == "rl" else None,
        "beta": getattr(recipe.algo, "beta", None) if step.stage == "rl" else None,
        "seed": _seed(recipe, step.stage),
        "group": recipe.group,
        "parents": dict(step.parents),
        "parent_runs": parent_runs,
        "science": step.science,
        "command": command,
        "launch": OmegaConf.to_container(step.node.launch, resolve=True),
        **provenance(),
    }
    try:
        _carry_out(run, step.node, recipe.launch, manifest)
    except Stopped as error:
        run.update(reason=str(error))  # it still says running: without a lock, that is interrupted
        raise
    except (UserError, StageFailed) as error:
        _fail(run, str(error))
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        _fail(run, f"{type(error).__name__}: {first}")
        raise
    run.finish()
    _drop_resume_points(run)  # not before: a disk may refuse to let a run be finished
    if run.stop_request.exists():  # too late for this run, but not for those that were to follow
        raise Stopped(
            f"{run.path} was asked to stop after its last step, and is done; give the same command again to"
            " go on with the rest."
        )


def _fail(run: Run, reason: str) -> None:
    """Leaves the reason in the manifest, unless the disk has no room for that either."""
    with suppress(UserError):
        run.fail(reason)


def _carry_out(run: Run, node: DictConfig, launch: Launch, manifest: dict[str, Any]) -> None:
    """Has the workers do it; whenever memory runs out, goes on from the last checkpoint in smaller parts.

    That changes no number but by the rounding of sums: denominators are those of the whole minibatch.
    """
    micro_batch = launch.micro_batch
    while True:
        smaller = {"micro_batch": micro_batch}
        run.begin(
            config.freeze(DictConfig({**node, "launch": {**node.launch, **smaller}})), manifest
        )
        run.stop_request.unlink(missing_ok=True)
        try:
            if launch.kind == "inline":
                from rlhf_cli.worker import work

                work(run.path)
            else:
                _launch(run, launch)
            return
        except OutOfMemory as error:
            if micro_batch == 1:
                raise UserError(
                    f"{run.path} does not fit into memory even with launch.micro_batch=1 ({error}); set"
                    " launch.checkpointing=true, shard it with launch=deepspeed launch.zero=3 over more"
                    " processes, or lower data.max_response_tokens."
                ) from error
            said = str(error)
        micro_batch //= 2
        gc.collect()
        print(
            f"{run.path}: out of memory ({said}); going on from the last checkpoint with"
            f" launch.micro_batch={micro_batch}",
            flush=True,
        )


def _seed(recipe: Recipe, stage: str) -> int:
    return {"sft": recipe.sft.seed, "reward": recipe.reward.seed, "rl": recipe.seed}[stage]


def _drop_resume_points(run: Run) -> None:
    from rlhf_cli.engine.checkpoint import drop_resume_points

    drop_resume_points(run.checkpoints)


def _launch(run: Run, launch: Launch) -> None:
    """Starts the workers through DeepSpeed's launcher and hears what they have to say.

    On several hosts the run directory must be in a folder that all of them share.
    """
    from rlhf_cli.engine import pulse
    from rlhf_cli.worker import expect, heard

    expect(run.log)
    pulse.forget(run.log)
    code = _through_deepspeed(run, launch)
    if said := heard(run.log):
        raise said
    # The launcher says 0 as well when a part of it was killed: the workers' own word counts.
    if code != 0 or not _all_finished(run, launch):
        how = pulse.verdict(pulse.lives(run.log), launch.timeout)
        raise StageFailed(
            f"{run.path}: {how}; see {run.log}/rank_*, and give the same command again to go on from the last"
            " checkpoint"
        )


def _through_deepspeed(run: Run, launch: Launch, alive: Callable[[], bool] | None = None) -> int:
    """Starts the workers that are this host's to start, waits for them, and leaves none behind.

    The launcher and its workers get a process group of their own: a signal to the launcher alone would
    leave the workers running. alive: asked now and then whether there is anybody left to work with.
    """
    from rlhf_cli.engine.stop import first_signal
    from rlhf_cli.worker import DRIVER, driver

    count = slots(launch)
    here = count[HERE] if HERE in count else max(count.values())
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", *_where(launch),
        "--no_local_rank", "--module", "rlhf_cli.worker", str(run.path.absolute()),
    ]  # fmt: skip
    environment = {**_environment(here), DRIVER: driver()}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        # Asked by a file: DeepSpeed's launcher would end its workers at once, and other hosts hear nothing.
        with first_signal(lambda _: run.stop_request.touch(), tell=True):
            while True:
                try:
                    return child.wait(timeout=None if alive is None else POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if alive is not None and not alive():
                        return -signal.SIGTERM
    finally:
        _end(child)


def _where(launch: Launch) -> list[str]:
    """The words that tell DeepSpeed's launcher which hosts there are."""
    from rlhf_cli.engine.world import free_port

    port = ["--master_port", str(launch.master_port or free_port())]
    if launch.hostfile is None:
        # A hostfile that happens to lie where DeepSpeed looks for one is not this run's.
        alone = ["--hostfile", os.devnull, *port]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # DeepSpeed would pass over it
            chosen = ",".join(visible.split(",")[: launch.processes])
            return [*alone, "--include", f"{HERE}:{chosen}"]
        return [*alone, "--num_gpus", str(launch.processes)]
    words = ["--hostfile", str(Path(launch.hostfile).absolute()), *port]
    for key in ("include", "exclude", "master_addr"):
        if value := getattr(launch, key):
            words += [f"--{key}", value]
    if launch.no_ssh:
        return [*words, "--no_ssh", "--node_rank", str(launch.node_rank)]
    return [*words, "--launcher", launch.through, "--force_multi"]


def _all_finished(run: Run, launch: Launch) -> bool:
    """Whether every worker has come to its end; the word of other hosts may take its time."""
    from rlhf_cli.engine import pulse

    patience = time.monotonic() + (WORD_SECONDS if len(slots(launch)) > 1 else 0)
    while sum(life.finished for life in pulse.lives(run.log).values()) < workers(launch):
        if time.monotonic() > patience:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _follow(plan: Plan) -> Path:
    """Starts this host's workers for every run of the plan that the first host builds."""
    for step in plan.steps:
        _join(Run(step.path), step.recipe.launch)
    return plan.steps[-1].path


def _join(run: Run, launch: Launch) -> None:
    """Is there in every segment of a run until it is done. Raises what ended it otherwise."""
    joined = 0
    seen = time.monotonic()
    while (status := run.status()) != "done":
        segment = run.manifest().get("segment", 0)
        if status == "running":
            seen = time.monotonic()
        if status == "running" and segment > joined:
            joined = segment
            _through_deepspeed(run, launch, lambda: run.status() in ("running", "done"))
        elif status == "failed" and joined:
            raise StageFailed(str(run.manifest()["reason"]))
        elif status == "interrupted" and joined and time.monotonic() - seen > WORD_SECONDS:
            if run.stop_request.exists():
                raise Stopped(str(run.manifest()["reason"]))
            raise StageFailed(
                f"{run.path}: the first host has left it; give the same command again on every host to go"
                " on from the last checkpoint"
            )
        elif time.monotonic() - seen > launch.timeout:
            raise StageFailed(
                f"{run.path}: the first host has not begun it within launch.timeout={launch.timeout} s; give"
                " the same command there, with launch.node_rank=0"
            )
        time.sleep(POLL_SECONDS)


def _environment(processes: int) -> dict[str, str]:
    """The workers' environment: cores shared out evenly, the CPU named where there is no GPU."""
    import torch

    each = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {"OMP_NUM_THREADS": str(each), **os.environ}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(
        p for p in (root, environment.get("PYTHONPATH", "")) if p
    )
    return environment


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends whatever is left of the child's process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sign)
        except ProcessLookupError:
            return
        try:
            child.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
