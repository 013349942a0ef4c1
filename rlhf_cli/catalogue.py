"""What there is to say about every algorithm, read off its yaml and its docstrings.

The folder `conf/algo` is the registry: the first line of a yaml says what it is and names the paper,
its comments say where each number comes from; the module's docstring holds the equations, the class's
fields their meaning and unit. `rlhf algos` and the pages in docs/algorithms say nothing else.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_cli.config import compose, conf_dir, recipe
from rlhf_cli.errors import UserError

COLUMNS = {"nano": "nano", "paper": "pythia_1b"}
"""Column of shipped values -> a model that is of it."""

PAPER = re.compile(r"\(([^()]*?arXiv:[^()]*?)\)")


@dataclass(frozen=True)
class Field:
    """One hyperparameter."""

    name: str
    values: Mapping[str, Any]
    """Column of shipped values to the value there."""
    meaning: str
    source: str


@dataclass(frozen=True)
class Entry:
    """One algorithm."""

    name: str
    line: str
    """What it is, in one line."""
    paper: str
    mathematics: str
    """The docstring of its module."""
    module: str
    needs: tuple[str, ...]
    policy: str
    """on: learns from its own newest responses; off: from given ones; mixed: from both, or old ones."""
    learns_from: str
    """Which responses: whose, how many per prompt."""
    shift_invariant: bool
    fields: tuple[Field, ...]


def names() -> list[str]:
    """Every choice of `algo=`, in order."""
    return sorted(path.stem for path in _folder().glob("[!_]*.yaml"))


def entry(name: str, columns: Sequence[str] = tuple(COLUMNS)) -> Entry:
    """All about one algorithm, with the values of some columns. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"{name} is no algorithm; choose one of {', '.join(names())}.")
    shipped = {column: _shipped(name, COLUMNS[column]) for column in columns}
    algo = shipped[columns[0]]
    cls = type(algo)
    first = (_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    paper = PAPER.search(first)
    meanings, sources = _meanings(cls), _sources(name)
    return Entry(
        name=name,
        line=PAPER.sub("", first.lstrip("# ")).replace(" .", ".").replace(" :", ":").strip(),
        paper=paper[1] if paper else "",
        mathematics=inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""),
        module=cls.__module__,
        needs=tuple(sorted(need.value for need in algo.needs)),
        policy=_policy(algo),
        learns_from=_learns_from(algo),
        shift_invariant=algo.shift_invariant,
        fields=tuple(
            Field(
                f.name,
                {column: getattr(each, f.name) for column, each in shipped.items()},
                meanings.get(f.name, ""),
                sources.get(f.name, ""),
            )
            for f in fields(cls)
            if f.name not in ("update", "optim", "guide")
        ),
    )


def table(entries: list[Entry]) -> Table:
    """One line per algorithm, to be read at 80 columns."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("algo", no_wrap=True)
    drawn.add_column("what", overflow="fold")
    for column in ("policy", "needs", "shift"):
        drawn.add_column(column, overflow="fold")
    for each in entries:
        what = f"{each.line} {each.paper}"
        blind = "blind" if each.shift_invariant else "-"
        drawn.add_row(each.name, what, each.policy, " ".join(each.needs) or "-", blind)
    return drawn


def page(one: Entry) -> RenderableType:
    """One algorithm in full."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("field", *COLUMNS):
        drawn.add_column(column, no_wrap=True)
    drawn.add_column("meaning; where the value comes from", overflow="fold")
    for f in one.fields:
        said = f"{f.meaning} [{f.source}]" if f.source else f.meaning
        drawn.add_row(f.name, *(str(f.values[c]) for c in COLUMNS), Text(said))
    return Group(
        Text(f"{one.name}: {one.line}", style="bold"),
        Text(f"{one.paper}\nlearns from {one.learns_from}; {_shift(one)}"),
        Text(f"needs {', '.join(one.needs) or 'nothing beside the policy'}\n"),
        Text(one.mathematics + "\n"),
        drawn,
        Text(f"\ncode: {one.module}    run: rlhf train algo={one.name} data=hh"),
    )


