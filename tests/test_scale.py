"""docs/scale.md and the schedulers' files: the tables are those of the code, and every command composes."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from rlhf_cli.config import Recipe, compose, recipe
from rlhf_cli.hosts import slots
from tests.conftest import ROOT
from tests.test_docs import commands

PAGE = "docs/scale.md"
SCRIPT = ROOT / "scripts" / "slurm_multi.sh"
MANIFEST = ROOT / "scripts" / "kubernetes.yaml"
ERROR = re.compile(r"[+-]\d+%")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """scripts/scale.py."""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "scripts" / "scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def made(words: list[str]) -> Recipe:
    """What `rlhf train` and these words would run."""
    assert words[:2] in (["rlhf", "train"], ["rlhf", "plan"])
    return recipe(compose(words[2:]))


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the page's hostfile."""
    text = (ROOT / PAGE).read_text()
    (block,) = re.findall(r"`hosts`:\n\n```\n(.*?)```", text, re.DOTALL)
    (tmp_path / "hosts").write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the page


def test_the_tables_of_the_page_are_those_that_the_code_makes(scale: ModuleType) -> None:
    page = (ROOT / PAGE).read_text()
    tables = scale.tables()
    assert all(f"<!-- {name} -->" in page for name in tables)
    assert scale.filled(page, tables) == page


