"""What strangers may hand over (models, runs, configurations, data, texts), and what must not come of it.

The real thing is planted each time: a pickle that would run a command, a module that would be imported, an
answer that would steer the terminal. None of it happens, and the user is told why in one sentence.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rlhf_cli import config, gallery, printable, secret, trust
from rlhf_cli.engine import checkpoint
from rlhf_cli.errors import UserError
from rlhf_cli.evals import grid
from rlhf_cli.evals.grid import Grid
from rlhf_cli.figures import credit as figure
from rlhf_cli.figures.credit import Answer, Heatmap
from rlhf_cli.figures.write import as_csv
from rlhf_cli.listing import grid_table
from rlhf_cli.stages.progress import Progress
from rlhf_cli.store.files import atomic_write, sha256
from rlhf_cli.store.run import Run
from rlhf_cli.tools import terminal
from rlhf_cli.tools.decode import Response
from rlhf_cli.track import SAMPLE_COLUMNS, Mirror
from tests.conftest import Typed
from tests.test_chain import TINY
from tests.test_chain import rlhf as launched
from tests.test_report import sampled
from tests.test_tools import WORDS, Chain, chain  # noqa: F401 - a fixture

Fault = Callable[..., None]
ROOT = Path(__file__).resolve().parents[1]
SFT, MINE = "5555555555", "aaaaaaaaaa"
"""Keys of the SFT run and of the RL run."""


TRAIN = [
    "train", "model=custom", "data.source=embedded", "stage=sft", "sft.batch=8", "track=off",
    *(word for word in WORDS if word.startswith("data.")),
]  # fmt: skip
"""The SFT of a model that is still to be named, on a few rows."""


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that is there only if what was planted has run."""
    path = tmp_path / "it_ran"
    yield path
    assert not path.exists()


