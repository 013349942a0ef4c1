"""The documents are true: commands are understood, files exist, and the worked example works."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from rlhf_cli import cli
from rlhf_cli.config import compose, recipe
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import Forward
from rlhf_cli.store.metrics import VOCABULARY
from tests.algos import test_learning, test_properties
from tests.algos.cases import judge
from tests.algos.test_oracles import CASES, built, near, numbers
from tests.algos.toys import ARMS, BANDIT, THETA, TREE, World, ascent, close, leaf
from tests.conftest import ROOT
from tests.data_samples import COMMIT, write_rows

PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("adding", "comparing", "data", "samplers", "scale", "stopping", "sweeps")
    ),
]
REAL = {"hh-rlhf": "hh-rlhf", "my-model": "models/stories260K-hf"}
"""What the pages call their reader's own files, and the real ones that stand in for them."""
ANSWERS = {"chosen": " yes", "rejected": " no"}
MADE: dict[str, list[dict[str, object]]] = {
    "prefs.jsonl": [{"prompt": f"q{n}?", **ANSWERS} for n in range(20)],
    "faq.csv": [{"question": f"q{n}?", "answer": " yes"} for n in range(20)],
    "chat.parquet": [
        {
            "messages": [
                {"role": "user", "content": f"q{n}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(20)
    ],
}
"""And those that are made up."""
FEW = [f"data.embedded.{kind}=40" for kind in ("prompts", "demos", "pairs", "heldout")]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str, program: str) -> list[str]:
    """What the page's shell blocks call of a program: one line each, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    calls = (shlex.split(line, comments=True) for line in lines)
    return [shlex.join(words) for words in calls if words[:1] == [program]]


RLHF = list(dict.fromkeys(line for page in PAGES for line in commands(page, "rlhf")))
PLANNED = [line for line in RLHF if shlex.split(line)[1] in {"train", "plan"}]
LOOKING = [line for line in RLHF if shlex.split(line)[1] == "data"]


# --- the worked example


def written(folder: Path) -> list[str]:
    """Write the files of docs/adding.md into a folder; their names."""
    page = text("docs/adding.md")
    files = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, content in files:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return [name for name, _ in files]


@pytest.fixture(scope="module")
def mylab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of docs/adding.md, from which modules can be imported."""
    folder = tmp_path_factory.mktemp("mylab")
    written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "batch_mean", raising=False)
        yield folder


@pytest.fixture(scope="module")
def batch_mean(mylab: Path) -> Any:
    """The algorithm of docs/adding.md with the hyperparameters of its yaml."""
    return recipe(compose(["algo=batch_mean"], mylab / "conf")).algo


def test_the_example_consists_of_a_module_a_yaml_and_an_oracle(tmp_path: Path) -> None:
    assert written(tmp_path) == [
        "batch_mean.py",
        "conf/algo/batch_mean.yaml",
        "tests/algos/oracles/batch_mean.py",
    ]


def test_the_example_composes_with_its_own_values_and_the_shipped_budget(batch_mean: Any) -> None:
    shipped = recipe(compose(["algo=ppg"])).algo  # nothing there is its own
    assert (batch_mean.beta, batch_mean.responses, batch_mean.update.minibatches) == (0.1, 1, 1)
    assert batch_mean.update.episodes == shipped.update.episodes
    assert batch_mean.optim == shipped.optim


def test_the_example_climbs_the_exact_gradient_from_its_own_samples(batch_mean: Any) -> None:
    assert BANDIT.beta == batch_mean.beta == 0.1
    direction = ascent(batch_mean, BANDIT, THETA, THETA)
    close(direction, [[0.293470, -0.025178, -0.268292]])
    close(direction, BANDIT.gradient(THETA), 1e-12)  # float64, three terms


def test_the_example_pulls_scores_2_5_and_1_apart_by_their_distance_to_the_mean(
    batch_mean: Any,
) -> None:
    rollout = ARMS.rollout(ARMS.ref, torch.tensor([[0], [2]]))
    logp = leaf(rollout.logp_old)
    targets, _ = batch_mean.prepare(rollout, {})
    terms = batch_mean.loss(Forward(logp, None), rollout, targets)
    loss = averages(terms, rollout.mask, denominators(rollout.mask))["policy"]
    # Advantages 2.5 - 1.75 and 1 - 1.75, each shared by two responses.
    close(torch.autograd.grad(loss, logp)[0], [[[-0.375]], [[0.375]]])


@pytest.mark.parametrize("kind", CASES)
def test_the_example_agrees_with_its_oracle(
    kind: str, batch_mean: Any, mylab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The oracle is written for the place the module has inside the repository.
    monkeypatch.setitem(sys.modules, "rlhf_cli.algos.batch_mean", sys.modules["batch_mean"])
    file = mylab / "tests" / "algos" / "oracles" / "batch_mean.py"
    spec = importlib.util.spec_from_file_location("oracle_of_the_example", file)
    assert spec is not None and spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)

    one = built(kind, 1, batch_mean.sampling())
    got, expected = judge(batch_mean, one), oracle.judge(batch_mean, numbers(one))
    near(got.loss, expected.loss)
    near(got.d_logp, expected.d_logp)
    near(got.d_value, expected.d_value)
    mask = one.rollout.mask
    watched = averages(got.watch, mask, denominators(mask))
    assert watched.keys() == expected.watch.keys() == {"surprisal"}
    near(watched["surprisal"], expected.watch["surprisal"])


PROPERTIES = [
    word
    for word, test in vars(test_properties).items()
    if word.startswith("test_") and [*inspect.signature(test).parameters] == ["name"]
]


def test_every_property_that_is_asked_of_a_single_algorithm_is_asked_of_the_example() -> None:
    assert len(PROPERTIES) >= 8
    assert "test_no_hyperparameter_is_dead" in PROPERTIES


@pytest.mark.parametrize("word", PROPERTIES)
def test_the_example_has_the_properties_of_a_shipped_algorithm(
    word: str, batch_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_properties, "shipped", lambda name: batch_mean)
    monkeypatch.setattr(test_properties, "oracle", lambda name: SimpleNamespace())
    getattr(test_properties, word)("batch_mean")


@pytest.mark.parametrize("world", [ARMS, TREE], ids=["arms", "tree"])
def test_the_example_learns_the_closed_form_optimum(
    world: World, batch_mean: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        test_learning, "tuned", lambda name, **changes: replace(batch_mean, **changes)
    )
    monkeypatch.setattr(test_learning, "oracle", lambda name: SimpleNamespace())
    test_learning.test_learns_pi_ref_exp_r_over_beta("batch_mean", world)


# --- commands


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which someone follows the pages, on a machine of any number of GPUs."""
    written(tmp_path)
    for name, rows in MADE.items():
        write_rows(tmp_path / name, rows)
    (tmp_path / "hosts").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_RUNS", str(tmp_path / "runs"))
    # The working directory alone must be enough to find the module.
    elsewhere = [place for place in sys.path if not (Path(place) / "batch_mean.py").exists()]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.delitem(sys.modules, "batch_mean", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path


def test_the_pages_show_every_verb() -> None:
    shown = {shlex.split(line)[1] for line in RLHF}
    assert shown == set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def put_real_files(line: str, reader: Path, request: pytest.FixtureRequest) -> None:
    for word, place in REAL.items():
        if f"={word}" in line:
            (reader / word).symlink_to(request.getfixturevalue("shared_data") / place)


@pytest.mark.parametrize("line", PLANNED)
def test_a_command_that_trains_can_be_planned(
    line: str,
    reader: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = shlex.split(line.replace("=COMMIT", f"={COMMIT}"))[2:]
    put_real_files(line, reader, request)
    with pytest.raises(SystemExit) as exit:
        cli.main(["plan", *words])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    assert "model:" in out if "--cfg" in words else "build" in out
    assert not (reader / "runs").exists()


@pytest.mark.parametrize("line", LOOKING)
def test_a_command_that_looks_at_data_says_what_to_run_next(
    line: str,
    reader: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_real_files(line, reader, request)
    generated = "data=hh" in line and "data.source" not in line
    with pytest.raises(SystemExit) as exit:
        cli.main([*shlex.split(line)[1:], *(FEW if generated else [])])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    assert out.splitlines()[-1].startswith("next: rlhf train ")
    assert ("figure: figures/" in out) == ("--png" in line)


@pytest.mark.parametrize("line", [line for line in RLHF if line not in PLANNED + LOOKING])
def test_a_command_that_reads_runs_is_understood(line: str) -> None:
    _, verb, *words = shlex.split(line)
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    command.make_context(verb, words)


def test_every_make_target_shown_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {line.split()[1] for page in PAGES for line in commands(page, "make")}
    named = {word for page in PAGES for word in re.findall(r"`make ([a-z]+)`", text(page))}
    assert {"demo", "test"} <= shown <= targets
    assert {"install", "mutants"} <= named <= targets


# --- names

CREATED = {
    f"{folder}/batch_mean.{kind}"
    for folder, kind in (
        ("rlhf_cli/algos", "py"),
        ("conf/algo", "yaml"),
        ("tests/algos/oracles", "py"),
    )
}
"""Files that a reader of docs/adding.md makes."""


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_is_named_exists(page: str) -> None:
    roots = r"(?:conf|docs|rlhf_cli|scripts|tests)/"
    named = set(re.findall(rf"`({roots}[\w./-]*)`", text(page))) - CREATED
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text(page))
    local = [link for link in links if not link.startswith("https://")]
    assert local
    assert [link for link in local if not ((ROOT / page).parent / link).exists()] == []


OURS = ["README.md", "docs/comparing.md"]
"""Pages that name no metric of their reader's own."""


def test_every_metric_that_is_named_is_in_the_vocabulary() -> None:
    names = (re.findall(r"`((?:eval|train|perf|budget)/\w+)`", text(page)) for page in OURS)
    named = {name for found in names for name in found}
    assert len(named) >= 15
    assert named <= set(VOCABULARY)
