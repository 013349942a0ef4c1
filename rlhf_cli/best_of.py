"""Many responses of the SFT policy to each evaluation prompt: what best of n chooses from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rlhf_cli.figures.kinds.overoptimisation import Options
from rlhf_cli.figures.spec import Spec
from rlhf_cli.remeasure import remeasure
from rlhf_cli.store.files import atomic_write
from rlhf_cli.store.run import Run


def prepare(panels: Mapping[str, Sequence[Run]], spec: Spec) -> None:
    """Draw and score them once, as the first run's own evaluations are. Raises UserError.

    Leaves {prompts [P], score [P,M], gold [P,M]} of M responses.
    """
    run, draws = next(iter(panels.values()))[0], spec.typed(Options).draws
    file = spec.made_of(run)
    if file.is_file():
        return
    sft = run.manifest()["parents"]["sft"]
    command = f"rlhf eval {sft} --like {run.key} --draws {draws}"
    found = remeasure(run.path.parents[1], sft, run.key, draws, command).run
    rows = found.responses(0)
    made = {
        name: [[row[name] for row in rows[at : at + draws]] for at in range(0, len(rows), draws)]
        for name in ("score", "gold")
    }
    made["prompts"] = [row["prompt"] for row in rows[::draws]]
    file.parent.mkdir(exist_ok=True)
    atomic_write(file, json.dumps(made) + "\n")