@pytest.fixture
def rlhf(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A command line in an empty folder, from which nothing is imported yet."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv(trust.IMPORTS, "")
    return typed


@pytest.fixture
def runs(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder of runs of one's own to do harm in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chain.runs, "runs")
    return Path("runs")


@pytest.fixture
def evil(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module where the command is typed that leaves the marker when it is imported."""
    path = tmp_path / "evil_module.py"
    path.write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\ndef score(p, r): return p\n")
    yield path
    sys.modules.pop("evil_module", None)


def refused(said: tuple[int, str, str]) -> str:
    """The one sentence of a command that has ended with exit code 2."""
    code, _, err = said
    assert code == 2 and err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def pickled(marker: Path) -> bytes:
    """A pickle that runs a command."""
    return pickle.dumps(Payload(marker))


# --- pickles and programs in our own code


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a file with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def dangers(text: str) -> list[str]:
    """What in a file's code could run the code of others."""
    tree, found = ast.parse(text), []
    for name, call in calls(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
            found.append(name)
        if name in {"torch.load", "load"} and given.get("weights_only", "True") != "True":
            found.append(f"{name} of more than weights")
        if name == "torch.load" and "weights_only" not in given:
            found.append(name)
        if given.get("allow_pickle", "False") != "False":
            found.append("allow_pickle")
        if given.get("shell", "False") != "False":
            found.append("shell")
        if given.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        asks = name.endswith(".from_pretrained") and not name.startswith("type(")
        if asks and given.get("trust_remote_code") != "False":
            found.append(f"{name} asks whether to run code")
        if name in {"yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}:
            found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            words = [node.module] if isinstance(node, ast.ImportFrom) else []
            named = [*words, *(alias.name for alias in node.names)]
            harmless = named == ["pickle", "UnpicklingError"]  # what libraries raise
            if {"pickle", "dill", "joblib", "shelve", "marshal"} & {*named} and not harmless:
                found.append(f"import of {named}")
    return found


@pytest.mark.parametrize("room", ["rlhf_cli", "scripts"])
def test_no_line_of_ours_unpickles_evaluates_or_asks_a_shell(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert {str(file): found for file in files if (found := dangers(file.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_a_planted_line_is_found(line: str) -> None:
    assert dangers(line)


# --- weights, caches and checkpoints


def without_safetensors(folder: Path, weights: bytes) -> None:
    """A model folder as of old, its weights in a pickle."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(weights)


def zipped(marker: Path) -> bytes:
    """What torch.save writes: a zip with a pickle in it, here of a command."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled(marker))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return buffer.getvalue()


@pytest.mark.parametrize("form", [pickled, zipped])
def test_a_pickle_for_weights_is_refused(
    form: Callable[[Path], bytes], runs: Path, marker: Path, rlhf: Typed, fault: Fault
) -> None:
    assert pickle.loads(pickle.dumps(1)) == 1  # a payload would run here
    without_safetensors(runs / "stranger", form(marker))
    said = refused(rlhf(*TRAIN, f"model.name={runs / 'stranger'}"))
    assert said == (
        f"model.name={runs / 'stranger'}: its weights hold more than tensors, which may be code and is"
        " not read; give a folder with model.safetensors."
    )
    if form is zipped:
        fault("a model folder whose pytorch_model.bin runs a command", "refused, nothing was run")


def test_a_pickle_in_place_of_a_runs_weights_is_refused(
    runs: Path, marker: Path, rlhf: Typed, fault: Fault
) -> None:
    run = Run(runs / "sft" / f"tiny-s1-{SFT}")
    without_safetensors(run.final, zipped(marker))
    assert "model.safetensors is missing" in refused(rlhf("sample", SFT, "--prompts", "1"))
    (run.final / "decoy.safetensors").write_bytes(b"")
    run.finish()  # as a stranger would, who knows of the digests
    assert refused(rlhf("sample", SFT, "--prompts", "1")) == (
        f"model.name={run.final}: its weights hold more than tensors, which may be code and is not read;"
        " give a folder with model.safetensors."
    )
    fault("a run whose final weights were replaced by a pickle", "refused, nothing was run")


def test_a_pickle_beside_safetensors_is_not_read(runs: Path, marker: Path, rlhf: Typed) -> None:
    final = runs / "sft" / f"tiny-s1-{SFT}" / "checkpoints" / "final"
    (final / "pytorch_model.bin").write_bytes(zipped(marker))
    assert rlhf("sample", SFT, "--prompts", "1")[0] == 0


def object_array(marker: Path) -> bytes:
    """An array of objects, which numpy keeps in a pickle."""
    buffer = io.BytesIO()
    array = np.empty(1, object)
    array[0] = Payload(marker)
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("form", [pickled, zipped, object_array])
def test_a_planted_cache_of_tokens_is_made_anew(
    form: Callable[[Path], bytes], marker: Path, tmp_path: Path, fault: Fault
) -> None:
    from rlhf_cli.data import tokens
    from rlhf_cli.models.tokenizer import train_tokenizer

    encoder = tokens.Encoder(train_tokenizer(["a b c"], 300, 64), 8, 8, lambda _: None)
    rows = [("a b", " c"), ("b", " a")]
    whole = list(tokens.encoded(encoder, rows, tmp_path, lambda *_: None))
    (folder,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    for name in tokens.FILES:
        (folder / name).write_bytes(form(marker))
    digests = {name: sha256(folder / name) for name in tokens.FILES}
    (folder / tokens.DIGESTS).write_text(json.dumps(digests))
    assert list(tokens.encoded(encoder, rows, tmp_path, lambda *_: None)) == whole
    if form is object_array:
        fault("a cache of tokens that holds a pickle", "encoded anew, nothing was run")


def planted_checkpoint(folder: Path, content: bytes) -> None:
    """A checkpoint whose digests are right."""
    folder.mkdir(parents=True)
    for name in ("learner-00001.safetensors", checkpoint.STATE):
        (folder / name).write_bytes(content)
    files = {file.name: sha256(file) for file in folder.iterdir()}
    place = {"step": 1, "wall": 0.0, "files": files}
    (folder / checkpoint.PLACE).write_text(json.dumps(place))


@pytest.mark.parametrize("form", [pickled, zipped])
def test_a_planted_checkpoint_is_refused(
    form: Callable[[Path], bytes], marker: Path, tmp_path: Path, fault: Fault
) -> None:
    planted_checkpoint(tmp_path / "000001", form(marker))
    learner: Any = SimpleNamespace(engine=None, launch=SimpleNamespace(zero=0))
    with pytest.raises(UserError, match="is no checkpoint of this run") as error:
        checkpoint.resume(tmp_path, learner)
    assert str(error.value).endswith(f"delete {tmp_path / '000001'} to begin the run again.")
    if form is pickled:
        fault(
            "a checkpoint whose files are pickles, with right digests", "refused, nothing was run"
        )


# --- yaml


TAG = "!!python/object/apply:os.system ['touch {}']"


def test_a_tag_in_a_runs_configuration_is_refused(
    runs: Path, marker: Path, rlhf: Typed, fault: Fault
) -> None:
    file = runs / "sft" / f"tiny-s1-{SFT}" / "config.yaml"
    file.write_text(file.read_text() + f"more: {TAG.format(marker)}\n")
    said = refused(rlhf("sample", SFT))
    assert "could not determine a constructor for the tag" in said
    assert said.startswith(f"{file} cannot be read (")
    fault("python code as a yaml tag in a run's config.yaml", "refused, nothing was run")


def test_a_tag_in_a_folder_of_configurations_is_refused(
    tmp_path: Path, marker: Path, rlhf: Typed
) -> None:
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "conf" / "algo" / "mine.yaml").write_text(f"beta: {TAG.format(marker)}\n")
    said = refused(rlhf("plan", "algo=mine", "--config-dir", str(tmp_path / "conf")))
    assert "could not determine a constructor for the tag" in said


def test_a_tag_in_a_figure_is_refused(
    tmp_path: Path, marker: Path, rlhf: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "figure").mkdir()
    (tmp_path / "figure" / "evil.yaml").write_text(f"title: {TAG.format(marker)}\n")
    monkeypatch.setattr(gallery, "conf_dir", lambda: tmp_path)
    assert "could not determine a constructor" in refused(rlhf("figure", "evil"))


def test_a_tag_in_data_is_a_row_that_is_no_json(tmp_path: Path, marker: Path, rlhf: Typed) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{TAG.format(marker)}\n" * 3)
    assert "no usable row" in refused(rlhf("data", "check", "rows.jsonl"))
    (tmp_path / "rows.yaml").write_text(f"{TAG.format(marker)}\n")
    assert "rows.yaml is of no kind that is read" in refused(rlhf("data", "check", "rows.yaml"))


# --- classes and functions that a configuration names


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("algo._target_=os.system", "must name a frozen pydantic dataclass"),
        ("algo._target_=subprocess.Popen", "must name a frozen pydantic dataclass"),
        ("algo._target_=rlhf_cli.data.hh.HH", "lacks update"),
        ("data._target_=rlhf_cli.recipes.Optim", "lacks name"),
    ],
)
def test_only_what_keeps_the_contract_is_built(word: str, says: str, rlhf: Typed) -> None:
    assert says in refused(rlhf("plan", word))


def test_a_class_without_the_contract_is_refused_before_it_is_called(
    tmp_path: Path, marker: Path, rlhf: Typed
) -> None:
    (tmp_path / "half_class.py").write_text(
        "from pydantic.dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Half:\n"
        "    update: dict\n"
        f"    def __post_init__(self): open({str(marker)!r}, 'w')\n"
    )
    words = ["algo=dpo", "algo._target_=half_class.Half"]
    assert "lacks optim" in refused(rlhf("plan", *words))


def edited(run: Path, key: str, value: str) -> None:
    """Changes one value of a run's frozen configuration."""
    from omegaconf import OmegaConf

    node = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(node, key, value, force_add=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(node))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algo._target_", "evil_module.Evil"),
        ("data._target_", "evil_module.Evil"),
        ("reward.source.call", "evil_module.score"),
        ("algo._target_", "os.system"),
        ("algo._target_", "rlhf_cli.__main__.main"),
        ("reward.source.call", "os.system"),
        ("reward.source.call", "rlhf_cli.store.files.atomic_write"),
    ],
)
def test_a_strangers_run_imports_nothing(
    key: str, value: str, runs: Path, evil: Path, rlhf: Typed, fault: Fault
) -> None:
    run = runs / "rl" / f"mine-s1-{MINE}"
    edited(run, key, value)
    for words in (["sample", MINE], ["eval", MINE], ["credit", MINE, "--text", "TL;DR: no"]):
        assert refused(rlhf(*words)) == (
            f"{run / 'config.yaml'} has {key}={value}, which would be imported and is no part of"
            f" rlhf-cli; if you trust that code, say so with {trust.IMPORTS}={value.rpartition('.')[0]} in"
            " the environment."
        )
    if value == "evil_module.Evil" and key == "algo._target_":
        fault(
            "a stranger's run whose config.yaml names a module to import", "refused, not imported"
        )


def test_a_module_that_the_user_vouches_for_is_imported(
    runs: Path, evil: Path, marker: Path, rlhf: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(runs / "rl" / f"mine-s1-{MINE}", "algo._target_", "evil_module.Evil")
    monkeypatch.setenv(trust.IMPORTS, "other, evil_module")
    assert "must name a frozen pydantic dataclass" in refused(rlhf("sample", MINE))
    assert marker.exists()
    marker.unlink()


def test_what_the_users_own_command_named_may_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = config.compose(["reward=function", "reward.source.call=mine.part.score"])
    file = tmp_path / "config.yaml"
    monkeypatch.setenv(trust.IMPORTS, "")
    file.write_text(config.freeze(node))
    assert config.read(file) == node  # as the worker does, in this process or with its environment
    monkeypatch.setenv(trust.IMPORTS, "mine")
    assert config.read(file) == node
    for others in ("", "min", "mine.part.score"):
        monkeypatch.setenv(trust.IMPORTS, others)
        with pytest.raises(UserError, match=r"RLHF_IMPORTS=mine\.part"):
            config.read(file)


# --- references and bombs


@pytest.mark.parametrize("reference", ["${oc.env:HF_TOKEN}", "${paths.cache}", "a${seed}"])
def test_a_runs_configuration_holds_values_only(reference: str, runs: Path, rlhf: Typed) -> None:
    run = runs / "sft" / f"tiny-s1-{SFT}"
    edited(run, "track.group", reference)
    assert refused(rlhf("sample", SFT)) == (
        f"{run / 'config.yaml'} has track.group={reference}, but a run's configuration holds values"
        " only; delete the run's folder and run again."
    )


def test_a_file_of_aliases_is_not_unfolded(runs: Path, rlhf: Typed, fault: Fault) -> None:
    file = runs / "sft" / f"tiny-s1-{SFT}" / "config.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 64))]
    file.write_text("\n".join(lines) + "\n")
    assert "repeats a part of itself by an alias" in refused(rlhf("sample", SFT))
    fault("a config.yaml of 64 lines that unfolds into 2^64 values", "refused at once")


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 100_000, "- a", "a: b: c", "x: 1\n" * 300_000, "\0"]
)
def test_yaml_that_is_none_of_ours_is_refused(text: str, runs: Path, rlhf: Typed) -> None:
    file = runs / "sft" / f"tiny-s1-{SFT}" / "config.yaml"
    file.write_text(text)
    assert refused(rlhf("sample", SFT)).startswith(str(file))


def bomb(form: str, length: int = 40) -> str:
    """Yaml of which each line stands twice for the next."""
    lines = [f"  k{i}: {form.format(f'k{i + 1}')}" for i in range(length)]
    return "\n".join([*lines, f"  k{length}: x"])


FORMS = {
    "texts": '"${{.{0}}}${{.{0}}}"',
    "groups": "{{a: '${{algo.bomb.{0}}}', b: '${{algo.bomb.{0}}}'}}",
    "lists": "['${{algo.bomb.{0}}}', '${{algo.bomb.{0}}}']",
    "arguments": '"${{rlhf.pick:x,{{x: ${{.{0}}}, y: ${{.{0}}}}}}}"',
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_references_that_double_are_refused(
    form: str, tmp_path: Path, rlhf: Typed, fault: Fault
) -> None:
    folder = tmp_path / "conf" / "algo"
    folder.mkdir(parents=True)
    text = f"defaults: [dpo, _self_]\nbomb:\n{bomb(form)}\n"
    (folder / "mine.yaml").write_text(text)
    said = refused(rlhf("plan", "algo=mine", "--config-dir", str(tmp_path / "conf")))
    assert re.fullmatch(
        r"algo\.bomb\.k\d+(\.[ab])? stands for more than 10000 references, each of which stands for"
        r" others; write the value out\.",
        said,
    )
    if form is FORMS["texts"]:
        fault("40 lines of yaml that each refer twice to the next", "refused at once")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["track.group=${track.project}", "track.project=${track.group}"], "refers to itself"),
        (["track.group=${track}"], "refers to itself"),
        (["track.group='${a.${seed}}'"], "may hold no other"),
        (["track.group=${oc.select:seed}"], "is none of hydra, oc.env"),
        (["name=${track.group}${track.group}", "track.group=${name}"], "refers to itself"),
    ],
)
def test_references_that_nobody_can_follow_are_refused(
    words: list[str], says: str, rlhf: Typed
) -> None:
    assert says in refused(rlhf("plan", *words))


def test_a_reference_counts_once_for_each_time_it_is_followed() -> None:
    values = {"a": "${b}${b}", "b": "${c.d}x", "c": {"d": 1, "e": "${.d}"}, "f": ["${c}"]}
    counter = trust._References(values, {})
    # b: 1; a: 2 of its own and b twice; c: its e; f: itself and c's e.
    assert [counter.under((key,)) for key in "bacf"] == [1, 4, 1, 2]


# --- secrets


SECRET = "s3cr3t-Value-0123456789"


@pytest.mark.parametrize(
    "word",
    [
        "track.group=${oc.env:OPENAI_API_KEY}",
        "track.group=${oc.env:HOME}",
        "paths.runs=${oc.env:OPENAI_API_KEY}",
        "paths.cache=${oc.env:HF_TOKEN}",
        "data.path=${oc.env:HF_TOKEN}",
    ],
)
def test_nothing_but_folders_comes_out_of_the_environment(
    word: str, rlhf: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    key, variable = re.fullmatch(r"(.*)=\$\{oc.env:(.*)\}", word).groups()  # type: ignore[union-attr]
    said = refused(rlhf("plan", word))
    assert SECRET not in said
    assert said == (
        f"{key} may not come out of the environment ({variable}), only paths.runs, paths.cache,"
        " data.path, judge.cache may; write the value out."
    )


def test_a_folder_may_come_out_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert config.compose(["paths.runs=${oc.env:SCRATCH}/runs"]).paths.runs == "/scratch/me/runs"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["reward.source.url=http://me:pw@host/score"], "reward.source.url"),
        (["reward.source.url=http://token@host/score"], "reward.source.url"),
        (["reward.source.url='http://host/score?api_key=pw'"], "reward.source.url"),
    ],
)
def test_an_address_with_a_key_in_it_is_refused(words: list[str], key: str, rlhf: Typed) -> None:
    said = refused(rlhf("plan", "reward=http", *words))
    assert said == (
        f"{key} holds a password or a key, which every run would write down; take it out of the address,"
        " and name the variable of the environment that holds it with key_env."
    )


