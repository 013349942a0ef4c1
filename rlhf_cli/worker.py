"""One process of one stage: reads its run directory, calls its stage. It never sees Hydra.

Started by `launch`, in the driver's own process or by DeepSpeed's launcher as
`python -m rlhf_cli.worker RUN_DIRECTORY`.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Hashable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import cast

import psutil
import torch
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from rlhf_cli import __version__
from rlhf_cli.config import Recipe, read, recipe
from rlhf_cli.data.corpus import Corpus, Dataset, digest
from rlhf_cli.engine import pulse
from rlhf_cli.engine.stop import Stop
from rlhf_cli.engine.world import World, start
from rlhf_cli.errors import GO_ON, OutOfMemory, Stopped, UserError
from rlhf_cli.secret import masked
from rlhf_cli.stages.context import Context
from rlhf_cli.stages.progress import Progress
from rlhf_cli.store.files import atomic_write, disk
from rlhf_cli.store.run import Run
from rlhf_cli.track import Mirror, open_mirror

SAID: dict[type[Exception], str] = {
    UserError: "complaint.txt",
    Stopped: "stopped.txt",
    OutOfMemory: "out_of_memory.txt",
}
"""Files in the run's log folder where a worker leaves the sentence meant for the user."""
ROOM = 4096
"""Bytes set aside for each."""
DRIVER = "RLHF_DRIVER"
"""Variable of the environment that says whom a worker ends with."""
SLACK_SECONDS = 30
"""By which a collective is more patient than the watch on each process, which has more to tell."""
NO_MEMORY = (
    "can't allocate memory",
    "annot allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
)
"""Words of torch where it has no exception of its own."""
COLLECTION = (700, 10, 10)
"""Thresholds of the garbage collector while a stage runs: Python's own."""
JOB_TYPES = {"sft": "sft", "reward": "rm", "rl": "rl"}
"""What W&B is told of a stage."""
WATCH_SECONDS = 2
"""Between two looks at whether it is still there."""


def work(path: Path, alone: bool = True) -> None:
    """Carries out the stage that the run directory describes, as one of its processes.

    alone: whether no launcher watches over it. Raises OutOfMemory if a micro-batch does not fit.
    """
    run = Run(path)
    typed = recipe(read(run.config_path))
    world = start(typed.launch.timeout + SLACK_SECONDS)
    _check_device(typed, world)
    missing = ""
    try:
        with pulse.watched(run.log, world.rank, typed.launch.timeout, alone):
            _work(run, typed, world)
    except (RuntimeError, MemoryError) as error:
        if not _no_memory(error):
            raise
        missing = str(error).strip().partition("\n")[0] or "there is no memory left"
    if missing:  # not within the handler: the error's frames hold on to all the tensors there are
        raise OutOfMemory(missing)


def _check_device(typed: Recipe, world: World) -> None:
    """UserError if the device cannot compute as asked."""
    for key, model in ("model", typed.model), ("reward.model", typed.reward.model):
        if model.precision == "fp16" and world.device.type != "cuda":
            raise UserError(
                f"{key}.precision=fp16 needs a GPU, and there is none; set {key}.precision=bf16, or fp32."
            )


def _no_memory(error: Exception) -> bool:
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in NO_MEMORY)


def _work(run: Run, typed: Recipe, world: World) -> None:
    path = run.path
    _log_to(run.log / f"rank_{world.rank}.txt")
    title = {"sft": "sft", "reward": "reward model", "rl": typed.name}[typed.stage]
    stopping = Stop(world, run.stop_request).listening()
    with Progress(title, world.is_main) as progress, stopping as stop:
        corpus = corpus_of(cast(Hashable, typed.data))
        _spare_collector()
        if world.is_main:
            _note_data(run, typed, corpus)
        mirror = _mirror(run, typed, corpus) if world.is_main else Mirror()
        manifest = run.manifest()
        ctx = Context(
            run=run,
            recipe=typed,
            world=world,
            corpus=corpus,
            parents={role: path.parents[1] / at for role, at in manifest["parent_runs"].items()},
            segment=manifest["segment"],
            mirror=mirror,
            progress=progress,
            stop=stop,
        )
        finished = False
        try:
            import_module(f"rlhf_cli.stages.{typed.stage}").main(ctx)
            finished = True
        finally:
            mirror.finish(0 if finished else 1)
        world.barrier()


@cache  # once: what an earlier run of this process has left is to be found
def _spare_collector() -> None:
    """Has Python look for garbage as often as ever, but no more among all that was loaded by now."""
    gc.freeze()
    gc.set_threshold(*COLLECTION)


@cache
def corpus_of(data: Hashable) -> Corpus:
    """The rows, loaded once per process: stages that run one after another share them."""
    return cast(Dataset, data).load()


