"""Checkpoints to resume from, and the final folder others load.

A folder is written under a temporary name and renamed when it is whole: that it exists means that it is
complete. Nothing random needs saving, because every draw is a function of (seed, step, row).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.world import World
from rlhf_cli.errors import UserError
from rlhf_cli.models.tuning import merged

KEPT = 2
"""Checkpoints that stay; older ones are removed."""


def save(
    folder: Path, learner: Learner, world: World, state: dict[str, Tensor], place: dict[str, float]
) -> None:
    """Saves weights, optimiser, the algorithm's state and `place` (where the loop stands).

    folder: `checkpoints/`; the new one is named by the learner's step.
    """
    name = f"{learner.step_index:06d}"
    partial = folder / f".{name}.partial"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    learner.engine.save_checkpoint(str(partial), tag="engine", save_latest=False)
    if world.is_main:
        save_file(
            {k: v.contiguous().cpu() for k, v in state.items()}, partial / "state.safetensors"
        )
        (partial / "place.json").write_text(json.dumps({**place, "step": learner.step_index}))
    world.barrier()
    if world.is_main:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(partial, folder / name)
        for old in whole(folder)[:-KEPT]:
            shutil.rmtree(old)


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def resume(folder: Path, learner: Learner) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """Loads the newest checkpoint into the learner; None if there is none to load.

    Returns the algorithm's state and `place`. Raises UserError if a part is missing: a run never goes
    on with a fresh optimiser in silence.
    """
    found = whole(folder)
    if not found:
        return None
    newest = found[-1]
    try:
        place = json.loads((newest / "place.json").read_text())
        state = load_file(newest / "state.safetensors")
        loaded, _ = learner.engine.load_checkpoint(str(newest), tag="engine")
    except Exception as error:
        raise UserError(_damaged(newest)) from error
    if loaded is None:
        raise UserError(_damaged(newest))
    learner.step_index = int(place["step"])
    return state, place


def _damaged(folder: Path) -> str:
    return f"{folder}: this checkpoint is damaged; delete it to go on from the one before"


def save_final(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Writes a Hugging Face folder (safetensors, tokenizer, model card), whole or not at all.

    Adapters are merged into the weights, so that any library reads it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    merged(model).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def drop_resume_points(folder: Path) -> None:
    """Removes what only a resume would need, once the run is done."""
    for old in whole(folder):
        shutil.rmtree(old)