def test_a_key_that_the_shell_has_filled_in_is_refused(
    rlhf: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYSTERY", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET[::-1])
    word = f"track.group=of-{SECRET[::-1]}"
    assert refused(rlhf("plan", word)).startswith("track.group holds what WANDB_API_KEY is in")
    named = ["reward=http", "reward.source.url=http://host", "reward.source.key_env=MYSTERY"]
    said = refused(rlhf("plan", *named, f"track.group={SECRET}"))
    assert said.startswith("track.group holds what MYSTERY is in the environment")


def test_no_complaint_repeats_a_secret(rlhf: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for word in (f"nope={SECRET}", f"seed={SECRET}", f"a b={SECRET}", "nope.url=http://me:pass1@h"):
        said = refused(rlhf("plan", word))
        assert SECRET not in said and "pass1" not in said


def test_secrets_are_masked_and_other_words_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("DEPLOY_KEY", "short")
    assert secret.masked(f"a {SECRET} b") == "a *** b"
    assert (
        secret.masked("http://me:pw@host/a?b=1&api_key=2#c")
        == "http://***@host/a?b=1&api_key=***#c"
    )
    kept = "falsehood short me@host http://host/a@b?page=2"
    assert secret.masked(kept) == kept


def test_a_run_that_fails_over_a_secret_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    from rlhf_cli import worker

    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = Run(tmp_path / "runs" / "rl" / "a-0000000000")
    run.begin("a: 1\n", {"stage": "rl"})
    run.fail(f"401 for {SECRET}")
    assert run.manifest()["reason"] == "401 for ***"
    root = logging.getLogger()
    before = root.handlers
    try:
        worker._log_to(run.log / "rank_0.txt")
        try:
            raise ValueError(f"401 for {SECRET}")
        except ValueError:
            logging.getLogger("a").exception("failed with %s", SECRET)
    finally:
        root.handlers = before
    said = (run.log / "rank_0.txt").read_text()
    assert "failed with ***" in said and "ValueError: 401 for ***" in said and SECRET not in said


@pytest.mark.faults
def test_no_file_of_a_run_and_nothing_it_says_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """A whole chain, its figures and its page; and a chain that fails over a server that wants a key."""
    for name in ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "REWARD_KEY"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    words = ["train", "algo=rloo", "algo.responses=2", *TINY, "algo.update.episodes=32"]
    words += ["eval.points=1", "sft.epochs=1", "reward.epochs=1", "track.mode=offline"]
    done = [launched(tmp_path, *line) for line in (words, ["frontier"], ["report"])]
    assert [each.returncode for each in done] == [0, 0, 0], done
    server = ["reward=http", "reward.source.url=http://127.0.0.1:9/score"]
    server += ["reward.source.key_env=REWARD_KEY", "reward.source.retries=0"]
    done.append(launched(tmp_path, *words, *server))
    assert done[-1].returncode == 2
    said = [text for each in done for text in (each.stdout, each.stderr)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {".wandb", ".yaml", ".json", ".jsonl", ".txt", ".html", ".md", ".csv", ".png"}
    assert kinds <= {path.suffix for path in files}
    telling = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
    assert telling == [] and SECRET not in "".join(said)
    fault(
        "four keys in the environment of a run, one of them used", "no file and no line holds one"
    )


# --- names


@pytest.mark.parametrize("word", ["../../x", "a/b", ".hidden", "-x", "a b", "x\x1b[2J", ""])
@pytest.mark.parametrize("key", ["model.label", "name", "data.name"])
def test_a_run_is_called_by_words_alone(key: str, word: str, rlhf: Typed, tmp_path: Path) -> None:
    said = refused(rlhf("plan", f"{key}='{word}'"))
    shown = printable.visible(word)
    assert said == (
        f"{key}={shown} is not allowed: runs are called by it, so it must be of letters, digits and ._+-"
        f" alone and begin with a letter or digit; set {key}=WORD."
    )
    assert [path for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "at", ["../../../etc", "/etc", "sft/..", "sft/../../x", "sft", "sft/a/b", 7]
)
def test_a_manifest_names_no_parent_elsewhere(
    at: object, runs: Path, rlhf: Typed, fault: Fault
) -> None:
    run = Run(runs / "rl" / f"mine-s1-{MINE}")
    manifest = {**run.manifest(), "parent_runs": {"sft": at}}
    run.manifest_path.write_text(json.dumps(manifest))
    for words in (["sample", MINE], ["show", MINE], ["runs"]):
        assert refused(rlhf(*words)) == (
            f"{run.manifest_path} names {at} as a run that it started from, which must be STAGE/NAME in"
            f" the same folder of runs; restore the file, or delete {run.path}."
        )
    if at == "../../../etc":
        fault("a manifest whose parent lies outside the folder of runs", "refused")


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "../../etc"],
        ["sample", "../../../etc/passwd"],
        ["show", "/etc"],
        ["figure", "../x"],
        ["figure", "/etc/passwd"],
        ["plan", "algo=../../../etc/passwd"],
        ["plan", "model=custom", "model.name=../../etc/x"],
        ["plan", "model=custom", "model.name=a/../b", "model.revision=main"],
    ],
)
def test_a_name_leads_nowhere_else(words: list[str], rlhf: Typed, tmp_path: Path) -> None:
    refused(rlhf(*words))
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_a_file_names_writes_no_figure_elsewhere(tmp_path: Path, rlhf: Typed) -> None:
    sampled(tmp_path / "runs", "ppo", 1, group="../../up")
    assert rlhf("frontier")[0] == 0
    written = {path.parent.name for path in tmp_path.rglob("*.png")}
    assert written == {"figures"} and not list(tmp_path.parent.glob("up*"))


