"""The door: every shipped yaml passes it, every fault is one sentence."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from omegaconf import base

from rlhf_cli.config import compose, conf_dir, freeze, read, recipe
from rlhf_cli.errors import UserError

NEEDED = {
    "model/custom": ["model.name=somewhere", "model.revision=abc"],
    "reward/function": ["reward.source.call=mine.score"],
    "reward/hf": ["reward.source.name=somewhere", "reward.source.revision=abc"],
    "reward/http": ["reward.source.url=http://localhost"],
    "reward/mix": ["reward.source.parts=[{weight: 1.0, source: {kind: learned}}]"],
}
"""What a choice leaves to the user."""


def yaml_files() -> list[Path]:
    walked = (Path(folder) / name for folder, _, names in os.walk(conf_dir()) for name in names)
    return sorted(path.relative_to(conf_dir()) for path in walked)


def choices() -> list[str]:
    """group/choice of everything that can stand in the defaults list of train.yaml."""
    names = (path.with_suffix("").as_posix() for path in yaml_files())
    return [name for name in names if "/" in name and not re.search("/_|^judge/|^figure/", name)]


def judges() -> list[str]:
    """Choices of the one group of winrate.yaml; tests/test_judges.py is about them."""
    return [path.stem for path in yaml_files() if path.parent.name == "judge"]


def figures() -> list[str]:
    """Files that are no part of a configuration; tests/test_figures.py is about them."""
    return [path.stem for path in yaml_files() if path.parent.name == "figure"]


@cache
def composed(choice: str) -> Any:
    group, _, name = choice.rpartition("/")
    return compose([f"{group}={name}", *NEEDED.get(choice, [])])


def nested(value: Any) -> Any:
    """The keys of a mapping or dataclass, all the way down."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "items"):
        return {key: nested(part) for key, part in value.items() if key != "_target_"}
    return None


def test_every_file_in_conf_is_a_choice_a_base_or_the_list_of_defaults() -> None:
    bases = [path for path in yaml_files() if path.name.startswith("_")]
    assert all(path.suffix == ".yaml" for path in yaml_files())
    roots = ["train.yaml", "winrate.yaml"]
    assert len(choices()) + len(judges()) + len(figures()) + len(bases) + len(roots) == len(
        yaml_files()
    )
    assert len(choices()) >= 25


@pytest.mark.parametrize("choice", choices())
def test_every_choice_composes_types_and_has_the_keys_of_its_dataclasses(choice: str) -> None:
    node = composed(choice)
    made = recipe(node)
    for group, values in node.items():
        assert nested(values) == nested(getattr(made, str(group))), group


@pytest.mark.parametrize("choice", choices())
def test_no_field_has_a_default_beside_its_value_in_yaml(choice: str) -> None:
    pending: list[Any] = [recipe(composed(choice))]
    while pending:
        value = pending.pop()
        for field in dataclasses.fields(value):
            assert field.default is dataclasses.MISSING, (type(value), field.name)
            assert field.default_factory is dataclasses.MISSING, (type(value), field.name)
            part = getattr(value, field.name)
            pending += [part] if dataclasses.is_dataclass(part) else []


def test_a_frozen_configuration_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    node = compose(["model=pythia_70m", "algo=ppo", "algo.optim.lr=1e-7", "track=off"])
    (tmp_path / "config.yaml").write_text(freeze(node))
    again = read(tmp_path / "config.yaml")
    assert recipe(again) == recipe(node)
    assert again.algo.optim.lr == 1e-7
    assert again.track.kind == "off"


def test_a_damaged_frozen_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("a: [1", "- a list", "a: b: c"):
        path.write_text(text)
        with pytest.raises(UserError, match="delete the run's folder"):
            read(path)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "missing.yaml")


def test_the_algorithm_chosen_names_the_run_and_can_be_renamed() -> None:
    assert recipe(compose(["algo=ppo"])).name == "ppo"
    assert recipe(compose(["algo=ppo", "name=mine"])).name == "mine"


