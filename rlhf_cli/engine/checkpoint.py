"""Checkpoints to resume from, and the final folder others load.

A folder is written under a temporary name, brought to the disk and renamed: that it exists means that it is
complete, and the digests in its `place.json` say whether it still is. Nothing random needs saving, because
every draw is a function of (seed, step, row). Nothing is pickled: reading a checkpoint runs no code of its
writer's. Weights and moments are whole, so that another number of processes may go on with them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.engine import masters
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.saved import check_saved
from rlhf_cli.engine.world import World
from rlhf_cli.errors import UserError
from rlhf_cli.models.tuning import merged
from rlhf_cli.store.files import disk, sha256, to_disk

SHARD = 2**31
"""Bytes of tensors from which on another file is begun: what one process gathers before it writes."""
PLACE, STATE = "place.json", "state.safetensors"


def save(
    folder: Path,
    learner: Learner,
    world: World,
    state: dict[str, Tensor],
    place: dict[str, float],
    keep: int,
) -> None:
    """Saves weights, optimiser, the algorithm's state and `place` (where the loop stands).

    folder: `checkpoints/`; the new one is named by the learner's step. keep: how many of the newest stay,
    older ones are removed. Raises UserError if the disk
    refuses; the ones before are still there then.
    """
    name = f"{learner.step_index:06d}"
    partial = folder / f".{name}.partial"
    tidy = _gone_unless_whole(partial) if world.is_main else nullcontext()
    with disk(folder / name, needed=_bytes(whole(folder)[-1:])), tidy:
        if world.is_main:
            partial.mkdir(parents=True)
        shards = _Shards(partial)
        for key, tensor in masters.gathered(learner.engine, learner.launch.zero):
            if world.is_main:
                shards.add(key, tensor)
        if world.is_main:
            shards.write()
            save_file({k: v.contiguous().cpu() for k, v in state.items()}, partial / STATE)
            files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            place = {**place, "step": learner.step_index}
            (partial / PLACE).write_text(json.dumps({**place, "files": files}, indent=2))
            to_disk(partial)
            _remove(folder / name)
            os.replace(partial, folder / name)
            for old in whole(folder)[:-keep]:
                _remove(old)
    world.barrier()


@contextmanager
def _gone_unless_whole(partial: Path) -> Iterator[None]:
    """Begins without what a crash may have left of it, and leaves nothing of it on a disk that refuses."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _bytes(folders: Iterable[Path]) -> int:
    """What is in them."""
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


@dataclass
class _Shards:
    """Tensors on their way into files of a bearable size."""

    folder: Path
    waiting: dict[str, Tensor] = field(default_factory=dict)
    written: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor
        if sum(each.nbytes for each in self.waiting.values()) > SHARD:
            self.write()

    def write(self) -> None:
        self.written += 1
        save_file(self.waiting, self.folder / f"learner-{self.written:05d}.safetensors")
        self.waiting.clear()


def _remove(folder: Path) -> None:
    """Of a link only the link: what it leads to is someone else's."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def whole(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir())


def resume(folder: Path, learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Loads the newest checkpoint into the learner; None if there is none to load.

    Returns the algorithm's state and `place`. Raises UserError if a part is missing or damaged: a run never
    goes on with a fresh optimiser in silence.
    """
    found = whole(folder)
    if not found:
        return None
    newest = found[-1]
    place = _checked(newest, found[:-1])
    try:
        masters.restore(learner.engine, learner.launch.zero, _reader(newest))
        learner.step_index = int(place["step"])
        return load_file(newest / STATE), place
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{newest} is no checkpoint of this run ({first}); delete {newest} {_way(found[:-1])}."
        ) from error


def _checked(folder: Path, earlier: list[Path]) -> dict[str, Any]:
    """Where the loop stood. Raises UserError for the first file that is not as it was written."""
    way = _way(earlier)
    try:
        place: dict[str, Any] = json.loads((folder / PLACE).read_text())
        files = place["files"].items()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder / PLACE} is damaged or missing; delete {folder} {way}."
        ) from error
    for name, digest in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; delete {folder} {way}.")
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is not as it was written; delete {folder} {way}.")
    return place


def _way(earlier: list[Path]) -> str:
    """What deleting the newest checkpoint leads to."""
    return f"to go on from {earlier[-1].name}" if earlier else "to begin the run again"


def _reader(folder: Path) -> Callable[[str], Tensor]:
    """From the name of a tensor to the tensor."""
    opened = [safe_open(file, "pt") for file in sorted(folder.glob("learner-*.safetensors"))]
    where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
    return lambda name: where[name].get_tensor(name)


def save_final(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Writes a Hugging Face folder (safetensors, tokenizer, model card), whole or not at all.

    Adapters are merged into the weights, so that any library reads it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    whole_model = merged(model)
    needed = sum(each.nbytes for each in whole_model.parameters())
    with disk(folder, needed=needed), _gone_unless_whole(partial):
        partial.mkdir(parents=True)
        whole_model.save_pretrained(partial)
        check_saved(partial, whole_model)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        to_disk(partial)
        _remove(folder)
        os.replace(partial, folder)


def drop_resume_points(folder: Path) -> None:
    """Removes what only a resume would need, once the run is done."""
    for old in whole(folder):
        _remove(old)
