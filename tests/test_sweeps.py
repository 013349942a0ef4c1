"""Sweeps: what is frozen, how far they came, who carries them out; struck by real kills, in miniature."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from rlhf_cli import __version__, campaign, config, launch, words, worker
from rlhf_cli.errors import Stopped, UserError
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run, all_runs
from rlhf_cli.sweeps import index, search, standing
from rlhf_cli.sweeps.index import Job, Search, Sweep
from rlhf_cli.sweeps.standing import Standing
from rlhf_cli.words import Space
from tests.conftest import ROOT, Typed
from tests.test_chain import TINY, rlhf
from tests.test_stopping import wait_for

SMALLEST = [*TINY, "algo.update.episodes=16", "eval.points=1", "track=off"]
"""One rollout of 16 responses, two steps."""


def line(*said: str) -> words.Line:
    return words.read(["-m", *said])


def swept(folder: Path, *said: str) -> Sweep:
    """The index of a sweep, as `train -m` writes it before its first job begins."""
    jobs = [(job, plan(node)) for job, node in words.jobs(["-m", *said, f"paths.runs={folder}"])]
    return index.grid(jobs, f"rlhf train -m {' '.join(said)}", {"kind": "basic"})


def finish(run: Run, **last: float) -> None:
    """The run as its stages would leave it."""
    run.begin("stage: rl\n", {"key": run.key})
    if last:
        Ledger(run.metrics_path).write(
            {"step": 1, **{f"eval/{name}": value for name, value in last.items()}}
        )
    run.finish()


def states(sweep: Sweep) -> list[str]:
    return [each.state for each in standing.standings(sweep)]


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of what would have been trained: it is done at once, but for seed 13."""
    labels: list[str] = []

    def execute(chain: Plan, command: str) -> Path:
        step = chain.steps[-1]
        if Run(step.path).status() == "done":
            return step.path
        labels.append(step.label)
        if chain.recipe.seed == 13:
            Run(step.path).begin("", {"key": step.key})
            Run(step.path).fail("13 brings bad luck.")
            raise UserError("13 brings bad luck.")
        finish(Run(step.path))
        return step.path

    monkeypatch.setattr(launch, "execute", execute)
    return labels


# --- the line


def test_the_launcher_is_taken_off_and_its_values_are_those_of_hydras_own_schema() -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    found = line("hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "seed=1,2")
    assert found.words == ("-m", "seed=1,2") and found.sweeper is None
    assert (found.launcher["kind"], found.launcher["n_jobs"]) == ("joblib", 3)
    assert line("seed=1,2").launcher == {"kind": "basic"}


def test_parameters_reach_submitit_by_the_names_it_has_for_them() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from rlhf_cli.sweeps.submit import parameters

    found = line(
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.timeout_min=240",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.gpus_per_node=8",
        "hydra.launcher.max_num_timeout=5",
    )
    assert parameters(found.launcher) == {
        "timeout_min": 240,
        "gpus_per_node": 8,
        "tasks_per_node": 1,
        "nodes": 1,
        "name": "rlhf",
        "stderr_to_stdout": False,
        "slurm_partition": "gpu",
        "slurm_signal_delay_s": 120,
        "slurm_additional_parameters": {},
    }
    assert found.launcher["max_num_timeout"] == 5


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            ["hydra/launcher=joblib", "hydra.launcher.njobs=2"],
            "hydra.launcher.njobs is not a key of the configuration; `rlhf train --cfg job` prints every"
            " key there is.",
        ),
        (
            ["hydra/sweeper=optuna", "hydra.sweeper.trials=2", "seed=range(1,3)"],
            "hydra.sweeper.trials is not a key of the configuration; `rlhf train --cfg job` prints every"
            " key there is.",
        ),
        (
            ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=0", "seed=range(1,3)"],
            "hydra.sweeper.n_trials=0 is not allowed: it must be at least 1.",
        ),
        (
            ["hydra/sweeper=optuna", "hydra.sweeper.metric=eval/glod", "seed=range(1,3)"],
            "hydra.sweeper.metric=eval/glod is not a metric; give one that an evaluation writes, such as"
            " eval/gold or eval/reward.",
        ),
        (
            ["hydra/sweeper=optuna", "seed=3"],
            "hydra/sweeper=optuna has nothing to search; give it a range, as in"
            " 'algo.optim.lr=tag(log,interval(1e-6,1e-4))'.",
        ),
        (
            ["hydra/sweeper=optuna", "algo=choice(ppo,rloo)"],
            "algo=choice(ppo,rloo) chooses a file, and hydra/sweeper=optuna searches values; give one file,"
            " or a sweep of its own to each.",
        ),
        (
            ["hydra/sweeper=optuna", "seed=range(1,3)", "--cfg", "job"],
            "--cfg job cannot be heeded with hydra/sweeper=optuna; of Hydra's flags it takes --config-dir"
            " DIR alone.",
        ),
        (
            ["hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "seed=1,2"],
            "hydra.launcher.n_jobs=0 is not allowed: give how many runs at once, or -1 for all cores.",
        ),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.nodes=2", "seed=1,2"],
            "hydra.launcher.nodes=2 is not allowed: hydra/launcher=submitit_local has this machine alone;"
            " leave hydra.launcher.nodes at 1.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_the_words_of_a_sweep_is_one_sentence(
    typed: Typed, executed: list[str], said: list[str], sentence: str
) -> None:
    for plugin in ("hydra_joblib_launcher", "hydra_submitit_launcher"):
        pytest.importorskip(f"hydra_plugins.{plugin}")
    code, _, err = typed("train", "-m", *said)
    assert (code, err) == (2, f"error: {sentence}\n") and executed == []


