"""Runs as jobs of submitit: of SLURM, or of this machine as a rehearsal.

Each run of a sweep is one job, with one task on each of its nodes: the driver, which starts DeepSpeed's
processes there by itself. SLURM is told of all jobs at once, each to wait for those that it starts from;
locally a job is begun when these are done.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from rlhf_cli import campaign
from rlhf_cli.config import freeze, recipe
from rlhf_cli.errors import GO_ON, UserError
from rlhf_cli.store.run import Run

if TYPE_CHECKING:
    import submitit

KINDS = {"submitit_local": "local", "submitit_slurm": "slurm"}
"""Launchers of Hydra's, and what submitit calls their clusters."""
COMMON = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
    "stderr_to_stdout",
)  # fmt: skip
"""Parameters that submitit takes for every cluster; the others have the cluster's name before them."""
PREEMPTION_SECONDS = 30
"""A preempted job hears SIGTERM, and a moment later the signal at which submitit queues it again."""
POLL_SECONDS = 0.2
PORTS = range(20_000, 30_000)
"""Where the workers of several nodes meet: two jobs on one node rarely share one."""


class Ended(Exception):
    """A job whose run is not done."""


class Build:
    """What a job carries out: it has one run built by a process of its own, and hears of its end in time."""

    def __init__(self, run: Path, config: str, command: str, markers: Sequence[Path]) -> None:
        """config: frozen; markers: files that all exist when nobody wants the run any more."""
        self.run, self.config, self.command = run, config, command
        self.markers = tuple(markers)
        self._child: campaign.Child | None = None

    def __call__(self) -> None:
        """Raises Ended unless the run is done: who waits for this job waits for that."""
        if self.called_off():
            raise Ended("called off")
        node, rank = self._placed()
        share = {"OMP_NUM_THREADS": str(max(1, campaign.cores() // node.launch.processes))}
        self._child = campaign.child(Run(self.run), freeze(node), self.command, share, rank)
        try:
            while (code := self._child.poll()) is None:
                time.sleep(POLL_SECONDS)
            if code == GO_ON and not self.called_off():
                time.sleep(PREEMPTION_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        if code:
            raise Ended(f"{self.run} ended with code {code}")

    def _placed(self) -> tuple[DictConfig, int]:
        """The configuration, told which of the job's nodes this is, and the rank of that node."""
        from submitit import JobEnvironment

        node = OmegaConf.create(self.config)
        assert isinstance(node, DictConfig)
        here = JobEnvironment()
        if here.num_nodes == 1:
            return node, 0
        with tempfile.NamedTemporaryFile("w", suffix=".hosts", delete=False) as file:
            file.write(_hostfile(here.hostnames, node.launch.processes))
        told = {
            "hostfile": file.name,
            "no_ssh": True,
            "node_rank": here.node,
            "master_addr": here.hostnames[0],
            "master_port": PORTS[int(here.raw_job_id) % len(PORTS)],
        }
        return DictConfig({**node, "launch": {**node.launch, **told}}), here.node

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Have the run stop after its step, and be gone on with when the job has another turn.

        submitit calls it in a signal's handler, ahead of the time limit and when the job is preempted.
        """
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                run = Run(self.run)
                if run.status() == "running":
                    run.stop_request.touch()  # a second signal, after the scheduler's, would end it at once
                else:
                    os.kill(self._child.pid, signal.SIGTERM)
                self._child.lasts()
        return DelayedSubmission(Build(self.run, self.config, self.command, self.markers))

    def called_off(self) -> bool:
        """Whether nobody wants the run any more."""
        return bool(self.markers) and all(marker.exists() for marker in self.markers)


class Submitted:
    """A job that submitit was given."""

    def __init__(self, job: submitit.Job[None], build: Build) -> None:
        self.job, self.build = job, build

    def poll(self) -> int | None:
        """0 if its run is done, 75 if that was stopped or called off, 1 if it failed or died."""
        if not self.job.done():
            return None
        run = Run(self.build.run)
        status = run.status()
        if status == "done":
            return 0
        stopped = status == "interrupted" and run.manifest().get("reason")
        return GO_ON if stopped or self.build.called_off() else 1


class Scheduler:
    """Has submitit begin the tasks."""

    def __init__(
        self,
        launcher: Mapping[str, Any],
        folder: Path,
        most: int,
        markers: Mapping[str, Sequence[Path]],
    ) -> None:
        """launcher: as `words.Line` has it; most: jobs at once; markers: those of `Build`, by a run's key."""
        self._cluster = KINDS[launcher["kind"]]
        if launcher["tasks_per_node"] != 1:
            raise UserError(
                f"hydra.launcher.tasks_per_node={launcher['tasks_per_node']} is not allowed: a node has one"
                " task, which starts the processes that launch.processes says; leave"
                " hydra.launcher.tasks_per_node at 1."
            )
        self._nodes = launcher["nodes"]
        if self._nodes != 1 and self._cluster == "local":
            raise UserError(
                f"hydra.launcher.nodes={self._nodes} is not allowed: hydra/launcher=submitit_local has this"
                " machine alone; leave hydra.launcher.nodes at 1."
            )
        self.early = self._cluster == "slurm"
        self._most, self._markers = most, markers
        self._folder = folder / launcher["submitit_folder"]
        self._parameters = parameters(launcher)
        self._limit = launcher.get("max_num_timeout")
        self._jobs: list[Submitted] = []

    def begin(self, task: campaign.Task, after: Sequence[campaign.Job]) -> campaign.Job | None:
        """Submit it; SLURM begins it when those it needs have ended well.

        Raises UserError where there is no SLURM, and if the run cannot be dealt out to so many nodes.
        """
        import submitit

        self._check_nodes(task.step.node)
        self._jobs = [job for job in self._jobs if job.poll() is None]
        if len(self._jobs) >= self._most:
            return None
        limit = {} if self._limit is None else {f"{self._cluster}_max_num_timeout": self._limit}
        try:
            executor = submitit.AutoExecutor(self._folder, cluster=self._cluster, **limit)
        except RuntimeError as error:
            raise UserError(
                f"hydra/launcher=submitit_slurm finds no SLURM here ({error}); give the command on a login"
                " node of the cluster, or try it with hydra/launcher=submitit_local."
            ) from error
        executor.update_parameters(**{**self._parameters, **_dependency(self._parameters, after)})
        step = task.step
        config = freeze(step.node)
        markers = self._markers.get(step.key, ())
        build = Build(step.path.absolute(), config, task.command, [m.absolute() for m in markers])
        self._jobs.append(Submitted(executor.submit(build), build))
        return self._jobs[-1]

    def _check_nodes(self, node: DictConfig) -> None:
        """Raises UserError unless all processes of all nodes have a share of every batch."""
        if self._nodes == 1:
            return
        with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
            names = [f"node-{rank}" for rank in range(self._nodes)]
            file.write(_hostfile(names, node.launch.processes))
            file.flush()
            try:
                recipe(DictConfig({**node, "launch": {**node.launch, "hostfile": file.name}}))
            except UserError as error:
                raise UserError(f"hydra.launcher.nodes={self._nodes}: {error}") from None

    def ask(self, jobs: Mapping[campaign.Task, campaign.Job]) -> None:
        """Ask the runs by a file, wherever they are; what has not begun leaves the queue."""
        for task, job in jobs.items():
            assert isinstance(job, Submitted)
            run = Run(task.step.path)
            if run.status() == "running":
                run.stop_request.touch()
            else:
                job.job.cancel(check=False)

    def end(self, jobs: Iterable[campaign.Job]) -> None:
        """Take back what is left."""
        for job in jobs:
            assert isinstance(job, Submitted)
            job.job.cancel(check=False)


def _hostfile(names: Iterable[str], slots: int) -> str:
    return "".join(f"{name} slots={slots}\n" for name in names)


def parameters(launcher: Mapping[str, Any]) -> dict[str, Any]:
    """What submitit's executor is told, by the values of Hydra's launcher; what is null stays unsaid."""
    own = {"kind", "submitit_folder", "max_num_timeout", "array_parallelism"}
    cluster = KINDS[launcher["kind"]]
    return {
        key if key in COMMON else f"{cluster}_{key}": value
        for key, value in launcher.items()
        if key not in own and value is not None
    }


def _dependency(given: Mapping[str, Any], after: Sequence[campaign.Job]) -> dict[str, Any]:
    """The parameter by which SLURM has a job wait, in place of the user's own of that name."""
    ids = [job.job.job_id for job in after if isinstance(job, Submitted)]
    if not ids:
        return {}
    name = "slurm_additional_parameters"
    wait = {"dependency": f"afterok:{':'.join(ids)}", "kill_on_invalid_dep": "yes"}
    return {name: {**given.get(name, {}), **wait}}