# --- links


def test_a_checkpoint_that_is_a_link_is_unlinked_and_what_it_leads_to_stays(
    tmp_path: Path, fault: Fault
) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "checkpoints"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("years of work")
    folder.mkdir()
    (folder / "000001").symlink_to(elsewhere)
    (folder / "000002").mkdir()
    (folder / "000002" / "into").symlink_to(elsewhere)
    checkpoint.drop_resume_points(folder)
    assert list(folder.iterdir()) == []
    assert (elsewhere / "thesis.txt").read_text() == "years of work"
    fault("a checkpoint that is a link to another folder", "the link goes, the folder stays")


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    target, file = tmp_path / "target", tmp_path / "file"
    target.write_text("as it was")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(target)
    file.symlink_to(target)
    atomic_write(file, "new")
    assert (target.read_text(), file.read_text()) == ("as it was", "new")
    assert not file.is_symlink() and len(list(tmp_path.iterdir())) == 2


# --- models with code of their own


def with_code(folder: Path, marker: Path, file: str, classes: dict[str, str]) -> None:
    """A model folder that asks for a module of its own to be run."""
    named = json.loads((folder / file).read_text())
    named |= {"auto_map": classes, "model_type": "unheard_of", "tokenizer_class": "Theirs"}
    (folder / file).write_text(json.dumps(named))
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w')\nclass Theirs: pass\n")


