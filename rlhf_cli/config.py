"""The only door for configuration: words and yaml in, one frozen typed object out.

`compose` (or the command line, through `settled`) makes a node of plain values out of `conf/` and
the user's overrides; `recipe` makes typed, checked objects of it; `freeze` and `read` take a node
to a file and back. Hydra is touched by `compose` alone, so a worker that reads a frozen file never
sees it. This module brings no torch by itself; the class an algorithm's `_target_` names does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_type_hints

from omegaconf import DictConfig, Node, OmegaConf, base, flag_override
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass

from rlhf_cli import checks, complaints, dotted, recipes, secret, trust
from rlhf_cli.errors import UserError

if TYPE_CHECKING:
    from rlhf_cli.core.algorithm import Algorithm
    from rlhf_cli.data.corpus import Dataset
else:
    # pydantic evaluates the annotations below; both classes are checked by `_built` instead.
    Algorithm: TypeAlias = Any
    Dataset: TypeAlias = Any

CONTRACTS = {
    "algo": (
        "update",
        "optim",
        "needs",
        "revision",
        "couples_group",
        "shift_invariant",
        "trains_reward",
        "sampling",
        "prepare",
        "loss",
        "watch",
        "side",
        "side_loss",
        "wants_entropy",
        "replayed",
        "critic_only",
    ),
    "data": (
        "name",
        "title",
        "pays",
        "has_gold",
        "shorter",
        "max_prompt_tokens",
        "max_response_tokens",
        "load",
        "fingerprint",
    ),
}
"""What the class that each `_target_` names must offer."""
FOLDERS = ("paths.runs", "paths.cache", "data.path", "judge.cache")
"""Keys whose value may come out of the environment: it will be read in a run's files."""


@dataclass(frozen=True, config=recipes.STRICT)
class Recipe:
    """Everything a chain of stages is made of."""

    stage: Literal["sft", "reward", "rl"]
    """Where the chain stops."""
    seed: int
    """Of the RL stage; the earlier ones have their own."""
    name: str
    """The algorithm's word in run names and figures."""
    model: recipes.Model
    data: Dataset
    algo: Algorithm
    rollout: recipes.Drawing
    sampler: recipes.Sampler
    sft: recipes.SFT
    reward: recipes.Reward
    eval: recipes.Evaluation
    launch: recipes.Launch
    checkpoint: recipes.Checkpoint
    guard: recipes.Guard
    train: recipes.Train
    track: recipes.Track
    paths: recipes.Paths

    @property
    def group(self) -> str:
        """The comparison this run belongs to: `track.group`, or <data>-<model>."""
        return self.track.group or f"{self.data.title}-{self.model.label}"


HOW = ("sampler", "launch", "checkpoint", "guard", "train", "track", "paths")
"""What of a recipe says how it is carried out: in no key (but for a guard that backs off,
and a sampler other than the trained model)."""


def conf_dir() -> Path:
    """Find the shipped yaml: inside the package when installed from a wheel, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose(
    overrides: Sequence[str], config_dir: Path | None = None, root: str = "train"
) -> DictConfig:
    """Compose `conf/ROOT.yaml` with Hydra overrides into a node of plain values.

    `config_dir` is a further folder of yaml, searched after the shipped one. Raises UserError.
    """
    words = list(overrides)
    if config_dir is not None:
        words.append(f"hydra.searchpath=['file://{config_dir.resolve()}']")
    with explained(root):
        return settled(unsettled(words, root))


def unsettled(overrides: Sequence[str], root: str = "train") -> DictConfig:
    """The same with all interpolations still open, but for those that only Hydra can resolve."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = hydra.compose(root, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(node)
    if "name" in node:
        trust.check_references(_without_hydra(node))
        node.name = node.name  # the choice of algorithm
    with flag_override(node, ["struct", "readonly"], False):
        del node["hydra"]
    return node


def _without_hydra(node: DictConfig) -> dict[Any, Any]:
    """What is said of the job, references still open; of Hydra's own settings nothing is written down."""
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    return {key: value for key, value in values.items() if key != "hydra"}


@contextmanager
def explained(root: str = "train") -> Iterator[None]:
    """Turns what Hydra, OmegaConf or the yaml parser refuse into a UserError of one sentence."""
    try:
        yield
    except Exception as error:
        if sentence := complaints.of_composition(error, root):
            raise sentence from error
        raise


def settled(node: DictConfig) -> DictConfig:
    """Copy a node with every interpolation replaced by its value.

    Raises UserError for a value that is still `???`, for references that lead nowhere, and for secrets.
    """
    said = OmegaConf.to_container(node, resolve=False)
    for key in _missing(said):
        raise UserError(f"{key} has no value yet; give it one with {key}=VALUE.")
    trust.check_references(said)
    # Not OmegaConf.resolve, whose errors do not say which key they are about.
    values = OmegaConf.to_container(node, resolve=True)
    _refuse_secrets(values)
    return DictConfig(values)


def _refuse_secrets(values: Any) -> None:
    """UserError if a value is one: all of them are written into every run, and mirrored."""
    texts = {key: value for key, value in trust.leaves(values) if isinstance(value, str)}
    variables = {value for key, value in texts.items() if key.endswith("key_env")}
    for key, value in texts.items():
        if secret.in_address(value):
            raise UserError(
                f"{key} holds a password or a key, which every run would write down; take it out of the"
                " address, and name the variable of the environment that holds it with key_env."
            )
        if variable := secret.held(value, variables):
            raise UserError(
                f"{key} holds what {variable} is in the environment, which every run would write down;"
                " leave it out."
            )


