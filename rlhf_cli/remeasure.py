"""`rlhf eval`: any policy under the contract that the runs of a comparison were measured by.

The contract is that of a finished RL run: its prompts, its random numbers, its SFT policy as the reference
of the KL, its judges. What is found lies in a run directory of its own, below `eval/`, so that whatever
reads the samples of a run reads these too.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rlhf_cli.data.corpus import digest
from rlhf_cli.engine.world import start
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor
from rlhf_cli.stages.chain import Chain
from rlhf_cli.stages.evaluate import Evaluator
from rlhf_cli.store.files import sha256
from rlhf_cli.store.key import key
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.provenance import provenance
from rlhf_cli.store.run import Run, all_runs
from rlhf_cli.tools.checkpoints import Policy, quiet, tokenizer_of, trained, trained_or_folder
from rlhf_cli.worker import corpus_of


@dataclass(frozen=True)
class Measured:
    """What came of it."""

    run: Run
    like: Run
    """Whose contract it was."""


def remeasure(runs: Path, what: str, like: str, draws: int, command: str) -> Measured:
    """Measures a run's policy, or the one in a folder of Hugging Face's layout.

    like: the RL run whose contract holds; "" for the run itself, or the newest that fits. draws: responses
    to each prompt. Raises UserError.
    """
    policy = trained_or_folder(runs, what)
    contract = _contract(runs, policy, like)
    recipe, manifest = contract.recipe, contract.manifest
    reference = contract.reference()
    assert contract.run is not None and reference is not None and reference.run is not None
    tokenizer_of(reference, policy)  # refuses what cannot be compared token by token
    science = {
        "policy": _weights(policy),
        "contract": {
            "reference": reference.run.weights(),
            "parents": manifest["parents"],
            "eval": asdict(recipe.eval),
            "scoring": manifest["science"].get("scoring"),
            "prompts": manifest["data"]["evaluation"],
            "temperature": 1.0,
            "estimator": "k1",
        },
        "draws": draws,
    }
    name = key(science)
    label = policy.run.label if policy.run else policy.folder.resolve().name
    run = Run(runs / "eval" / f"{label}-{name}")
    with run.lock():
        if run.status() != "done":
            _measure(run, policy, contract, draws, science, command)
    return Measured(run, contract.run)


def _contract(runs: Path, policy: Policy, like: str) -> Policy:
    """The RL run that says how to measure."""
    if like or (policy.run and policy.run.stage == "rl"):
        chosen = trained(runs, like) if like else policy
        if chosen.manifest.get("stage") != "rl":
            raise UserError(f"--like={like} is not a run of stage rl; name one.")
        return chosen
    made = policy.manifest.get("key")
    fits = [
        run
        for run in all_runs(runs)
        if run.stage == "rl"
        and run.status() == "done"
        and (made is None or made in run.manifest()["parents"].values())
    ]
    if not fits:
        raise UserError(f"{policy.name} has no RL run to be measured like; name one: --like=RUN.")
    newest = max(fits, key=lambda run: str(run.manifest()["finished"]))
    return trained(runs, str(newest.path))


def _measure(
    run: Run, policy: Policy, contract: Policy, draws: int, science: dict[str, Any], command: str
) -> None:
    """From `running` to `done`."""
    theirs, own = contract.manifest, policy.manifest
    assert contract.run is not None
    run.begin(
        contract.run.config_path.read_text(encoding="utf-8"),
        {
            **{
                name: theirs[name] for name in ("title", "model", "group", "parents", "parent_runs")
            },
            "reference": science["contract"]["reference"],
            "key": run.key,
            "stage": "eval",
            "label": run.label,
            "algo": own.get("algo") or own.get("stage") or policy.folder.resolve().name,
            "beta": own.get("beta"),
            "seed": own.get("seed"),
            "policy": str(policy.folder),
            "science": science,
            "command": command,
            **provenance(),
        },
    )
    run.update(data=theirs["data"])
    try:
        metrics, rows = _found(policy, contract, draws)
    except Exception as error:
        run.fail(str(error).partition("\n")[0])
        raise
    ledger = Ledger(run.metrics_path)
    ledger.rewind(-1)  # of an attempt that ended between here and its end
    ledger.write({"step": 0, "episodes": 0, **metrics})
    run.keep_samples(0, rows)
    run.finish()


def _found(
    policy: Policy, contract: Policy, draws: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What the evaluator of the contract's run makes of the policy."""
    recipe = contract.recipe
    corpus = corpus_of(cast(Hashable, recipe.data))
    if corpus.digest != contract.manifest["data"]["digest"]:
        raise UserError(
            f"data={corpus.title} is read otherwise than when {contract.name} was made, so its prompts are"
            " not those; measure with the rlhf-cli that made it."
        )
    quiet()
    world = start(recipe.launch.timeout)
    parents = {role: contract.parent(role) for role in contract.manifest["parents"]}
    chain = Chain(recipe, corpus, world, {role: run.final for role, run in parents.items() if run})
    collector = chain.collector(chain.judges(chain.policy().to(world.device)))
    actor = Actor(chain.policy_in(policy.folder).to(world.device))
    return Evaluator.of(recipe, corpus, collector).measure(actor, draws)


def _weights(policy: Policy) -> str:
    """A digest of the weights, whoever saved them."""
    if policy.run is not None:
        return policy.run.weights()
    files = sorted([*policy.folder.glob("*.safetensors"), *policy.folder.glob("*.bin")])
    return digest([sha256(file) for file in files])