def test_the_code_of_a_model_is_never_run(
    runs: Path, marker: Path, rlhf: Typed, fault: Fault
) -> None:
    folder = runs / "stranger"
    classes = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}
    with_code(folder, marker, "config.json", classes)
    assert refused(rlhf(*TRAIN, f"model.name={folder}")) == (
        f"model.name={folder} needs code of its own (auto_map in its json files), which rlhf-cli never"
        " runs; choose a model that transformers knows by itself."
    )
    fault("a model folder with Python code of its own", "refused, not imported")


def test_the_code_of_a_tokenizer_is_never_run(
    runs: Path, marker: Path, rlhf: Typed, tmp_path: Path
) -> None:
    """Where its files alone make a tokenizer, that one is taken."""
    folder = runs / "stranger"
    with_code(folder, marker, "tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", None]})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    said = refused(rlhf("data", "check", "chat.jsonl", f"data.tokenizer={folder}"))
    assert "has no chat template" in said
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    assert "model.name=runs/stranger" in refused(rlhf(*TRAIN, f"model.name={folder}"))


# --- texts


ANSI = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b1A\r\x08"
HOSTILE = (
    f"<script>alert(1)</script> &amp; [red]{ANSI}[/red] \u202egnp.exe\u2069 |a|b| `x`"
    " =cmd|' /C calc'!A0 \\input{/etc/passwd} $\\frac{$ \ud800"
)
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def drawn(part: object, colour: bool = False) -> str:
    """What a terminal is sent, less the colours of our own."""
    out = io.StringIO()
    kind = "truecolor" if colour else None
    Console(file=out, width=400, highlight=False, color_system=kind, force_terminal=colour).print(
        part
    )  # type: ignore[arg-type]
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()) if colour else out.getvalue()