def freeze(node: DictConfig) -> str:
    """Write a node as yaml, to be read back by `read`: here, and by the processes that this one starts."""
    trust.vouch(OmegaConf.to_container(node, resolve=True))
    return OmegaConf.to_yaml(node, resolve=True)


def read(path: Path) -> DictConfig:
    """Read a frozen node; OmegaConf's yaml takes 1e-6 for a number, plain PyYAML does not.

    Raises UserError if the file is missing or damaged, or does more than to say values (`trust`).
    """
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        trust.check_text(text)
        node = OmegaConf.load(StringIO(text))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} cannot be read ({_line(error)}); delete the run's folder and run again."
        ) from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path} holds no configuration; delete the run's folder and run again.")
    trust.check_frozen(OmegaConf.to_container(node, resolve=False), str(path))
    if any(name not in node or _fields(name) - node[name].keys() for name in HOW):
        # Frozen by a version that had less to say; what the run is stays as it was.
        shipped = compose([])
        for name in HOW:
            if name not in node:
                node[name] = shipped[name]
            elif name != "sampler":
                node[name] = {**shipped[name], **node[name]}
    return node


def _fields(name: str) -> set[str]:
    """What a part of a recipe has to say; nothing of one that comes in several kinds."""
    part = get_type_hints(Recipe)[name]
    return {each.name for each in fields(part)} if is_pydantic_dataclass(part) else set()


def recipe(node: DictConfig) -> Recipe:
    """Type and check a node. Raises UserError with one sentence for the first fault."""
    values = OmegaConf.to_container(node, resolve=True)
    assert isinstance(values, dict)
    for group, contract in CONTRACTS.items():
        if group in values:
            values[group] = _built(group, values[group], contract)
    typed = _typed(Recipe, values, "")
    for fault in checks.faults(typed):
        raise UserError(fault)
    return typed


def judge(overrides: Sequence[str]) -> recipes.Judge:
    """Compose `conf/winrate.yaml`, type it and check it. Raises UserError."""
    values = OmegaConf.to_container(compose(overrides, root="winrate").judge, resolve=True)
    assert isinstance(values, dict)
    kind = recipes.Chat if values.get("kind") == "llm" else recipes.ByScore
    typed: recipes.Judge = _typed(kind, values, "judge", "winrate")
    return typed


def register() -> None:
    """Register the resolvers that `conf/` uses: rlhf.pick, rlhf.source, and oc.env for folders alone.

    A reference is parsed once for all the jobs of a sweep: that takes longer than to follow it.
    """
    if not hasattr(base.parse, "cache_info"):  # type: ignore[attr-defined]
        base.parse = lru_cache(maxsize=1024)(base.parse)  # type: ignore[attr-defined]
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)
    OmegaConf.register_new_resolver("rlhf.pick", _pick, replace=True)
    OmegaConf.register_new_resolver("rlhf.source", _source, replace=True)


def _pick(word: str, table: Mapping[str, Any], *, _node_: Node) -> Any:
    """Look a word up in a table, falling back to its entry `other`.

    A word that is missing is a fault of the key it came from, not of the one that is looked up.
    """
    if word in table or "other" in table:
        return table.get(word, table.get("other"))
    origin = re.search(r"rlhf\.pick:\$\{([\w.]+)\}", str(_node_._value()))
    key = origin[1] if origin else str(_node_._get_full_key(None))
    if key.startswith("."):
        key = str(_node_._get_full_key(None)).rpartition(".")[0] + key
    raise UserError(f"{key}={word} is not allowed: choose one of {', '.join(table)}.")


def _env(variable: str, *default: Any, _node_: Node) -> str | None:
    """A folder that the environment names; a secret that is named by mistake would be written down."""
    key = str(_node_._get_full_key(None))
    if key.startswith("hydra.") or (key in FOLDERS and not secret.names_one(variable)):
        return oc.env(variable, *default)
    raise UserError(
        f"{key} may not come out of the environment ({variable}), only {', '.join(FOLDERS)} may; write the"
        " value out"
    )


def _source(scratch: object) -> str:
    """Embedded rows for a model trained from scratch, which could not read real ones."""
    return "hub" if scratch is None else "embedded"


def _missing(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is still `???`."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, f"{prefix}.{key}" if prefix else str(key))
    elif values == "???":
        yield prefix


def _built(group: str, values: Any, contract: Sequence[str]) -> Any:
    """Build the object that a group's `_target_` names, after checking that it may be built."""
    if not isinstance(values, dict) or "_target_" not in values:
        raise UserError(
            f"{group}._target_ is missing; name the class this choice builds, or choose another one"
            f" with {group}=NAME."
        )
    values = dict(values)
    target = str(values.pop("_target_"))
    cls = dotted.named(f"{group}._target_", target, "class")
    if not (isinstance(cls, type) and is_pydantic_dataclass(cls)):
        raise UserError(f"{group}._target_={target} must name a frozen pydantic dataclass.")
    offered = {*dir(cls), *cls.__dataclass_fields__}
    for word in contract:
        if word not in offered:
            raise UserError(f"{group}._target_={target} lacks {word}; see the contract it fulfils.")
    return _typed(cls, values, group)


def _typed(cls: type, values: dict[Any, Any], prefix: str, root: str = "train") -> Any:
    """Validate plain values; the first fault becomes one sentence."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise complaints.of_values(error, prefix, values, root) from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