def plain(one: Entry) -> dict[str, Any]:
    """The same as plain data."""
    listed = [
        {"name": f.name, **f.values, "meaning": f.meaning, "source": f.source} for f in one.fields
    ]
    return {**{f.name: getattr(one, f.name) for f in fields(one)}, "fields": listed}


def markdown(one: Entry) -> str:
    """The page of an algorithm in docs/algorithms."""
    head = f"| field | {' | '.join(COLUMNS)} | meaning | source |\n|---|{'---|' * len(COLUMNS)}---|---|\n"
    rows = "".join(
        f"| `{f.name}` | {' | '.join(f'`{f.values[c]}`' for c in COLUMNS)} "
        f"| {_cell(f.meaning)} | {_cell(f.source)} |\n"
        for f in one.fields
    )
    needs = ", ".join(f"`{need}`" for need in one.needs) or "nothing beside the policy"
    path = one.module.replace(".", "/") + ".py"
    return (
        f"# {one.name}\n\n{one.line}\n\n"
        f"Paper: {one.paper}. Learns from {one.learns_from} ({one.policy}-policy). Needs {needs}. "
        f"{_shift(one).capitalize()}.\n"
        f"Code: [`{path}`](../../{path}).\n\n```sh\nrlhf train algo={one.name} data=hh\n```\n\n"
        f"```text\n{one.mathematics}\n```\n\n{head}{rows}"
    )


def index(entries: list[Entry]) -> str:
    """The first page of docs/algorithms."""
    rows = "".join(
        f"| [`{e.name}`]({e.name}.md) | {_cell(e.line)} | {e.paper} | {e.policy} | {e.learns_from} "
        f"| {' '.join(e.needs) or '-'} | {'blind' if e.shift_invariant else '-'} |\n"
        for e in entries
    )
    return (
        "# Algorithms\n\nWritten by `make algorithms` from the yaml and the docstrings; `rlhf algos` prints"
        " the same.\n*shift*: blind to a function of the prompt added to the reward, sample by sample."
        "\n\n| `algo=` | what | paper | policy | learns from | needs | shift |\n"
        "|---|---|---|---|---|---|---|\n"
        f"{rows}"
    )


def _folder() -> Path:
    return conf_dir() / "algo"


def _shipped(name: str, model: str) -> Any:
    return recipe(compose([f"algo={name}", f"model={model}"])).algo


def _shift(one: Entry) -> str:
    """What it makes of a function of the prompt added to the reward."""
    blind = one.shift_invariant
    return f"{'blind' if blind else 'not blind'} to a reward shifted by a function of the prompt"


def _policy(algo: Any) -> str:
    """Whether it learns from responses of the current policy, in a word."""
    sources = {*algo.sampling().sources, *algo.side().sources}
    own = sources & {"policy", "greedy"}
    if not own:
        return "off"
    return "on" if own == sources and algo.replayed() == 1 else "mixed"


def _learns_from(algo: Any) -> str:
    """Whose responses an algorithm learns from, both streams together."""

    def said(sampling: Any) -> Iterator[str]:
        words = {"dataset": "of a pair", "demo": "demonstrated", "mismatch": "mismatched"}
        for source in dict.fromkeys(sampling.sources):
            yield f"{sampling.sources.count(source)} {words.get(source, source)}"

    parts = [" + ".join(said(s)) for s in (algo.sampling(), algo.side()) if s.responses]
    replayed = f", of {algo.replayed()} rollouts" if algo.replayed() > 1 else ""
    return ", beside ".join(parts) + replayed


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the docstring that follows it."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def _sources(name: str) -> dict[str, str]:
    """Key -> the comment beside it, in the yaml that says it last."""
    path = _folder() / f"{name}.yaml"
    found: dict[str, str] = {}
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    for base in node.get("defaults", []):
        if isinstance(base, str) and base != "_self_" and "@" not in base:
            found |= _sources(base)
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"(\w+):.*?\s#\s(.*)", line):
            found[match[1]] = match[2]
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