def clean(text: str) -> bool:
    """Whether a terminal takes nothing in it for a command, and all of the markup is still there."""
    text.encode()
    return not STEERING.search(text) and "[red]" in text and "␛]0;owned" in text


def test_every_character_that_steers_is_shown_as_a_picture() -> None:
    assert printable.visible("a\tb\x1b\x7f\x9b\u202e\ud800\n") == "a␉b␛␡␡⟨U+202E⟩\ufffd\n"
    assert printable.on_one_line("a\nb") == "a⏎b"
    for code in range(0x11000):
        shown = printable.visible(chr(code))
        assert not STEERING.search(shown)
        shown.encode()
    kept = "naïve 日本 \U0001f468\u200d\U0001f469 שלום"
    assert printable.visible(kept) == kept


def test_json_says_the_same_and_steers_nothing() -> None:
    text = printable.as_json({HOSTILE: [HOSTILE]})
    assert json.loads(text) == {HOSTILE: [HOSTILE]}
    text.encode()
    assert not STEERING.search(text)


@pytest.mark.parametrize("colour", [False, True])
def test_responses_and_credit_are_clean_on_a_terminal(colour: bool) -> None:
    row = Response(HOSTILE, HOSTILE, 1, True, -1.0, 0.0, None, None)
    assert clean(drawn(terminal.responses([row, row]), colour))
    heat = Heatmap({"pi": HOSTILE}, HOSTILE, 1.0, (Answer("text", (HOSTILE, "b"), (1.0, -1.0)),))
    assert clean(drawn(terminal.heatmap(heat, 400, colour), colour))