@pytest.mark.parametrize(
    ("launcher", "plugin", "extra"),
    [
        ("joblib", "hydra-joblib-launcher", "sweep"),
        ("submitit_slurm", "hydra-submitit-launcher", "slurm"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named_with_what_brings_it(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, launcher: str, plugin: str, extra: str
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(words, "version", absent)
    code, _, err = typed("train", "-m", f"hydra/launcher={launcher}", "seed=1,2")
    assert (code, err) == (
        2,
        f"error: hydra/launcher={launcher} needs {plugin}, which is not installed;"
        f" `pip install 'rlhf-cli[{extra}]'` brings it.\n",
    )


def test_a_line_of_a_wandb_agent_is_a_run_with_its_values(
    executed: list[str], typed: Typed
) -> None:
    """W&B puts `lr=0.1` and the like where the sweep's command says ${args_no_hyphens}."""
    (node,) = words.collect(["algo=ppo", "algo.optim.lr=3.2e-05", "algo.beta=0.07", "seed=4"])
    made = config.recipe(node)
    assert (made.algo.optim.lr, made.algo.beta, made.seed) == (3.2e-05, 0.07, 4)  # type: ignore[attr-defined]
    assert typed("train", "algo=ppo", "algo.optim.lr=3.2e-05", "seed=4")[0] == 0
    assert len(executed) == 1


def test_a_run_is_called_at_wandb_by_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "open_mirror", lambda *_, **said: told.append(said))
    made = plan(config.compose(["algo=ppo", "algo.beta=0.05", "seed=3", f"paths.runs={tmp_path}"]))
    for step in made.steps:
        run = Run(step.path)
        run.begin(config.freeze(step.node), {"key": step.key})
        typed = config.recipe(step.node)
        worker._mirror(run, typed, SimpleNamespace(title="hh-embedded"))  # type: ignore[arg-type]
    assert [each["job_type"] for each in told] == ["sft", "rm", "rl"]
    assert {each["group"] for each in told} == {"hh-embedded-nano"}
    assert told[0]["name"] == "hh_embedded-nano-s1"
    assert told[2]["name"] == "ppo-hh_embedded-nano-beta0.05-s3"
    assert told[2]["tags"] == ["hh-embedded", "nano", "ppo", f"rlhf-cli {__version__}"]


PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
NEEDS = {
    "launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "launcher=submitit": "hydra_plugins.hydra_submitit_launcher",
    "sweeper=optuna": "optuna",
}


@pytest.mark.parametrize("shown", re.findall(r"^rlhf train .*$", PAGE, re.MULTILINE))
def test_every_sweep_of_the_page_can_be_planned(typed: Typed, shown: str) -> None:
    for word, module in NEEDS.items():
        if word in shown:
            pytest.importorskip(module)
    _, _, *said = shlex.split(shown, comments=True)
    code, out, err = typed("plan", *said)
    assert (code, err) == (0, "") and "build" in out


def test_the_agents_line_of_the_page_is_one_of_hydras_and_its_keys_are_there() -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (agent,) = (yaml.safe_load(each) for each in shown)
    assert agent["command"] == ["rlhf", "train", "${args_no_hyphens}"]
    values = {"algo.optim.lr": 1e-5, "algo.beta": 0.1}
    assert values.keys() == agent["parameters"].keys()
    (node,) = words.collect([f"{key}={value}" for key, value in values.items()])
    assert (node.algo.optim.lr, node.algo.beta) == (1e-5, 0.1)


# --- the index


def test_what_a_command_meant_is_written_before_anything_runs(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "algo=ppo,rloo", "seed=1,2")
    assert sweep.path.parent == tmp_path / "sweeps" and sweep.name.startswith("hh-embedded-nano-")
    assert index.load(sweep.path) == sweep
    said = json.loads((sweep.path / "sweep.json").read_text())
    assert [job["words"][:2] for job in said["jobs"]] == [
        ["algo=ppo", "seed=1"], ["algo=ppo", "seed=2"],
        ["algo=rloo", "seed=1"], ["algo=rloo", "seed=2"],
    ]  # fmt: skip
    assert [len(job["chain"]) for job in said["jobs"]] == [3, 3, 3, 3]
    for job in sweep.jobs:
        frozen = OmegaConf.load(sweep.path / "jobs" / f"{job.key}.yaml")
        assert job.words[:2] == (f"algo={frozen.name}", f"seed={frozen.seed}")


@pytest.mark.parametrize(
    "said",
    [
        [],
        ["-m"],
        ["algo=p3o_v2", "data=hh", "seed=1", "seed=2"],
        ["-m", "algo=ppo,rloo", "seed=1,2", "algo.beta=0.1", "model.scratch.width=64"],
        ["--multirun", "seed=1,2", "seed=3"],
        ["-m", "algo.update={episodes: 128, batch: 64}", "seed=range(1,3)"],
        ["-m", "algo=glob(p3o*)"],
        ["-m", "seed=choice(1,2)", 'track.group="a b",c', "name=x"],
        ["++algo.update.batch=64", "model@reward.model=nano", "~experiment"],
        ["+track.group=${track.project}-a", "data.path=/a/b c"],
        ["experiment=p3o_hh_6b", "launch=deepspeed", "launch.zero=3"],
        ["track.group=${hydra:runtime.choices.algo}"],
        ["seed=1,2"],
        ["algo=ppoo"],
        ["algo.bet=1"],
        ["algo.beta=[1,"],
        ["reward=mix"],
        ["eval={points: 1}"],
        ["-m", "algo.optim.lr=interval(0,1)"],
    ],
)
def test_a_line_of_overrides_is_composed_as_hydra_as_an_application_does(said: list[str]) -> None:
    def heard(compose: Callable[[list[str]], Any]) -> Any:
        try:
            return compose(said)
        except UserError as error:
            return str(error)

    assert heard(words.jobs) == heard(words._applied)


def test_a_file_that_is_edited_between_two_lines_counts(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "conf", tmp_path / "conf")
    for module in (config, words):
        monkeypatch.setattr(module, "conf_dir", lambda: tmp_path / "conf")
    (before,) = words.collect(["algo=rloo"])
    file = tmp_path / "conf" / "algo" / "rloo.yaml"
    file.write_text(re.sub(r"(?m)^beta: .*$", "beta: 0.77", file.read_text()))
    (after,) = words.collect(["algo=rloo"])
    assert (before.algo.beta, after.algo.beta) == (0.2, 0.77)


def test_what_refers_to_other_values_goes_on_to_do_so() -> None:
    ((job, node),) = words.jobs(["track.project=mine", "track.group=${track.project}-a"])
    assert "track.group=${track.project}-a" in job and node.track.group == "mine-a"


def test_the_order_of_values_and_how_they_are_run_make_no_other_sweep(tmp_path: Path) -> None:
    one = swept(tmp_path, "seed=1,2")
    assert swept(tmp_path, "seed=2,1", "track=off", "launch.micro_batch=4").path == one.path
    assert swept(tmp_path, "seed=1,3").path != one.path
    again = index.load(one.path)
    assert again.command == "rlhf train -m seed=2,1 track=off launch.micro_batch=4"
    assert again.started == one.started


def test_a_yaml_that_is_edited_meanwhile_changes_nothing(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "conf", tmp_path / "conf")
    for module in (config, words):
        monkeypatch.setattr(module, "conf_dir", lambda: tmp_path / "conf")
    sweep = swept(tmp_path / "runs", "algo=rloo", "seed=1,2")
    before = [sweep.plan(job).steps[-1].path for job in sweep.jobs]
    file = tmp_path / "conf" / "algo" / "rloo.yaml"
    file.write_text(re.sub(r"(?m)^beta: .*$", "beta: 0.77", file.read_text()))
    edited = config.recipe(config.compose(["algo=rloo"]))
    assert edited.algo.beta == 0.77  # type: ignore[attr-defined]
    found = index.load(sweep.path)
    assert [found.plan(job).steps[-1].path for job in found.jobs] == before
    assert found.plan(found.jobs[0]).recipe.algo.beta != 0.77  # type: ignore[attr-defined]


def test_a_configuration_that_makes_another_run_is_not_carried_out(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "seed=1,2")
    file = sweep.path / "jobs" / f"{sweep.jobs[0].key}.yaml"
    file.write_text(file.read_text().replace("seed: 1\n", "seed: 7\n"))
    with pytest.raises(UserError, match=r"makes p3o_v2-hh_embedded-nano-s7-.*it was edited"):
        sweep.plan(sweep.jobs[0])


def test_a_damaged_index_says_which_folder_to_delete(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "seed=1,2")
    said = json.loads((sweep.path / "sweep.json").read_text())
    said["jobs"][0]["chain"] = ["../../elsewhere"]
    (sweep.path / "sweep.json").write_text(json.dumps(said))
    with pytest.raises(
        UserError, match=rf"is damaged .*; delete {sweep.path} and give its command"
    ):
        index.load(sweep.path)


# --- how far it came


def test_the_state_of_a_job_is_what_its_runs_say(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "seed=1,2,3,4,5,6")
    done, failed, stopped, interrupted, missing, cancelled = (sweep.run(job) for job in sweep.jobs)
    finish(done, kl=2.5, reward=0.5)
    for run in (failed, stopped, interrupted):
        run.begin("", {"key": run.key})
    failed.fail("a worker ended with code 3")
    stopped.update(reason="it was stopped by SIGTERM")
    sweep.marker(sweep.jobs[5]).touch()
    assert states(sweep) == ["done", "failed", "stopped", "interrupted", "missing", "cancelled"]
    found = standing.standings(sweep)
    assert [each.reason for each in found[:3]] == [
        "", "a worker ended with code 3", "it was stopped by SIGTERM",
    ]  # fmt: skip
    assert found[0].last["eval/kl"] == 2.5 and cancelled.status() == missing.status() == "missing"


def test_a_job_whose_parent_failed_has_failed_and_says_which(tmp_path: Path) -> None:
    sweep = swept(tmp_path, "seed=1,2")
    grandparent, parent = (Run(tmp_path / at) for at in sweep.jobs[0].chain[:2])
    finish(grandparent)
    parent.begin("", {"key": parent.key})
    parent.fail("the disk is full")
    assert states(sweep) == ["failed", "failed"]
    (first, _) = standing.standings(sweep)
    assert first.reason == f"reward/{parent.path.name}: the disk is full"
    with parent.lock():
        parent.begin("", {"key": parent.key})
        assert states(sweep) == ["running", "running"]


def job(state: standing.State, seconds: float | None, reward: float | None = None) -> Standing:
    chain = Job(words=(), chain=("rl/x-1",), values={"algo.beta": 0.1})
    last = {} if reward is None else {"eval/reward": reward}
    return Standing(chain, Run(Path("runs/rl/x-1")), state, "", last, seconds)


def test_the_time_left_is_that_of_the_mean_run_shared_among_those_that_run() -> None:
    done = [job("done", 100), job("done", 140)]
    running = [job("running", 30), job("running", 60)]
    rest = [job("missing", None), job("failed", 10)]
    # 120 s each for two that run and one that is missing, less 90 s that are spent, over two
    assert standing.seconds_left([*done, *running, *rest]) == pytest.approx((360 - 90) / 2)
    assert standing.seconds_left([*done, *rest]) is None
    assert standing.seconds_left(running) is None


# --- the verb


def test_a_failure_does_not_stop_the_others_and_retry_takes_it_up(
    typed: Typed, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = typed("train", "-m", "seed=1,13,2")
    (sweep,) = index.every(Path("runs"))
    assert (code, len(executed)) == (1, 3)
    assert f"{sweep.name}: 2 done, 1 failed of 3" in out
    assert f"next: rlhf sweep retry {sweep.key}, rlhf sweep status {sweep.key}\n" in out
    failed = sweep.run(sweep.jobs[1]).path
    assert err.endswith(f"error: 1 of 3 runs failed:\n  {failed}: 13 brings bad luck.\n")
    assert typed("train", "-m", "seed=1,13,2")[0] == 1 and len(executed) == 4

    monkeypatch.setattr(launch, "execute", lambda chain, command: finish(Run(chain.steps[-1].path)))
    code, out, _ = typed("sweep", "retry", sweep.key)
    assert code == 0 and f"{sweep.name}: 3 done of 3" in out
    assert len(index.every(Path("runs"))) == 1


def test_the_verb_lists_sweeps_and_shows_one(typed: Typed, executed: list[str]) -> None:
    assert typed("sweep")[1] == "no sweeps in runs yet; `rlhf train -m` makes one.\n"
    assert typed("sweep", "status")[::2] == (
        2,
        "error: --runs=runs holds no sweep yet; `rlhf train -m` makes one.\n",
    )
    typed("train", "-m", "seed=1,13")
    typed("train", "-m", "seed=1,2")
    second, first = index.every(Path("runs"))
    listed = typed("sweep")[1]
    assert first.name in listed and second.name in listed
    assert {each["name"] for each in json.loads(typed("sweep", "--json")[1])} == {
        first.name,
        second.name,
    }
    mixed = first if len(first.jobs) == 2 and "13" in first.command else second
    said = json.loads(typed("sweep", "status", mixed.key, "--json")[1])
    assert said["counts"] == {"done": 1, "failed": 1} and said["seconds_left"] is None
    assert [(each["status"], each["reason"]) for each in said["jobs"]] == [
        ("done", ""),
        ("failed", "13 brings bad luck."),
    ]
    assert "13 brings bad luck." in typed("sweep", "status", mixed.key)[1]
    assert typed("sweep", "status", "nope")[::2] == (
        2,
        "error: no sweep in runs is called 'nope'; `rlhf sweep` lists those there are.\n",
    )
    assert "give the key of one of them.\n" in typed("sweep", "status", "hh-embedded")[2]


def test_what_is_cancelled_is_left_alone_until_it_is_retried(
    typed: Typed, executed: list[str], tmp_path: Path
) -> None:
    typed("train", "-m", "seed=1,13")
    (sweep,) = index.every(Path("runs"))
    run = sweep.run(sweep.jobs[1])
    with run.lock():
        run.begin("", {"key": run.key})
        code, out, _ = typed("sweep", "cancel", sweep.key)
        assert code == 0 and run.stop_request.exists()
        assert out.startswith(f"{sweep.name}: 1 cancelled, 1 running runs asked to stop\n")
        assert states(sweep) == ["done", "running"]
    assert states(sweep) == ["done", "cancelled"]
    code, out, err = typed("train", "-m", "seed=1,13")
    assert (code, err, len(executed)) == (75, "", 2)
    assert f"next: rlhf sweep retry {sweep.key}" in out
    assert typed("sweep", "retry", sweep.key)[0] == 1 and len(executed) == 3
    assert states(sweep) == ["done", "failed"]


def test_a_stop_means_the_command_and_a_cancelled_run_only_itself(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def execute(chain: Plan, command: str) -> Path:
        seeds.append(chain.recipe.seed)
        raise Stopped("it was stopped by SIGTERM")

    monkeypatch.setattr(launch, "execute", execute)
    code, _, err = typed("train", "-m", "seed=1,2")
    assert (code, err, seeds) == (75, "stopped: it was stopped by SIGTERM\n", [1])


# --- shares of a machine


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """Begin as many tasks as there is room for on a machine with these GPUs: the share of each."""

    def begin(gpus: str, count: int, *said: str) -> list[dict[str, str]]:
        given: list[dict[str, str]] = []

        def child(task: campaign.Task, own: dict[str, str]) -> subprocess.Popen[bytes]:
            given.append(dict(own))
            return subprocess.Popen(["sleep", "60"])

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.setattr(campaign, "_child", child)
        monkeypatch.setattr(campaign, "cores", lambda: 16)
        made = plan(config.compose([*said, f"paths.runs={tmp_path}"]))
        crew = campaign.Slots(count, campaign.visible_devices())
        try:
            while crew.begin(campaign.Task(made.steps[-1], "", frozenset()), []):
                pass
        finally:
            for each in crew.leases:
                assert isinstance(each, subprocess.Popen)
                each.kill()
                each.wait()
        return given

    return begin


def test_slots_without_gpus_share_the_cores(share: Callable[..., Any]) -> None:
    assert share("", 4) == [{"OMP_NUM_THREADS": "4"}] * 4
    two = ["launch=deepspeed", "launch.processes=2"]
    assert share("-1", 4, *two) == [{"OMP_NUM_THREADS": "2"}] * 4


def test_every_run_has_gpus_of_its_own_among_those_that_are_visible(
    share: Callable[..., Any],
) -> None:
    def devices(*said: str) -> list[str]:
        return [each["CUDA_VISIBLE_DEVICES"] for each in share("2,3,5,7,11", 8, *said)]

    assert devices() == ["2", "3", "5", "7", "11"]
    assert devices("launch=deepspeed", "launch.processes=2") == ["2,3", "5,7"]
    assert devices("launch=deepspeed", "launch.processes=4") == ["2,3,5,7"]


def test_gpus_come_back_when_a_run_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = plan(config.compose([f"paths.runs={tmp_path}"]))
    given: list[str] = []

    def child(task: campaign.Task, own: dict[str, str]) -> subprocess.Popen[bytes]:
        given.append(own["CUDA_VISIBLE_DEVICES"])
        return subprocess.Popen(["true"])

    monkeypatch.setattr(campaign, "_child", child)
    crew = campaign.Slots(2, ["4", "6"])
    for _ in range(3):
        begun = crew.begin(campaign.Task(made.steps[-1], "", frozenset()), [])
        assert isinstance(begun, subprocess.Popen)
        begun.wait()
    assert given == ["4", "4", "4"]


def test_more_processes_than_gpus_is_one_sentence(share: Callable[..., Any]) -> None:
    with pytest.raises(UserError) as error:
        share("0,1", 2, "launch=deepspeed", "launch.processes=4")
    assert str(error.value) == (
        "launch.processes=4 takes 4 GPUs for one run, but there are 2 (CUDA_VISIBLE_DEVICES=0,1); lower"
        " launch.processes, or show more of them."
    )


def test_slurm_is_told_of_all_runs_at_once_each_to_wait_for_those_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By stubs of its commands, which note what they are given."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from rlhf_cli.sweeps.submit import Scheduler

    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "count").write_text("0")
    submit = f'cd {stubs}; n=$(($(cat count) + 1)); echo $n > count; cp "$1" $n.sh'
    for name, body in {
        "srun": "",
        "sacct": "",
        "sbatch": f'{submit}; echo "Submitted batch job $n"',
    }.items():
        (stubs / name).write_text(f"#!/bin/sh\n{body}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    found = line(
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpu",
        "hydra.launcher.timeout_min=90",
        "+hydra.launcher.additional_parameters.reservation=mine",
    )
    made = plan(config.compose(["algo=ppo", f"paths.runs={tmp_path / 'runs'}"]))
    crew = Scheduler(found.launcher, tmp_path / "submitit", 256, {})
    begun: dict[str, campaign.Job] = {}
    for task in campaign.tasks({"rlhf train algo=ppo": made}):
        job = crew.begin(task, [begun[key] for key in sorted(task.needs)])
        assert job is not None and crew.early
        begun[task.step.key] = job
    told = [(stubs / f"{number}.sh").read_text().splitlines() for number in (1, 2, 3)]
    for script in told:
        assert {"#SBATCH --partition=gpu", "#SBATCH --time=90"} <= {*script}
        assert "#SBATCH --signal=USR2@120" in script and "#SBATCH --reservation=mine" in script
    waits = [[each for each in script if "dependency" in each] for script in told]
    assert waits[:2] == [[], ["#SBATCH --dependency=afterok:1"]]
    assert waits[2] in (
        ["#SBATCH --dependency=afterok:1:2"],
        ["#SBATCH --dependency=afterok:2:1"],
    )
    assert "#SBATCH --kill-on-invalid-dep=yes" in told[2]


def test_a_node_of_a_job_knows_the_others_and_its_own_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    from rlhf_cli.sweeps.submit import Build, Ended

    variables = {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "1",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begun: list[tuple[Any, int]] = []

    def child(run: Run, text: str, command: str, share: object, rank: int) -> Any:
        begun.append((OmegaConf.create(text).launch, rank))
        return SimpleNamespace(poll=lambda: 1, pid=2**22 + 1)  # a number that no process has

    monkeypatch.setattr(campaign, "child", child)
    node = config.compose(["algo=ppo", "launch=deepspeed", "launch.processes=4"])
    with pytest.raises(Ended, match="code 1"):
        Build(tmp_path, config.freeze(node), "rlhf train", [])()
    ((launch, rank),) = begun
    assert rank == launch.node_rank == 1 and launch.no_ssh
    assert (launch.master_addr, launch.master_port) == ("gpu07", 22345)
    assert Path(launch.hostfile).read_text() == "gpu07 slots=4\ngpu08 slots=4\n"
    config.recipe(OmegaConf.merge(node, {"launch": launch}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "launch.hostfile="),
        (
            ["launch=deepspeed", "launch.processes=16"],
            "hydra.launcher.nodes=2: sft.batch=16 cannot be dealt out evenly to 32 processes",
        ),
    ],
)
def test_a_run_that_cannot_be_dealt_out_to_the_nodes_is_not_submitted(
    tmp_path: Path, words: list[str], said: str
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from rlhf_cli.sweeps.submit import Scheduler

    found = line("hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2")
    crew = Scheduler(found.launcher, tmp_path / "submitit", 256, {})
    made = plan(config.compose([*words, "algo=ppo", f"paths.runs={tmp_path / 'runs'}"]))
    task, *_ = campaign.tasks({"rlhf train algo=ppo": made})
    with pytest.raises(UserError, match=said):
        crew.begin(task, [])


@pytest.mark.parametrize(
    ("said", "slots"),
    [
        ([], None),
        (["launch.slots=3"], 3),
        (["hydra/launcher=joblib"], 16),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=-2"], 15),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=5"], 5),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=5", "launch.slots=2"], 2),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.array_parallelism=7"], 7),
    ],
)
def test_how_many_at_once_is_said_by_slots_or_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, said: list[str], slots: int | None
) -> None:
    from rlhf_cli.sweeps import carry_out

    for plugin in ("hydra_joblib_launcher", "hydra_submitit_launcher"):
        pytest.importorskip(f"hydra_plugins.{plugin}")
    monkeypatch.setattr(carry_out, "cores", lambda: 16)
    found = line(*said)
    (node,) = words.collect(found.words)
    assert carry_out._slots(found.launcher, plan(node)) == slots