def _note_data(run: Run, typed: Recipe, corpus: Corpus) -> None:
    """Puts down what the run reads. Raises UserError if it is not what came before it read."""
    before = [
        run,
        *(Run(run.path.parents[1] / at) for at in run.manifest()["parent_runs"].values()),
    ]
    for other in before:
        known = other.manifest().get("data", {}).get("digest", corpus.digest)
        if known != corpus.digest:
            raise UserError(
                f"data={corpus.title} is read otherwise than when {other.path} was made (rows {known[:10]}"
                f" then, {corpus.digest[:10]} now), as a newer rlhf-cli may do; go back to the one that"
                f" made it, or set it aside to have it made again."
            )
    pinned, parents = corpus.pinned(typed.eval.prompts), run.manifest()["parent_runs"]
    run.update(
        # What every KL of the run is measured against.
        reference=Run(run.path.parents[1] / parents["sft"]).weights() if "sft" in parents else None,
        data={
            "digest": corpus.digest,
            "evaluation": {"prompts": len(pinned), "digest": digest(pinned)},
            "drops": {cause: len(where) for cause, where in corpus.drops.items()},
        },
    )
    _list_drops(run, corpus)


def _list_drops(run: Run, corpus: Corpus) -> None:
    """Names every row that was left out, by cause."""
    lines = [f"{cause}\t{where}" for cause, rows in corpus.drops.items() for where in rows]
    if lines:
        atomic_write(run.log / "dropped_rows.txt", "\n".join(lines) + "\n")


def _mirror(run: Run, typed: Recipe, corpus: Corpus) -> Mirror:
    values = OmegaConf.to_container(read(run.config_path), resolve=True)
    return open_mirror(
        typed.track,
        run.path,
        name=_name(run, typed),
        key=run.key,
        group=typed.group,
        job_type=JOB_TYPES[typed.stage],
        tags=[
            corpus.title,
            typed.model.label,
            *([typed.name] if typed.stage == "rl" else []),
            f"rlhf-cli {__version__}",
        ],
        config=dict(values),  # type: ignore[arg-type]
    )


def _name(run: Run, typed: Recipe) -> str:
    """The run's label, with the KL coefficient where it has one, by which runs of a sweep often differ."""
    beta = getattr(typed.algo, "beta", None)
    if typed.stage != "rl" or beta is None:
        return run.label
    head, _, seed = run.label.rpartition("-")
    return f"{head}-beta{beta:g}-{seed}"


class _Unsecret(logging.Formatter):
    """Whatever a library has to say, tracebacks included, less the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _log_to(path: Path) -> None:
    """Sends the libraries' log and warnings to a file: the terminal is for the user."""
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    handler.setFormatter(_Unsecret("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers:
        with suppress(OSError):
            old.close()
    root.handlers = [handler]
    for name in ("DeepSpeed", "transformers", "datasets", "wandb"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # What the mirror has to say (once) is for the user too.
    heard = logging.StreamHandler()
    heard.setFormatter(_Unsecret())
    logging.getLogger("rlhf_cli.track").addHandler(heard)
    # A fresh reward head is new on purpose; load_reward_model checks that a trained one is not.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("default")


class _LogFile(logging.FileHandler):
    """Ends when the disk refuses, and says so once: the run can do without."""

    _ended = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._ended:
            self._ended = True
            said = f"warning: {self.baseFilename} ends here: {error.strerror}"
            print(said, file=sys.stderr)


def end_with_driver(driver: str) -> None:
    """Ends this process, its launcher and its peers here when the driver is gone, however it went.

    driver: as `driver` gave it; of another host nothing can be told.
    """
    host, pid = driver.rsplit(" ", 1)
    if host != socket.gethostname():
        return
    process = psutil.Process(int(pid)) if psutil.pid_exists(int(pid)) else None

    def watch() -> None:
        while process is not None and _lives(process):
            time.sleep(WATCH_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def driver() -> str:
    """Who this process is, for workers that are to end with it."""
    return f"{socket.gethostname()} {os.getpid()}"


def _lives(process: psutil.Process) -> bool:
    """Whether it is there, and no other process has got its number, whatever the clock says."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def expect(log: Path) -> None:
    """Makes room for what workers may have to say: that the disk is full is said on a full disk."""
    for name in SAID.values():
        with disk(log / name):
            (log / name).write_bytes(bytes(ROOM))


def say(log: Path, error: Exception) -> None:
    """Leaves a sentence for whoever started this worker."""
    handle = os.open(log / SAID[type(error)], os.O_WRONLY | os.O_CREAT)
    with open(handle, "wb") as file:
        file.write(str(error).encode()[:ROOM].ljust(ROOM, b"\0"))  # over what another has said


def heard(log: Path) -> Exception | None:
    """What a worker has said, if one did."""
    found = None
    for kind, name in SAID.items():
        words = (log / name).read_bytes().rstrip(b"\0").decode(errors="replace")
        (log / name).unlink()
        found = found or (kind(words) if words else None)
    return found


def main(arguments: list[str]) -> int:
    """Entry point under a launcher; the exit code says how it went (0, 2 for a user's mistake)."""
    path = Path(arguments[-1])
    if DRIVER in os.environ:
        end_with_driver(os.environ[DRIVER])
    if "OMP_NUM_THREADS" not in os.environ:
        # On a host that the driver's environment does not reach.
        peers = int(os.environ.get("LOCAL_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // peers))
    try:
        work(path, alone=False)
    except (UserError, Stopped, OutOfMemory) as error:
        # All stop together; memory may run out, or a server that scores may refuse, in one of them alone.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, Stopped):
            say(Run(path).log, error)
        return {UserError: 2, Stopped: GO_ON, OutOfMemory: 1}[type(error)]
    except Exception:
        logging.getLogger(__name__).exception("the stage failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