def test_values_follow_the_regime_of_the_model() -> None:
    nano, paper = recipe(compose([])), recipe(compose(["model=pythia_1b"]))
    assert (nano.data.source, paper.data.source) == ("embedded", "hub")  # type: ignore[attr-defined]
    assert paper.algo.optim.lr == 1e-6 < nano.algo.optim.lr
    assert recipe(compose(["data=tldr"])).eval.prompts == 200
    assert nano.eval.prompts == 280
    assert recipe(compose(["data.name=other"])).eval.prompts == 200


def test_the_reward_model_follows_the_policy_unless_it_is_given_its_own() -> None:
    words = ["model=custom", "model.name=here", "model.revision=abc"]
    assert recipe(compose(words)).reward.model.name == "here"
    both = recipe(compose(["reward.model.precision=bf16"]))
    assert (both.model.precision, both.reward.model.precision) == ("fp32", "bf16")
    own = ["model=pythia_1b", "model@reward.model=nano", "reward.model.scratch.layers=2"]
    made = recipe(compose(own))
    assert (made.model.label, made.reward.model.label) == ("pythia_1b", "nano")
    assert made.reward.model.scratch is not None and made.reward.model.scratch.layers == 2
    assert made.reward.optim.lr > made.sft.optim.lr  # of the reward model's own regime


def test_the_group_is_the_data_and_the_model_unless_named() -> None:
    assert recipe(compose([])).group == "hh-embedded-nano"
    assert recipe(compose(["track.group=mine"])).group == "mine"


FAULTS = [
    (["algo=nope"], ["algo=nope", "dpo_online, "]),
    (["model@reward.model=nope"], ["model=nope", "pythia_1b"]),
    (["algo.clp=1"], ["algo.clp is not a key", "--cfg job"]),
    (["++algo.clp=1"], ["algo.clp=1 is not a key", "--cfg job"]),
    (["+nonsense=1"], ["nonsense=1 is not a key"]),
    (["++algo.optim.nonsense=1"], ["algo.optim.nonsense=1 is not a key"]),
    (["~algo.clip"], ["algo.clip is missing", "algo.clip=VALUE"]),
    (["algo.clip=abc"], ["algo.clip=abc", "must be a valid number"]),
    (["algo.clip=null"], ["algo.clip=null", "must be a valid number"]),
    (["algo.clip=-1"], ["algo.clip=-1", "greater than 0"]),
    (["algo.optim.betas=[0.9,2]"], ["algo.optim.betas.1=2", "less than or equal to 1"]),
    (["algo.clipping=both"], ["algo.clipping=both", "'separate' or 'joint'"]),
    (["++algo.update=3"], ["algo.update=3", "a group of keys"]),
    (["stage=ppo"], ["stage=ppo", "'sft', 'reward' or 'rl'"]),
    (["seed=1,2"], ["seed=1,2", "-m"]),
    (["seed=[1"], ["seed=[1", "quotes"]),
    (["model=custom"], ["model.name has no value", "model.name=VALUE"]),
    (["model.scratch=null"], ["model.name is missing"]),
    (["data.source=web"], ["data.source=web", "embedded, path, hub"]),
    (["algo.clip=${nope}"], ["algo.clip", "'nope' not found"]),
    (["algo=_online"], ["algo._target_ is missing", "algo=NAME"]),
    (["algo._target_=nowhere.P3O"], ["algo._target_=nowhere.P3O cannot be imported"]),
    (["algo._target_=os.nope"], ["algo._target_=os.nope cannot be imported"]),
    (["algo._target_=os.getcwd"], ["algo._target_=os.getcwd", "pydantic dataclass"]),
    (["algo.update.batch=129"], ["algo.update.batch=129", "2 responses", "algo.update.batch=128"]),
    (["algo.update.minibatches=3"], ["3 minibatches", "= 6", "algo.update.batch=126"]),
    (["algo.update.episodes=64"], ["algo.update.episodes=64", "algo.update.episodes=128"]),
    (["launch.processes=2"], ["launch.processes=2", "launch=deepspeed"]),
    (["launch=deepspeed", "sft.batch=33"], ["sft.batch=33", "sft.batch=32"]),
    (["launch=deepspeed", "launch.processes=3"], ["x 3 processes = 24", "algo.update.batch=120"]),
    (["model.scratch.heads=3"], ["model.scratch.width=128", "model.scratch.width=126"]),
    (["model.scratch.context=64"], ["model.scratch.context=64", "model.scratch.context=144"]),
]