# --- the search


SPACE = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=4",
    "algo.optim.lr=tag(log,interval(1e-6,1e-2))",
    "algo.beta=choice(0.05,0.1)",
]


def wanted(*said: str) -> tuple[Search, Space]:
    found = line(*SPACE, *said)
    return search.of(found), words.space(found.words)


def test_a_trial_is_drawn_from_its_range_and_set_on_the_frozen_configuration() -> None:
    pytest.importorskip("optuna")
    asked, _ = wanted("algo=rloo", "seed=3")
    said, values, node = search.ask(asked, [])
    assert 1e-6 <= values["algo.optim.lr"] <= 1e-2 and values["algo.beta"] in ("0.05", "0.1")
    assert said[:2] == ["algo=rloo", "seed=3"]
    made = config.recipe(node)
    assert made.algo.optim.lr == values["algo.optim.lr"] and made.seed == 3
    assert made.algo.beta == float(values["algo.beta"])  # type: ignore[attr-defined]


def test_the_seed_decides_the_trials() -> None:
    pytest.importorskip("optuna")
    first, second = (wanted()[0] for _ in range(2))
    assert search.ask(first, [])[1] == search.ask(second, [])[1]
    other = wanted("hydra.sweeper.sampler.seed=2")[0]
    assert search.ask(other, [])[1] != search.ask(first, [])[1]