def test_the_page_of_credit_is_clean() -> None:
    heat = Heatmap({"pi": HOSTILE}, HOSTILE, 1.0, (Answer("text", (HOSTILE,), (1.0,)),))
    page = figure.page(heat)
    assert "<script" not in page and not STEERING.search(page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp;") == 4


def hostile_run(folder: Path) -> Run:
    """A run of a stranger: whatever a manifest, a sample or a directory may say."""
    text = HOSTILE.replace("\ud800", "")
    run = sampled(folder, "ppo", 1, response=text, title=text, group=text)
    run.update(algo=text, reason=text, command=text)
    renamed = run.path.with_name(f"[red]{ANSI.replace('/', '')}-{run.key}")
    run.path.rename(renamed)
    return Run(renamed)


@pytest.mark.parametrize(
    "words",
    [["runs"], ["show", "{key}"], ["compare"], ["runs", "--json"], ["show", "{key}", "--json"],
     ["frontier"], ["winrate", "{key}", "{other}"], ["compare", "--json"]],
    ids=" ".join,
)  # fmt: skip
def test_no_verb_lets_a_run_steer_the_terminal(
    words: list[str], tmp_path: Path, rlhf: Typed, fault: Fault
) -> None:
    run = hostile_run(tmp_path / "runs")
    same = {word: run.manifest()[word] for word in ("group", "title")}
    other = sampled(tmp_path / "runs", "p3o_v2", 2, **same)
    named = [word.format(key=run.key, other=other.key) for word in words]
    code, out, err = rlhf(*named)
    assert code == 0, err
    assert not STEERING.search(out + err)
    assert "[red]" in out
    if words == ["runs"]:
        fault("answers and names with terminal commands in them", "shown, not obeyed")


def test_a_report_is_clean_whatever_a_run_says(tmp_path: Path, rlhf: Typed) -> None:
    hostile_run(tmp_path / "runs")
    code, _, err = rlhf("report")
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and not STEERING.search(page)


def test_complaints_are_clean(rlhf: Typed, tmp_path: Path) -> None:
    said = refused(rlhf("plan", f"track.mode='{ANSI}'"))
    assert "␛]0;owned" in said and not STEERING.search(said)


def test_data_are_clean_on_a_terminal(rlhf: Typed, tmp_path: Path) -> None:
    text = HOSTILE.replace("\ud800", "")
    rows = [
        {"prompt": f"{text} {i}", "chosen": text, "rejected": f"{text}!", f"[red]{ANSI}": 1}
        for i in range(8)
    ]
    rows.append({"prompt": 1})  # type: ignore[dict-item]
    name = f"[red]{ANSI}.jsonl"
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    words = [name, "data.template=transcript", "data.on_bad_row=drop"]
    for verb in ("check", "inspect"):
        code, out, err = rlhf("data", verb, *words)
        assert code == 0, err
        assert not STEERING.search(out.replace("\n", "")) and "[red]" in out


def test_a_warning_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("rl", True) as progress:
        progress.warn(HOSTILE)
    assert clean(capsys.readouterr().out)


TABLE = Grid(
    HOSTILE, (HOSTILE, "n"), (("=cmd|' /C calc'!A0", 1), ("@x", 2), (HOSTILE, 3)), (HOSTILE,)
)


def test_a_table_is_clean_in_every_format() -> None:
    assert clean(drawn(grid_table(TABLE)))
    cells = list(csv.reader(io.StringIO(grid.text(TABLE, "csv"))))
    assert [row[0][:2] for row in cells[1:3]] == ["'=", "'@"]
    latex = grid.text(TABLE, "tex")
    assert r"\input" not in latex and r"\textbackslash{}input\{/etc/passwd\}" in latex
    markdown = grid.text(TABLE, "md")
    assert "<script" not in markdown and not STEERING.search(markdown)
    line = next(each for each in markdown.splitlines() if each.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_a_spreadsheet_is_given_no_formula_and_numbers_stay_numbers() -> None:
    rows = [{"algo": "=1+1", "x": -1.5}, {"algo": "+a", "x": 2}, {"algo": "ppo", "x": None}]
    assert as_csv(rows) == "algo,x\n'=1+1,-1.5\n'+a,2\nppo,\n"


def test_a_model_card_closes_what_it_opens() -> None:
    assert printable.as_code("rlhf train") == "`rlhf train`"
    assert printable.as_code("a `<b>`` c\nd") == "``` a `<b>`` c d ```"


def test_the_mirror_is_given_texts_and_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_cli import track

    given: list[Any] = []
    monkeypatch.setattr(track, "_table", lambda columns, data: given.extend(data))
    run = SimpleNamespace(log=lambda row: None, finish=lambda exit_code: None)
    mirror = Mirror(lambda: run)
    mirror.samples(1, [{"prompt": HOSTILE, "response": HOSTILE}])
    mirror.finish(0)
    assert given == [[HOSTILE, HOSTILE, None, None, None]] and len(SAMPLE_COLUMNS) == 5