@pytest.mark.parametrize(("words", "says"), FAULTS, ids=[" ".join(words) for words, _ in FAULTS])
def test_a_fault_is_one_sentence_with_key_value_and_fix(words: list[str], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipe(compose(words))
    sentence = str(caught.value)
    assert all(part in sentence for part in says), sentence
    assert sentence.endswith(".") and "\n" not in sentence
    assert not any(word in sentence.lower() for word in ("pydantic.dev", "http", "full_key"))


def test_more_processes_than_cuda_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    node = compose(["launch=deepspeed", "launch.processes=4"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"launch\.processes=4 .* 2 CUDA devices"):
        recipe(node)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert recipe(node).launch.processes == 4  # on CPU, gloo shares the cores


MINE = """
_target_: {target}
name: mine
max_prompt_tokens: 8
max_response_tokens: 8
"""
MODULE = """
from pydantic.dataclasses import dataclass
from rlhf_cli.data.corpus import DatasetDefaults
from rlhf_cli.recipes import STRICT

@dataclass(frozen=True, config=STRICT)
class Mine(DatasetDefaults):
    name: str
    max_prompt_tokens: int
    max_response_tokens: int
    title = "mine"
    def load(self): ...
    def fingerprint(self): return "1"

@dataclass(frozen=True, config=STRICT)
class Half(DatasetDefaults):
    name: str
    max_prompt_tokens: int
    max_response_tokens: int
    title = "mine"
    def load(self): ...
"""


def test_a_class_of_the_users_own_is_a_choice_once_it_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_own_rows.py").write_text(MODULE)
    (tmp_path / "data").mkdir()
    for word in "Mine", "Half":
        text = MINE.format(target=f"users_own_rows.{word}")
        (tmp_path / "data" / f"{word.lower()}.yaml").write_text(text)
    assert recipe(compose(["data=mine"], tmp_path)).group == "mine-nano"
    with pytest.raises(UserError, match=r"data\._target_=users_own_rows\.Half lacks fingerprint"):
        recipe(compose(["data=half"], tmp_path))


def test_a_reference_that_was_parsed_before_means_what_it_says_here() -> None:
    one, other = (compose([f"model.scratch.width={width}", "algo=ppo"]) for width in (64, 256))
    assert (one.reward.model.scratch.width, other.reward.model.scratch.width) == (64, 256)
    assert base.parse.cache_info().hits  # type: ignore[attr-defined]
    before = base.parse.__wrapped__  # type: ignore[attr-defined]
    with patch.object(base, "parse", before):
        assert compose(["model.scratch.width=64", "algo=ppo"]) == one


def test_the_door_opens_without_torch_hydra_or_wandb() -> None:
    code = (
        "import sys, rlhf_cli.config;"
        "print([m for m in ('torch', 'hydra', 'wandb', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["reward=http", "reward.source.url=x", "reward.source.batch=0"],
            "reward.source.batch=0 is not allowed: it must be greater than or equal to 1; give another"
            " value.",
        ),
        (
            ["reward=http", "reward.source.url=x", "reward.source.kind=mail"],
            "reward.source.kind=mail is not allowed: choose one of learned, gold, function, http, hf, mix.",
        ),
        (
            [
                "reward=mix",
                "reward.source.parts=[{weight: 1, source: {kind: function, call: a.b, batch: 0}}]",
            ],
            "reward.source.parts.0.source.batch=0 is not allowed: it must be greater than or equal to 1; give"
            " another value.",
        ),
        (
            ["reward=mix", "reward.source.parts=[{weight: 1, source: {call: a.b}}]"],
            "reward.source.parts.0.source.kind is missing; give it a value with"
            " reward.source.parts.0.source.kind=VALUE.",
        ),
    ],
)
def test_a_fault_in_one_of_several_kinds_is_said_of_the_key_itself(
    words: list[str], says: str
) -> None:
    with pytest.raises(UserError) as fault:
        recipe(compose(words))
    assert str(fault.value) == says
