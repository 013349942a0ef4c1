"""One process of one stage: reads its run directory, calls its stage. It never sees Hydra.

Started by `launch`, in the driver's own process or by DeepSpeed's launcher as
`python -m rlhf_cli.worker RUN_DIRECTORY`.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Hashable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import cast

import psutil
from omegaconf import OmegaConf
from transformers.utils.logging import disable_progress_bar

from rlhf_cli.config import Recipe, read, recipe
from rlhf_cli.data.corpus import Corpus, Dataset, digest
from rlhf_cli.engine.stop import Stop
from rlhf_cli.engine.world import start
from rlhf_cli.errors import GO_ON, Stopped, UserError
from rlhf_cli.stages.context import Context
from rlhf_cli.stages.progress import Progress
from rlhf_cli.store.files import atomic_write
from rlhf_cli.store.run import Run
from rlhf_cli.track import Mirror, open_mirror

SAID: dict[type[Exception], str] = {UserError: "complaint.txt", Stopped: "stopped.txt"}
"""Files in the run's log folder where a worker leaves the sentence meant for the user."""
DRIVER = "RLHF_DRIVER"
"""Variable of the environment that says whom a worker ends with."""
WATCH_SECONDS = 2
"""Between two looks at whether it is still there."""


def work(path: Path) -> None:
    """Carries out the stage that the run directory describes, as one of its processes."""
    run = Run(path)
    typed = recipe(read(run.config_path))
    world = start(typed.launch.timeout)
    _log_to(run.log / f"rank_{world.rank}.txt")
    title = {"sft": "sft", "reward": "reward model", "rl": typed.name}[typed.stage]
    stopping = Stop(world, run.stop_request).listening()
    with Progress(title, world.is_main) as progress, stopping as stop:
        corpus = corpus_of(cast(Hashable, typed.data))
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
        name=run.label,
        key=run.key,
        group=typed.group,
        job_type=typed.stage,
        tags=[corpus.title, typed.model.label, *([typed.name] if typed.stage == "rl" else [])],
        config=dict(values),  # type: ignore[arg-type]
    )


def _log_to(path: Path) -> None:
    """Sends the libraries' log and warnings to a file: the terminal is for the user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers = [handler]
    for name in ("DeepSpeed", "transformers", "datasets", "wandb"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
    # What the mirror has to say (once) is for the user too.
    logging.getLogger("rlhf_cli.track").addHandler(logging.StreamHandler())
    # A fresh reward head is new on purpose; load_reward_model checks that a trained one is not.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    disable_progress_bar()
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def end_with_driver(driver: str) -> None:
    """Ends this process, its launcher and its peers here when the driver is gone, however it went.

    driver: as `driver` gave it; of another host nothing can be told.
    """
    host, pid, born = driver.rsplit(" ", 2)
    if host != socket.gethostname():
        return

    def watch() -> None:
        while _lives(int(pid), float(born)):
            time.sleep(WATCH_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def driver() -> str:
    """Who this process is, for workers that are to end with it."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time()}"


def _lives(pid: int, born: float) -> bool:
    """Whether it is there, and no other process has got its number."""
    try:
        process = psutil.Process(pid)
        return process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(arguments: list[str]) -> int:
    """Entry point under a launcher; the exit code says how it went (0, 2 for a user's mistake)."""
    path = Path(arguments[-1])
    if DRIVER in os.environ:
        end_with_driver(os.environ[DRIVER])
    try:
        work(path)
    except (UserError, Stopped) as error:
        if os.environ.get("RANK", "0") == "0":
            atomic_write(Run(path).log / SAID[type(error)], str(error))
        return 2 if isinstance(error, UserError) else GO_ON
    except Exception:
        logging.getLogger(__name__).exception("the stage failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