def test_published_runs_took_as_much_longer_as_the_page_says() -> None:
    page = (ROOT / PAGE).read_text()
    taken: dict[str, list[float]] = {}
    for name in "deepspeed-chat", "openrlhf":
        (block,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
        taken[name] = [1 / (1 + int(found[:-1]) / 100) for found in ERROR.findall(block)]
    assert (len(taken["deepspeed-chat"]), len(taken["openrlhf"])) == (9, 8)
    # "about twice as long on one host, up to eight times as long on four"
    assert all(1.7 <= times <= 2.6 for times in taken["deepspeed-chat"])
    assert max(taken["openrlhf"]) == pytest.approx(8, abs=0.5) and min(taken["openrlhf"]) > 1


def test_what_has_no_marker_stays(scale: ModuleType) -> None:
    page = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    expected = "a\n<!-- x -->\n| 1 |\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    assert scale.filled(page, {"x": "| 1 |", "z": "nowhere"}) == expected


@pytest.mark.parametrize("line", commands(PAGE, "rlhf"))
def test_every_command_of_the_page_composes(line: str, hosts: Path) -> None:
    made(shlex.split(line))


def test_what_sbatch_is_given_composes(hosts: Path) -> None:
    for line in commands(PAGE, "sbatch"):
        words = shlex.split(line)
        made(words[words.index("rlhf") :])


def test_include_and_exclude_mean_what_the_page_says(hosts: Path) -> None:
    lines = [shlex.split(line) for line in commands(PAGE, "rlhf") if "clude=" in line]
    include, exclude = (slots(made(words).launch) for words in lines)
    assert (include, exclude) == ({"worker-0": 8, "worker-1": 8}, {"worker-0": 8})


# --- SLURM


def test_the_scripts_are_bash(root: Path) -> None:
    for name in "slurm.sh", "slurm_multi.sh":
        done = subprocess.run(["bash", "-n", root / "scripts" / name], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")


def test_shellcheck_has_nothing_to_say(root: Path) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool is not None
    done = subprocess.run(
        [tool, *sorted((root / "scripts").glob("*.sh"))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def allotted(folder: Path, *command: str, nodes: int = 2) -> tuple[int, list[list[str]], str]:
    """The script in a job of so many nodes: its code, the words of each command, what SLURM was asked."""
    stubs = folder / "stubs"
    stubs.mkdir()
    names = " ".join(f"node{rank}" for rank in range(nodes))
    # srun counts the nodes that it was given from 0, and runs the command on each.
    bodies = {
        "scontrol": f'[ "$1" = show ] && printf "%s\\n" {names} || echo "$*" >>"{folder}/asked"',
        "srun": 'echo "$1 $2" >>asked; shift 3\n'
        'for n in $(seq 2 $NODES); do SLURM_NODEID=$((n - 2)) "$@"; done',
        "rlhf": 'printf "%s\\n" "$*" >>said; exit "${CODE:-0}"',
    }
    for name, body in bodies.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-9]", "SLURM_GPUS_ON_NODE": "4", "NODES": str(nodes),
        "CODE": command[0],
    }  # fmt: skip
    done = subprocess.run(
        ["bash", SCRIPT, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    said = folder / "said"
    lines = said.read_text().splitlines() if said.exists() else []
    asked = folder / "asked"
    return (
        done.returncode,
        [line.split() for line in lines],
        asked.read_text() if asked.exists() else "",
    )


TRAIN = ["rlhf", "train", "algo=ppo", "model=pythia_6_9b", "launch.zero=2"]


def test_each_node_gives_the_same_command_with_its_own_rank(tmp_path: Path) -> None:
    code, said, asked = allotted(tmp_path, "0", *TRAIN, nodes=2)
    assert (code, asked) == (0, "--relative=1 --nodes=1\n")
    launches = [made(["rlhf", *words]).launch for words in said]
    assert sorted(launch.node_rank or 0 for launch in launches) == [0, 1]
    for launch in launches:
        assert slots(launch) == {"node0": 4, "node1": 4}
        assert (launch.no_ssh, launch.master_addr) == (True, "node0")
        assert launch.master_port == 20000 + 4711


def test_one_node_needs_no_srun(tmp_path: Path) -> None:
    code, said, asked = allotted(tmp_path, "0", *TRAIN, nodes=1)
    assert (code, len(said), asked) == (0, 1, "")


@pytest.mark.parametrize(("code", "requeued"), [("75", "requeue 4711\n"), ("2", "")])
def test_a_job_goes_back_into_the_queue_if_its_run_goes_on(
    code: str, requeued: str, tmp_path: Path
) -> None:
    found, _, asked = allotted(tmp_path, code, *TRAIN, nodes=1)
    assert (found, asked) == (int(code), requeued)


def test_without_a_command_the_script_says_how_it_is_used(tmp_path: Path) -> None:
    assert allotted(tmp_path, "0")[:2] == (2, [])


# --- Kubernetes


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    """Its documents by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}


def test_the_manifest_is_what_the_schema_of_the_api_allows(
    manifest: dict[str, dict[str, Any]],
) -> None:
    for each in manifest.values():
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_has_what_the_api_requires(manifest: dict[str, dict[str, Any]]) -> None:
    service, job = manifest["Service"], manifest["Job"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    # Names of an indexed Job's pods need a headless Service of the pods' subdomain.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    # A podFailurePolicy is for pods that are not started again in place.
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert {"name", "image"} <= container.keys()
    assert {each["name"] for each in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }
    assert all(len(volume) == 2 for volume in pod["volumes"])


def test_pods_that_stopped_are_replaced_and_mistakes_end_the_job(
    manifest: dict[str, dict[str, Any]],
) -> None:
    rules = manifest["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"] for rule in rules}
    name = manifest["Job"]["spec"]["template"]["spec"]["containers"][0]["name"]
    assert {action: found["values"] for action, found in codes.items()} == {
        "Ignore": [75],
        "FailJob": [2],
    }
    assert all((c["operator"], c["containerName"]) == ("In", name) for c in codes.values())


def test_the_command_of_every_pod_composes(
    manifest: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    spec = manifest["Job"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    name, domain = manifest["Job"]["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    pods = [f"{name}-{index}.{domain}" for index in range(spec["completions"])]
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{pod} slots={gpus}\n" for pod in pods))
    for index in range(spec["completions"]):
        done = subprocess.run(
            [*container["command"], container["args"][0].replace("exec ", "echo ")],
            env={"JOB_COMPLETION_INDEX": str(index), "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        launch = made(done.stdout.replace("/etc/rlhf/hosts", str(hosts)).split()).launch
        assert (launch.node_rank, launch.master_addr) == (index, pods[0])
        assert slots(launch) == dict.fromkeys(pods, gpus)
