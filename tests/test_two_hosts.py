"""Two hosts: network namespaces of this machine with names and addresses of their own, and one cable.

Both see the same folders, as hosts of a cluster do. Needs root and iproute2.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_cli.config import compose, freeze
from rlhf_cli.plan import plan
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import TINY

pytestmark = pytest.mark.slow

PATIENCE = 20
"""Of a run, in seconds without word from a peer."""
WORDS = [
    "train", *TINY, "algo=p3o_v2", "track=off", "launch=deepspeed", f"launch.timeout={PATIENCE}",
    # Where all scores are equal, what is learned from is rounding, which sharding changes.
    "checkpoint.every=1", "reward.unended=null",
]  # fmt: skip
SHELL = """#!{python}
# Stands in for ssh and pdsh: enters the host instead of asking for a login there.
import os, shlex, subprocess, sys
words, hosts = sys.argv[1:], []
if os.path.basename(sys.argv[0]) == "pdsh":
    while words[0].startswith("-"):
        option = words.pop(0)
        if option == "-w":
            hosts = words.pop(0).split(",")
        elif option == "-f":
            words.pop(0)
else:
    while words[0].startswith("-"):
        words = words[2:]
    hosts = [words.pop(0)]
with open(sys.argv[0] + ".asked", "a") as asked:
    asked.write(" ".join(hosts))
children = [
    subprocess.Popen(
        ["ip", "netns", "exec", host, "env", "-i", "PATH=" + os.environ["PATH"], "HOME=/root",
         "unshare", "--uts", "sh", "-c",
         "hostname " + host + "; " + " ".join(words).replace("%n", str(place))]
    )
    for place, host in enumerate(hosts)
]
sys.exit(max(child.wait() for child in children))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Hosts:
    """Two of them."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def start(
        self, place: int, folder: Path, *words: str, **variables: str
    ) -> subprocess.Popen[str]:
        """Runs Python with these words on one host, in a session of its own."""
        name = self.names[place]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **variables}
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RLHF_RUNS"):
            environment.pop(variable, None)
        script = f"hostname {name} && exec {shlex.join([sys.executable, *words])}"
        return subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script],
            cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def train(self, folder: Path, zero: int) -> list[subprocess.Popen[str]]:
        """The same command on both."""
        (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in self.names))
        words = [
            *WORDS, f"launch.zero={zero}", "launch.hostfile=hosts", "launch.no_ssh=true",
            f"launch.master_addr={self.addresses[0]}", "launch.master_port=29700",
        ]  # fmt: skip
        line = ["-m", "rlhf_cli", *words]
        return [self.start(at, folder, *line, f"launch.node_rank={at}") for at in (0, 1)]

    def cable(self, state: str) -> None:
        """Plugs it in (up) or out (down)."""
        ip("netns", "exec", self.names[1], "ip", "link", "set", "eth0", state)

    def kill(self, place: int) -> None:
        """Everything that runs there, at once."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.names[place]], check=True, capture_output=True, text=True
        )
        for pid in listed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("NOT TESTED on two hosts: making them needs root and iproute2")
    names = (f"alpha{os.getpid()}", f"beta{os.getpid()}")
    addresses = ("10.77.0.1", "10.77.0.2")
    known = "127.0.0.1 localhost\n" + "".join(
        f"{address} {name}\n" for name, address in zip(names, addresses, strict=True)
    )
    made = Hosts(names, addresses)
    try:
        for name in names:
            ip("netns", "add", name)
            (Path("/etc/netns") / name).mkdir(parents=True)
            (Path("/etc/netns") / name / "hosts").write_text(known)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            names[1],
        )
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for place, name in enumerate(names):
            made.kill(place)
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def ended(children: list[subprocess.Popen[str]], within: float) -> list[tuple[int, str]]:
    """How they left, and what they had said."""
    until = time.monotonic() + within
    said = [child.communicate(timeout=max(1, until - time.monotonic()))[0] for child in children]
    return [(child.returncode, text) for child, text in zip(children, said, strict=True)]


