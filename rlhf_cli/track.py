"""The mirror of a run's metrics in Weights & Biases; the only file that imports wandb.

`metrics.jsonl` is the source and W&B a copy: whatever goes wrong here is said in one line, and the
run goes on without its mirror. It is fed from a thread of its own, because W&B may wait in any of its
calls for as long as its server or its service does not answer. Nothing ever asks the user a question.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Full, Queue
from typing import Any, Literal, TypeAlias
from urllib.parse import urlparse

import psutil

from rlhf_cli.recipes import Track
from rlhf_cli.store.metrics import read

PATIENCE = 20.0
"""Seconds in which W&B must begin a run, and take the rest of it at the end; a run waits only there."""
GRACE = 5.0
"""Seconds more at the end, after which its service is killed."""
BACKLOG = 10_000
"""Most rows that may wait for it."""
SERVICE = "wandb-core"
"""Name of its service, a process that all runs of this one share."""
WATCHER = "NetStatThr"
"""Name of its threads here that listen to the service."""

SAMPLE_COLUMNS = ("prompt", "response", "score", "gold", "kl")

Action: TypeAlias = Callable[[Any], object]
"""What is done with a W&B run."""

_log = logging.getLogger(__name__)


class Mirror:
    """Copies what it is handed to a W&B run, never keeping the caller waiting; does nothing without one."""

    def __init__(
        self, begin: Callable[[], Any] | None = None, points: Sequence[tuple[float, float]] = ()
    ) -> None:
        """begin: starts the W&B run; points: (KL, reward) of the evaluations of earlier segments."""
        self._points = list(points)
        self._actions: Queue[Action | None] = Queue(BACKLOG)
        self._lock = threading.Lock()
        self._off = begin is None
        self._thread = threading.Thread(target=self._work, args=(begin,), daemon=True)
        if begin is not None:
            self._thread.start()

    def log(self, row: Mapping[str, float]) -> None:
        """Copy a row of metrics; after an evaluation, also the KL-reward chart so far."""
        copy = dict(row)
        self._hand(lambda run: run.log(copy))
        if point := _point(row):
            self._points.append(point)
            points = list(self._points)
            self._hand(lambda run: run.log({"kl_reward": _chart(points)}))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Copy the responses of an evaluation as a table; a value a row lacks is left empty."""
        data = [[row.get(column) for column in SAMPLE_COLUMNS] for row in rows]
        self._hand(lambda run: run.log({"samples": _table(SAMPLE_COLUMNS, data), "step": step}))

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, marked as failed unless the exit code is 0."""
        self._hand(lambda run: run.finish(exit_code=exit_code))
        self._hand(None)
        if self._thread.ident is not None:
            self._thread.join(PATIENCE + GRACE)
            if self._thread.is_alive():
                self._give_up(f"it did not take the rest within {PATIENCE + GRACE:g} s")
        self._off = True

    def _hand(self, action: Action | None) -> None:
        if self._off:
            return
        try:
            self._actions.put_nowait(action)
        except Full:
            self._give_up(f"it is {BACKLOG} rows behind")

    def _work(self, begin: Callable[[], Any]) -> None:
        try:
            run = begin()
            while action := self._actions.get():
                action(run)
        except Exception as error:  # whatever W&B raises, the run goes on
            self._give_up(" ".join(str(error).split()) or type(error).__name__)

    def _give_up(self, reason: str) -> None:
        with self._lock:
            if self._off:
                return
            self._off = True
            _log.warning(
                "W&B is off for the rest of this run; metrics.jsonl is complete (%s)", reason
            )
            _end_service()


def open_mirror(
    track: Track,
    run_path: Path,
    *,
    name: str,
    key: str,
    group: str,
    job_type: str,
    tags: Sequence[str],
    config: dict[str, Any],
) -> Mirror:
    """Start, or resume under the run's key, the W&B run in `run_path`/wandb.

    Online only if `track.mode` is auto and credentials are there, without which W&B would prompt.
    """
    if track.kind == "off":
        return Mirror()

    earlier = [point for row in read(run_path / "metrics.jsonl") if (point := _point(row))]
    # Its reports of its own faults go to a server too, and would be waited for at the exit.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # here, since libraries must not be imported by two threads at once

    def begin() -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            reinit="create_new",
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            finish_timeout_raises=True,
        )
        wandb.setup(settings)  # which alone silences what is said before a run is there
        run = wandb.init(
            project=track.project,
            name=name,
            id=key,
            resume="allow",
            group=group,
            job_type=job_type,
            tags=list(tags),
            config=config,
            dir=str(run_path.resolve()),  # a W&B service may run elsewhere already
            mode=mode(track),
            settings=settings,
        )
        run.define_metric("*", step_metric="episodes")
        return run

    return Mirror(begin, earlier)


def _end_service() -> None:
    """Ends the service that hangs or has failed, so that the next run of this process gets a new one.

    W&B's own way waits for it, and so would the exit of this process.
    """
    import wandb

    # W&B leaves this process with the code of its service, which is why SystemExit is among them.
    with _unheard(), suppress(Exception, SystemExit):
        services = [each for each in psutil.Process().children() if each.name() == SERVICE]
        for service in services:
            service.kill()
        psutil.wait_procs(services, GRACE)
        wandb.teardown()


@contextmanager
def _unheard() -> Iterator[None]:
    """Keeps from the terminal how W&B's own threads end, who lose their service here."""
    theirs = [each for each in threading.enumerate() if each.name == WATCHER]
    before, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
        for thread in theirs:
            thread.join(1)
    finally:
        threading.excepthook = before


def mode(track: Track) -> Literal["online", "offline", "disabled"]:
    """How a run is mirrored from here: online only where W&B need not ask for a key."""
    asked = os.environ.get("WANDB_MODE")
    if asked == "disabled":
        return "disabled"
    if track.mode == "auto" and asked != "offline" and has_credentials():
        return "online"
    return "offline"


def has_credentials() -> bool:
    """Whether W&B would find an API key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        file = os.environ.get("NETRC", str(Path.home() / ".netrc"))
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _point(row: Mapping[str, float]) -> tuple[float, float] | None:
    point = row.get("eval/kl", math.nan), row.get("eval/reward", math.nan)
    return point if all(map(math.isfinite, point)) else None


def _table(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in data])


def _chart(points: Sequence[tuple[float, float]]) -> Any:
    import wandb

    table = _table(("eval/kl", "eval/reward"), points)
    return wandb.plot.scatter(table, "eval/kl", "eval/reward", title="KL-reward frontier")
