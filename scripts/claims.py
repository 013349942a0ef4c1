"""Writes docs/results/claims.md: what of each paper's claim held here, claim by claim.

    rlhf figure NAME --out docs/results/figures     for every figure that is to be in it, and then
    python scripts/claims.py

Everything is read from the json beside the figures; nothing is judged here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
HEAD = """# Claims of the papers, and what was found

Written by `python scripts/claims.py` from the files beside the figures. A claim holds if the 95% interval of
every difference it is made of lies above 0, does not hold if one lies below 0 by more than chance (Holm), and
is open otherwise. All of it is at nano scale: small models of the embedded corpora, which say little about
models a thousand times larger. No run's setting was changed after a verdict was seen; where the way of
judging was, the figure's file says so.
"""


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page, its figures in the order of their names."""
    count = Counter(each["verdict"] for each in found)
    told = ", ".join(
        f"{verdict} {count[verdict]}" for verdict in ("holds", "does not hold", "open")
    )
    every = len(list((ROOT / "conf" / "figure").glob("*.yaml")))
    rows = [f"{len(found)} of {every} figures have their runs so far: {told}.", ""]
    rows += ["| figure | verdict | source |", "|---|---|---|"]
    rows += [f"| [{e['figure']}](#{e['figure']}) | {e['verdict']} | {e['source']} |" for e in found]
    return "\n".join([HEAD, *rows, "", *map(section, found)])


def section(figure: Mapping[str, Any]) -> str:
    """One claim: the picture, what was measured, by which runs of which commits."""
    name = figure["figure"]
    keys = ", ".join(run["key"] for run in figure["runs"]) or "none: it is computed exactly"
    commits = sorted(
        {str(run["commit"])[:7] for run in figure["runs"]} | {str(figure["commit"])[:7]}
    )
    return f"""## {name}

![{name}](figures/{name}.png)

**Claimed** ({figure["source"]}): {figure["claim"]}

**{figure["verdict"].capitalize()}.** {figure["reason"]}

`{figure["command"]}` at {", ".join(commits)}; runs: {keys}. Numbers: [{name}.csv](figures/{name}.csv).
"""


def main() -> None:
    """Write the page."""
    files = sorted((RESULTS / "figures").glob("*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    (RESULTS / "claims.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