def trial(folder: Path, number: int, values: dict[str, Any], **last: float) -> Standing:
    run = Run(folder / "rl" / f"x-{number}")
    finish(run, **last)
    done = Job(words=(), chain=(f"rl/x-{number}",), values=values)
    return Standing(done, run, "done", "", {}, None)


def test_gold_decides_then_the_reward_and_what_is_no_number_is_a_failed_trial(
    tmp_path: Path,
) -> None:
    pytest.importorskip("optuna")
    from optuna.trial import TrialState

    asked, space = wanted()
    values = {"algo.optim.lr": 1e-4, "algo.beta": "0.1"}
    both = trial(tmp_path, 1, values, gold=1.5, reward=9.0)
    proxy = trial(tmp_path, 2, values, reward=2.5)
    broken = trial(tmp_path, 3, values, gold=float("nan"), reward=9.0)
    found = [both, proxy, broken]
    assert [search.objective(asked, each) for each in found] == [1.5, 2.5, None]
    named = wanted("hydra.sweeper.metric=eval/reward")[0]
    assert [search.objective(named, each) for each in found] == [9.0, 2.5, 9.0]
    assert search.best(asked, found) == (proxy.job, 2.5)
    least = wanted("hydra.sweeper.direction=minimize")[0]
    assert search.best(least, found) == (both.job, 1.5)
    study = search._study(asked, space, found)
    assert [each.state for each in study.get_trials()] == [
        TrialState.COMPLETE,
        TrialState.COMPLETE,
        TrialState.FAIL,
    ]


