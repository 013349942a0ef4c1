"""Finished policies by the names a user gives them, with the policies they are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rlhf_cli.config import Recipe, read, recipe
from rlhf_cli.errors import UserError
from rlhf_cli.models.load import context_length, load_policy
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.store.run import Run, find


@dataclass(frozen=True)
class Policy:
    """A policy on the disk."""

    name: str
    """What to call it: a run's directory below the folder of all runs, or a path."""
    folder: Path
    """In Hugging Face's layout, tokenizer included."""
    run: Run | None
    """The run that made it, if one of ours did."""

    @cached_property
    def recipe(self) -> Recipe:
        """The configuration that its run was frozen with."""
        assert self.run is not None
        return recipe(read(self.run.config_path))

    @property
    def manifest(self) -> dict[str, Any]:
        """Of its run; {} without one."""
        return self.run.manifest() if self.run else {}

    def parent(self, role: str) -> Run | None:
        """The finished run that its run started from in this role, None if there is none."""
        at = self.manifest.get("parent_runs", {}).get(role)
        if at is None or self.run is None:
            return None
        return _finished(Run(self.run.path.absolute().parents[1] / at))

    def reference(self) -> Policy | None:
        """The SFT policy that its run started from."""
        run = self.parent("sft")
        return None if run is None else Policy(_name(run), run.final, run)


def trained(runs: Path, reference: str) -> Policy:
    """The policy of a finished run. Raises UserError if no such run is meant."""
    run = find(runs, reference)
    if run.manifest().get("stage") == "reward":
        raise UserError(
            f"{run.path} is a reward model, not a policy; name a run of stage sft or rl."
        )
    return Policy(_name(run), _finished(run).final, run)


def trained_or_folder(runs: Path, reference: str) -> Policy:
    """The policy in a folder of Hugging Face's layout, or else of a finished run."""
    folder = Path(reference)
    if (folder / "config.json").is_file():
        return Policy(str(folder), folder, None)
    return trained(runs, reference)


def proxy(
    runs: Path, reference: str, anchor: str, weight: float | None
) -> tuple[Policy, Policy, float] | None:
    """A tuned proxy, its reference and the weight of their ratio; None if none is asked for."""
    if not reference:
        for name, value in {"ref": anchor or None, "weight": weight}.items():
            if value is not None:
                raise UserError(
                    f"--proxy-{name}={value} has no effect without --proxy; add --proxy=RUN."
                )
        return None
    if weight is not None and not math.isfinite(weight):
        raise UserError(f"--proxy-weight={weight} is not allowed: it must be a number.")
    tuned = trained(runs, reference)
    against = trained_or_folder(runs, anchor) if anchor else tuned.reference()
    if against is None:
        raise UserError(
            f"{tuned.name} started from no policy; name its reference: --proxy-ref=RUN."
        )
    return tuned, against, 1.0 if weight is None else weight


def tokenizer_of(*policies: Policy) -> PreTrainedTokenizerBase:
    """The tokenizer of the first policy, which the others must share (else UserError)."""
    first = load_tokenizer(policies[0].folder)
    for other in policies[1:]:
        if load_tokenizer(other.folder).get_vocab() != first.get_vocab():
            raise UserError(
                f"{other.name} and {policies[0].name} have different tokenizers, so their tokens cannot"
                " be compared; name policies of one family."
            )
    return first


def load(
    policies: list[Policy], precision: str, tokenizer: PreTrainedTokenizerBase
) -> list[PreTrainedModel]:
    """The models, on the GPU if there is one; one object for a folder that is named twice.

    Models of one family may have padded the vocabulary to different sizes; then all are cut to the
    tokenizer's, so that they speak of the same tokens.
    """
    quiet()
    by_folder = {each.folder: load_policy(each.folder, precision, tokenizer) for each in policies}
    if len({m.get_input_embeddings().num_embeddings for m in by_folder.values()}) > 1:
        for model in by_folder.values():
            model.resize_token_embeddings(len(tokenizer))
    return [by_folder[each.folder].to(device()) for each in policies]


def device() -> torch.device:
    """Where models are put."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Keeps the libraries' bars and warnings off the user's terminal."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_fits(policy: Policy, tokens: int, what: str) -> None:
    """UserError if so many tokens are more than the policy was made for."""
    most = context_length(policy.folder, None)
    if most is not None and tokens > most:
        raise UserError(f"{what} has {tokens} tokens and {policy.name} reads {most}; shorten it.")


def _finished(run: Run) -> Run:
    if (status := run.status()) != "done":
        raise UserError(
            f"{run.path} is {status}, not done; give the command that makes it again to go on with it."
        )
    run.check_final()
    return run


def _name(run: Run) -> str:
    return f"{run.stage}/{run.path.absolute().name}"
