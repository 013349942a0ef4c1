"""A file of DeepSpeed's own settings (`launch.ds_config`): taken as it is, unless it says what a run says.

A setting that shapes numbers has one place, the configuration that the run's key is made of. A file that
sets it too is refused, even if it says the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Launch

OURS = {
    "train_batch_size": "algo.update.batch, sft.batch and reward.batch",
    "train_micro_batch_size_per_gpu": "launch.micro_batch",
    "gradient_accumulation_steps": "launch.micro_batch",
    "gradient_clipping": "the grad_clip of algo.optim, sft.optim and reward.optim",
    "optimizer": "algo.optim, sft.optim and reward.optim",
    "scheduler": "the schedule of algo.optim, sft.optim and reward.optim",
}
"""Settings of DeepSpeed's that a run makes itself, and by which keys."""


def read(path: str) -> dict[str, Any]:
    """The settings in a file. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"launch.ds_config={path} cannot be read ({error.strerror}); name a JSON file."
        ) from None
    except ValueError as error:
        raise UserError(f"launch.ds_config={path} is no JSON ({error}); mend it.") from None
    if not isinstance(found, dict):
        raise UserError(f"launch.ds_config={path} holds no settings; it must be a JSON object.")
    return found


def faults(launch: Launch, precision: str) -> Iterator[str]:
    """One sentence per setting that is not the file's to make. Raises UserError if it cannot be read."""
    assert launch.ds_config is not None
    found, where = read(launch.ds_config), f"launch.ds_config={launch.ds_config}"
    for key in (key for key in OURS if key in found):
        yield f"{where} sets {key}, which {OURS[key]} set; leave it out of the file."
    for key in _autos(found):
        yield f'{where} sets {key} to "auto", which only trainers that fill it in know; give a number.'
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else zero
    if "zero_optimization" in found and stage != launch.zero:
        yield (
            f"{where} sets zero_optimization.stage={stage}, but launch.zero={launch.zero}; set"
            f" launch.zero={stage}."
        )
    for name in ("bf16", "fp16"):
        enabled = bool(found.get(name, {}).get("enabled", False))
        if name in found and enabled != (precision == name):
            yield (
                f"{where} sets {name}.enabled={str(enabled).lower()}, but model.precision={precision}; let"
                " the two say the same."
            )


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both, level by level; where both say something, theirs."""
    both = dict(ours)
    for key, value in theirs.items():
        known = both.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            both[key] = merged(known, value)
        else:
            both[key] = value
    return both


def _autos(found: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, value in found.items():
        if value == "auto":
            yield at + key
        elif isinstance(value, Mapping):
            yield from _autos(value, f"{at}{key}.")
