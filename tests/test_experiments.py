"""Every experiment is a plan, and says of each of its numbers where it comes from."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cli import cost, memory
from rlhf_cli.config import Recipe, compose, conf_dir, recipe
from rlhf_cli.errors import UserError
from rlhf_cli.plan import plan
from rlhf_cli.shapes import PUBLISHED

FILES = sorted((conf_dir() / "experiment").glob("*.yaml"))
NAMES = [file.stem for file in FILES if not file.name.startswith("_")]
COMMITS = [f"{key}={'0' * 40}" for key in ("data.revision", "data.pairs_revision")]
"""What TL;DR from the hub leaves to the user."""

ALSO = {
    "p3o_hh_1b": ["p3o_v1", "ppo", "dpo_online"],
    "p3o_hh_6b": ["p3o_v1", "ppo", "dpo_online"],
    "p3o_tldr_6b": ["ppo", "dpo_online"],
    "basics_tldr_6_9b": ["reinforce", "raft", "ppo", "vanilla_pg"],
    "basics_hh_6_9b": ["reinforce", "raft", "ppo", "vanilla_pg"],
    "secrets_hh_7b": ["ppo"],
    "copg_tldr_7b": ["dpo", "ipo"],
}
"""The other algorithms that an experiment's head says its settings are for."""

SOURCE = re.compile(r"\bet al\. \d{4}\b|\bauthors' code\b|\bP3O blog\b|\bours: ")


def words(name: str, *more: str) -> list[str]:
    commits = COMMITS if "tldr" in name else []
    return [f"experiment={name}", *commits, *more]


@cache
def made(name: str, *more: str) -> Recipe:
    return recipe(compose(words(name, *more)))


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value."""
    if not isinstance(values, dict):
        return {prefix: values}
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def stated(file: Path) -> dict[str, Any]:
    """The values that a file states, its choices left out."""
    values = yaml.safe_load(file.read_text())
    values.pop("defaults")
    return leaves(values)


def test_the_papers_are_there() -> None:
    papers = {name.partition("_")[0] for name in NAMES}
    assert papers == {"p3o", "basics", "secrets", "copg", "sfd"}
    assert ALSO.keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_plans_with_weights_and_rows_from_the_hub(name: str) -> None:
    steps = plan(compose(words(name))).steps
    assert [step.stage for step in steps] == ["sft", "reward", "rl"]
    last = steps[-1].recipe
    assert (last.data.source, last.model.name in PUBLISHED) == ("hub", True)  # type: ignore[attr-defined]
    assert last.model.regime == "paper"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_states_is_what_is_run(name: str) -> None:
    node, folder = compose(words(name)), conf_dir() / "experiment"
    bases = [folder / "_sfd_tldr.yaml"] if name.startswith("sfd") else []
    for file in (*bases, folder / f"{name}.yaml"):
        for key, value in stated(file).items():
            part: Any = node
            for step in key.split("."):
                part = part[step]
            assert part == (float(value) if isinstance(part, float) else value), key
    assert made(name).group == name


@pytest.mark.parametrize(("name", "algo"), [(n, a) for n, also in ALSO.items() for a in also])
def test_the_command_line_chooses_another_of_the_papers_algorithms(name: str, algo: str) -> None:
    other, own = made(name, f"algo={algo}"), made(name)
    assert other.name == algo != own.name
    assert plan(compose(words(name, f"algo={algo}"))).steps[-1].key
    # One budget and one rate for all of them, and the same two earlier stages.
    assert other.algo.update.episodes == own.algo.update.episodes
    assert other.algo.update.batch == own.algo.update.batch
    assert other.algo.optim.lr == own.algo.optim.lr
    assert (other.sft, other.reward, other.data) == (own.sft, own.reward, own.data)


def test_the_command_line_has_the_last_word_on_a_value() -> None:
    assert made("basics_hh_6_9b", "algo.beta=0.5", "seed=3").algo.beta == 0.5  # type: ignore[attr-defined]
    assert made("basics_hh_6_9b").algo.beta == 0.10  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_eight_processes_can_share_an_experiment(name: str) -> None:
    made(name, "launch=deepspeed", "launch.processes=8")


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_has_a_cost(name: str) -> None:
    for stage in "sft", "reward", "rl":
        found = cost.of_stage(stage, made(name), True)
        assert found is not None and found.rows is None
        assert 0.1 < found.gpu_hours < 1e4
        assert 1e9 < memory.of_stage(stage, made(name), True).peak < 1e12


def test_tldr_from_the_hub_needs_its_commits() -> None:
    with pytest.raises(UserError, match=r"^data\.revision=null .* data\.revision=COMMIT\.$"):
        plan(compose(["experiment=sfd_tldr_1b"]))


def test_an_unknown_experiment_is_told_the_choices() -> None:
    with pytest.raises(UserError) as caught:
        compose(["experiment=nope"])
    assert (
        str(caught.value) == f"experiment=nope is not a choice; choose one of {', '.join(NAMES)}."
    )


# --- sources


def sources(file: Path) -> dict[str, str]:
    """Dotted key to the comment beside its value, by the lines of the file."""
    found, above = {}, list[tuple[int, str]]()
    for line in file.read_text().splitlines():
        match = re.match(r"( *)(\w+):(?: +(.*))?$", line)
        if match is None or line.startswith("#"):
            continue
        indent, key, rest = len(match[1]), match[2], match[3] or ""
        above = [(at, name) for at, name in above if at < indent] + [(indent, key)]
        value, _, comment = rest.partition(" # ")
        if value:
            found[".".join(name for _, name in above)] = comment
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_value_has_its_source_beside_it(file: Path) -> None:
    comments = sources(file)
    assert comments.keys() == stated(file).keys()
    for key in comments.keys() - {"track.group"}:
        assert SOURCE.search(comments[key]), f"{file.name}: {key} has no source: {comments[key]!r}"


def test_a_number_without_a_source_is_found(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("# words\ndefaults: []\nalgo:\n  optim:\n    lr: 1.0e-6 # nice\n  beta: 0.1\n")
    assert sources(file) == {"defaults": "", "algo.optim.lr": "nice", "algo.beta": ""}
    assert not any(SOURCE.search(comment) for comment in sources(file).values())


@pytest.mark.parametrize("name", NAMES)
def test_the_head_names_the_paper_and_the_algorithms(name: str) -> None:
    first, *rest = (conf_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    head = " ".join(line[2:] for line in rest if line.startswith("# "))
    assert re.search(r"et al\. \d{4}, arXiv:\d{4}\.\d{5}\)", head)
    assert all(re.search(rf"\b{algo}\b", head) for algo in ALSO.get(name, []))
    assert ("data.revision=COMMIT" in head) == ("tldr" in name)
