"""The files of a figure: picture, numbers, origin, and a caption that says what was claimed and found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_cli.evals import grid
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Scale, Spec
from rlhf_cli.figures.style import pictures
from rlhf_cli.printable import in_cell, in_markdown
from rlhf_cli.store.files import atomic_write, disk
from rlhf_cli.store.metrics import read
from rlhf_cli.store.provenance import origin
from rlhf_cli.store.run import Run


def write(
    result: Result, spec: Spec, scale: Scale, runs: Sequence[Run], command: str, out: Path
) -> dict[str, Path]:
    """Write `out` with each of the suffixes png, pdf, csv, json and md, and tex for a table.

    Raises UserError.
    """
    files = {kind: Path(f"{out}.{kind}") for kind in ("png", "pdf", "csv", "json", "md")}
    with disk(out.parent, key="--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
    for kind, data in pictures(result.figure).items():
        atomic_write(files[kind], data)
    atomic_write(files["csv"], as_csv(result.rows))
    judged = {"claim": spec.claim, "source": spec.source, "scale": scale}
    judged |= {"verdict": result.verdict, "reason": result.reason}
    whole = {"figure": spec.name, **judged, **origin(runs, command)}
    atomic_write(files["json"], json.dumps(whole, indent=2) + "\n")
    atomic_write(files["md"], caption(result, spec, scale, runs, command, out.name))
    if result.table is not None:
        files |= grid.write(result.table, out, kinds=("tex",))
    return files


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as csv; what a row lacks, and nan, is left empty."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: "" if v is None or v != v else in_cell(v) for n, v in row.items()})
    return text.getvalue()


def caption(
    result: Result, spec: Spec, scale: Scale, runs: Sequence[Run], command: str, picture: str
) -> str:
    """What stands under the picture, in Markdown; `picture` is the file's name without ending."""
    table = "" if result.table is None else f"\n{grid.text(result.table, 'md')}"
    return f"""# {spec.title}

![{spec.title}]({picture}.png)

**Claimed** ({spec.source}): {spec.claim}

**Measured** at scale {scale}: {_measured(runs)}

**{result.verdict.capitalize()}.**

{_list(result.reason)}

```sh
{command}
```
{table}"""


def _list(reason: str) -> str:
    """A line for each number."""
    return "\n".join(f"- {part}" for part in reason.split("; "))


def _measured(runs: Sequence[Run]) -> str:
    if not runs:
        return "nothing; the figure is computed exactly, without runs."
    manifests = [run.manifest() for run in runs]
    seeds = sorted({manifest["seed"] for manifest in manifests})
    commits = sorted({str(manifest.get("commit"))[:7] for manifest in manifests})
    asked = sorted({int(row["eval/prompts"]) for run in runs for row in _evaluations(run)})
    prompts = f", {_listed(asked)} held-out prompts at every evaluation" if asked else ""
    return (
        f"{len(runs)} run{'s' * (len(runs) > 1)} of {_listed([m['model'] for m in manifests])} on"
        f" {_listed([m['title'] for m in manifests])}, seed{'s' * (len(seeds) > 1)} {_listed(seeds)}"
        f"{prompts}, commit{'s' * (len(commits) > 1)} {_listed(commits)}."
    )


def _evaluations(run: Run) -> list[Mapping[str, float]]:
    return [row for row in read(run.metrics_path) if "eval/prompts" in row]


def _listed(values: Sequence[object]) -> str:
    return in_markdown(", ".join(dict.fromkeys(map(str, values))))
