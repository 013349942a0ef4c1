"""The mirror of a run's metrics in Weights & Biases; the only file that imports wandb.

`metrics.jsonl` is the source and W&B a copy: whatever goes wrong here is said in one line, and the
run goes on without its mirror. Nothing ever asks the user a question.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from rlhf_cli.recipes import Track
from rlhf_cli.store.metrics import read

PATIENCE = 20
"""Seconds to wait for the W&B server before a run and after it."""

SAMPLE_COLUMNS = ("prompt", "response", "score", "gold", "kl")

_log = logging.getLogger(__name__)


class Mirror:
    """Copies what it is handed to a W&B run; does nothing without one."""

    def __init__(self, run: Any = None, points: Sequence[tuple[float, float]] = ()) -> None:
        """`points`: (KL, reward) of the evaluations of earlier segments."""
        self._run = run
        self._points = list(points)

    def log(self, row: Mapping[str, float]) -> None:
        """Copy a row of metrics; after an evaluation, also the KL-reward chart so far."""
        self._try(lambda run: run.log(dict(row)))
        if point := _point(row):
            self._points.append(point)
            self._try(lambda run: run.log({"kl_reward": _chart(self._points)}))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Copy the responses of an evaluation as a table; a value a row lacks is left empty."""
        data = [[row.get(column) for column in SAMPLE_COLUMNS] for row in rows]
        self._try(lambda run: run.log({"samples": _table(SAMPLE_COLUMNS, data), "step": step}))

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, marked as failed unless the exit code is 0."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever W&B raises, the run goes on
            _warn(error)
            self._run = None


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
    try:
        import wandb

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
            mode=_mode(track),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                reinit="create_new",
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
            ),
        )
        run.define_metric("*", step_metric="episodes")
        return Mirror(run, earlier)
    except Exception as error:  # as in Mirror
        _warn(error)
        return Mirror()


def _mode(track: Track) -> Literal["online", "offline", "disabled"]:
    asked = os.environ.get("WANDB_MODE")
    if asked == "disabled":
        return "disabled"
    if track.mode == "auto" and asked != "offline" and _has_credentials():
        return "online"
    return "offline"


def _has_credentials() -> bool:
    """Whether W&B would find an API key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        file = os.environ.get("NETRC", str(Path.home() / ".netrc"))
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _warn(error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    _log.warning("W&B is off for the rest of this run; metrics.jsonl is complete (%s)", reason)


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