def test_a_search_has_its_trials_one_after_the_other_and_goes_on_with_more(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    seen: list[float] = []

    def execute(chain: Plan, command: str) -> Path:
        path, rate = chain.steps[-1].path, chain.recipe.algo.optim.lr
        if Run(path).status() != "done":
            seen.append(rate)
            finish(Run(path), gold=float("nan") if len(seen) == 2 else rate)
        return path

    monkeypatch.setattr(launch, "execute", execute)
    said = ["train", "-m", *SPACE, "algo=rloo"]
    code, out, err = typed(*said)
    assert (code, err) == (0, "") and len(seen) == len(set(seen)) == 4
    (sweep,) = index.every(Path("runs"))
    best = max(seen[:1] + seen[2:])
    assert f"best: {best:.4g} at algo=rloo algo.optim.lr={best} " in out
    code, _, _ = typed(*said, "hydra.sweeper.n_trials=6")
    assert code == 0 and len(seen) == 6
    assert len(index.load(sweep.path).jobs) == 6
    assert typed(*said)[0] == 0 and len(seen) == 6


def test_a_search_that_was_killed_goes_on_with_the_trial_it_had_begun(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    seen: list[str] = []

    def execute(chain: Plan, command: str) -> Path:
        path = chain.steps[-1].path
        if Run(path).status() == "done":
            return path
        seen.append(path.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        finish(Run(path), gold=1.0)
        return path

    monkeypatch.setattr(launch, "execute", execute)
    said = ["train", "-m", *SPACE]
    code, _, err = typed(*said)
    assert (code, err) == (130, "\ninterrupted: give the same command again to go on.\n")
    assert typed(*said)[0] == 0
    assert seen[1] == seen[2] and len(set(seen)) == 4


# --- for real, in miniature


def begin(folder: Path, *said: str) -> subprocess.Popen[bytes]:
    """The command, with all it starts in one process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    environment.pop("RLHF_RUNS", None)
    with (folder / "said.txt").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_cli", *said],
            cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def built(folder: Path) -> dict[str, int]:
    runs = all_runs(folder / "runs")
    return {stage: sum(run.stage == stage for run in runs) for stage in ("sft", "reward", "rl")}


def done(folder: Path) -> int:
    return sum(run.status() == "done" for run in all_runs(folder / "runs"))


def alive(folder: Path) -> list[int]:
    """Processes that work in the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if Path(os.readlink(place / "cwd")) == folder:
                found.append(int(place.name))
    return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing works any more afterwards."""
    yield tmp_path
    for process in alive(tmp_path):
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize("how", [[], ["launch.slots=2"]], ids=["one by one", "two slots"])
def test_a_sweep_of_12_killed_three_times_ends_whole_with_parents_built_once(
    place: Path, how: list[str], fault: Callable[..., None]
) -> None:
    said = ["train", "-m", "algo=p3o_v2,rloo,ppo", "seed=1,2,3,4", *SMALLEST, *how]
    moments: list[Callable[[], object]] = [
        lambda: list((place / "runs").glob("reward/*/manifest.json")),  # within the reward model
        lambda: done(place) >= 4,
        lambda: done(place) >= 9,
    ]
    finished: dict[str, int] = {}
    for moment in moments:
        child = begin(place, *said)
        wait_for(moment, 600)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        # those in sessions of their own notice that their driver is gone
        wait_for(lambda: not [one for one in alive(place) if one != os.getpid()], 60)
        for run in all_runs(place / "runs"):
            if run.status() == "done":
                at = run.manifest_path.stat().st_mtime_ns
                assert finished.setdefault(run.key, at) == at  # never built again
    ended = rlhf(place, *said, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert built(place) == {"sft": 1, "reward": 1, "rl": 12} and done(place) == 14
    (sweep,) = index.every(place / "runs")
    assert states(sweep) == ["done"] * 12
    assert (sweep.path / "frontier.png").stat().st_size > 100
    fault(
        f"the process group of a sweep of 12 is killed (SIGKILL) three times ({' '.join(how) or 'serial'})",
        "given again, it runs what is missing; the SFT policy and the reward model are built once",
        lost="the steps of the runs under way since their last checkpoint",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20"],
    ],
    ids=["joblib", "submitit_local"],
)
def test_a_launcher_of_hydras_builds_a_sweep_with_parents_once(place: Path, how: list[str]) -> None:
    for plugin in ("hydra_joblib_launcher", "hydra_submitit_launcher"):
        pytest.importorskip(f"hydra_plugins.{plugin}")
    said = ["train", "-m", "algo=p3o_v2,rloo", "seed=1,2", *SMALLEST, *how]
    ended = rlhf(place, *said, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert built(place) == {"sft": 1, "reward": 1, "rl": 4} and done(place) == 6
    assert "4 done of 4" in ended.stdout
    (sweep,) = index.every(place / "runs")
    pickles = list((sweep.path / "submitit").glob("*/*_submitted.pkl"))
    assert len(pickles) == (6 if "submitit_local" in how[0] else 0)  # a job for every run
    commands = {run.manifest()["command"] for run in all_runs(place / "runs")}
    assert all(command.startswith("rlhf train algo=") for command in commands)


@pytest.mark.faults
def test_a_job_of_submitit_that_is_preempted_stops_after_its_step_and_has_another_turn(
    place: Path, fault: Callable[..., None]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    said = [
        "train", "-m", "seed=1,2", *TINY, "track=off", "stage=sft", "sft.epochs=40",
        "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30",
    ]  # fmt: skip
    child = begin(place, *said)

    def learned() -> bool:
        return any(run.metrics_path.exists() for run in all_runs(place / "runs"))

    wait_for(learned, 300)
    tasks = [
        one for one in alive(place)
        if b"submitit.core._submit" in (Path("/proc") / str(one) / "cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(tasks[0], signal.SIGUSR2)
    assert child.wait(timeout=600) == 0, (place / "said.txt").read_text()
    (run,) = all_runs(place / "runs")
    assert (run.status(), run.manifest()["segment"]) == ("done", 2)
    fault(
        "a job of submitit is told that its time is up (SIGUSR2)",
        "its run stops after the step, the job is queued again and goes on",
    )


@pytest.mark.slow
def test_a_signal_to_a_sweep_in_slots_stops_its_runs_after_their_step(place: Path) -> None:
    said = ["train", "-m", "algo=p3o_v2,ppo", "seed=1,2", *SMALLEST, "launch.slots=2"]
    child = begin(place, *said)
    wait_for(lambda: list((place / "runs").glob("sft/*/metrics.jsonl")), 300)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=300) == 75
    assert (
        "runs are done; give the same command again to go on." in (place / "said.txt").read_text()
    )
    assert not [one for one in alive(place) if one != os.getpid()]
    assert not [run for run in all_runs(place / "runs") if run.status() == "failed"]


def test_a_run_ends_with_whoever_began_it(place: Path) -> None:
    """Also by SIGKILL, of which nobody hears."""
    made = plan(config.compose([*TINY, "track=off", "stage=sft", "sft.epochs=1000"]))
    frozen = config.freeze(made.steps[-1].node)
    code = (
        "import sys, time; from pathlib import Path; from rlhf_cli import campaign;"
        " from rlhf_cli.store.run import Run;"
        f"child = campaign.child(Run(Path({str(place / 'runs/sft/x-1')!r})), sys.stdin.read(), 'x', {{}});"
        " print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdin is not None and parent.stdout is not None
    with parent.stdin as pipe:
        pipe.write(frozen)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: child not in alive(place), 120)