def losses(folder: Path) -> dict[str, list[float]]:
    """Of every stage, step by step."""
    return {
        path.parent.name: [
            row["train/loss"] for row in read(path / "metrics.jsonl") if "train/loss" in row
        ]
        for path in sorted((folder / "runs").glob("[a-z]*/*"))
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of both workers on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cli", *WORDS, "launch.processes=2", "launch.zero=2"],
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder)


def same(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    assert ours.keys() == theirs.keys() == {"sft", "reward", "rl"}
    for stage in ours:
        assert len(ours[stage]) > 3
        assert theirs[stage] == pytest.approx(ours[stage], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_hosts_learn_what_two_processes_of_one_host_learn(
    hosts: Hosts, together: dict[str, list[float]], tmp_path: Path, zero: int
) -> None:
    for code, said in ended(hosts.train(tmp_path, zero), within=600):
        assert code == 0, said
    same(together, losses(tmp_path))


def test_one_command_starts_the_workers_of_both_hosts(
    hosts: Hosts, together: dict[str, list[float]], tmp_path: Path
) -> None:
    for program in ("ssh", "pdsh"):
        (tmp_path / program).write_text(SHELL.format(python=sys.executable))
        (tmp_path / program).chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    words = ["-m", "rlhf_cli", *WORDS, "launch.zero=2", "launch.hostfile=hosts"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ((code, said),) = ended([hosts.start(0, tmp_path, *words, PATH=path)], within=600)
    assert code == 0, said
    same(together, losses(tmp_path))
    assert " ".join(hosts.names) in (tmp_path / "pdsh.asked").read_text()


JOB = """
import sys
from pathlib import Path
from rlhf_cli.sweeps.submit import Build
Build(Path(sys.argv[1]), Path(sys.argv[2]).read_text(), "rlhf train", [])()
"""


def test_a_job_of_two_nodes_learns_on_both(
    hosts: Hosts, together: dict[str, list[float]], tmp_path: Path
) -> None:
    """A sweep's job as SLURM would start it: a task on each node, with SLURM's variables."""
    pytest.importorskip("submitit")
    words = [*WORDS[1:], "stage=sft", "launch.processes=1", f"paths.runs={tmp_path / 'runs'}"]
    (step,) = plan(compose(words)).steps
    (tmp_path / "config.yaml").write_text(freeze(step.node))
    job = {
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9700", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": ",".join(hosts.names),
    }  # fmt: skip
    line = ["-c", JOB, str(step.path), str(tmp_path / "config.yaml")]
    children = [
        hosts.start(at, tmp_path, *line, **job, SLURM_NODEID=str(at), SLURM_PROCID=str(at))
        for at in (0, 1)
    ]
    for code, said in ended(children, within=600):
        assert code == 0, said
    assert losses(tmp_path)["sft"] == pytest.approx(together["sft"], rel=1e-5)


@pytest.mark.parametrize("how", ["cable", "host"])
def test_a_host_that_is_lost_ends_the_run_and_the_same_command_goes_on(
    hosts: Hosts, together: dict[str, list[float]], tmp_path: Path, how: str
) -> None:
    children = hosts.train(tmp_path, zero=2)
    _until_the_first_checkpoint(tmp_path)
    hosts.cable("down") if how == "cable" else hosts.kill(1)
    survivors = children if how == "cable" else children[:1]
    # Noticed by the watch on each process, said by the driver; what is left is ended by force.
    for code, said in ended(survivors, within=PATIENCE + 60):
        assert code == 1, said
        assert "the same command" in said and "go on from the last checkpoint" in said
    (lost,) = (tmp_path / "runs" / "rl").iterdir()
    assert Run(lost).status() in ("failed", "interrupted")
    if how == "cable":
        hosts.cable("up")
    for code, said in ended(hosts.train(tmp_path, zero=2), within=600):
        assert code == 0, said
    same(together, losses(tmp_path))


def _until_the_first_checkpoint(folder: Path) -> None:
    """Of the last stage."""
    until = time.monotonic() + 600
    while not list((folder / "runs").glob("rl/*/checkpoints/[0-9]*")):
        assert time.monotonic() < until
        time.sleep(0.2)
