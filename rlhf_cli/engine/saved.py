"""Whether a folder gives back the model that was written into it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from rlhf_cli.errors import UserError


def check_saved(folder: Path, model: PreTrainedModel) -> None:
    """UserError unless the folder, loaded as any library would load it, has the model's very weights.

    Weights that are sharded over processes have no elements here, and would be saved so without a word.
    """
    fault = _fault(folder, model)
    if fault:
        raise UserError(
            f"the finished model cannot be saved whole ({fault}), so the run is not done; give the same"
            " command again to save it anew, with launch.zero=2 if it was 3."
        )


def _fault(folder: Path, model: PreTrainedModel) -> str:
    """What is wrong with the first weight that is, or nothing."""
    ours = model.state_dict()
    for name, tensor in ours.items():
        if tensor.numel() == 0:
            return f"{name} is empty"
        if not tensor.isfinite().all():
            return f"{name} holds what is no number"
    try:
        again, report = type(model).from_pretrained(
            folder, dtype=model.dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".")
    if report["missing_keys"]:
        return f"{sorted(report['missing_keys'])[0]} is missing in the file"
    theirs = cast(PreTrainedModel, again).state_dict()
    for name, tensor in ours.items():
        if not torch.equal(tensor.cpu(), theirs[name]):
            return f"{name} is another in the file"
    return ""
