"""From a run directory back to the plan it was begun with: what `rlhf resume` carries out.

The frozen configuration says all that the command said, so to go on by it and to give the command again
are one and the same. What it does not say is where the command was typed: relative paths in it, but for
the folder of runs, are read from where one stands.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_cli import config
from rlhf_cli.errors import UserError
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.run import Run


def plan_of(run: Run) -> Plan:
    """The chain that ends with this run, in the folder of runs where it lies.

    Raises UserError if the configuration does not make this run, or a run before it is not done.
    """
    command = run.manifest()["command"]
    if run.stage == "eval":
        raise UserError(
            f"{run.path} is an evaluation, which begins anew; give its command again: {command}"
        )
    node = config.read(run.config_path)
    kept_in = run.path.absolute().parents[1]
    if Path(node.paths.runs).absolute() != kept_in:
        node.paths.runs = str(kept_in)
    found = plan(node)
    made = found.steps[-1].path
    if made.absolute() != run.path.absolute():
        raise UserError(
            f"{run.config_path} makes {made}, not this run: it was edited, the data or the model that it"
            " names by a path are others now, the folder was moved, or another version of rlhf-cli made it;"
            " undo that, or give `rlhf train` what you want."
        )
    for step in found.steps[:-1]:
        if step.status != "done":
            raise UserError(
                f"{run.path} starts from {step.path}, which is {step.status}; give the whole command again:"
                f" {command}"
            )
    return found
