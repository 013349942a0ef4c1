"""Many plans at once: in which order, what a failure and an interrupt leave, and a real one in miniature."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_cli import campaign, gallery, launch
from rlhf_cli.campaign import Task
from rlhf_cli.gallery import Job
from rlhf_cli.plan import Plan, plan
from rlhf_cli.store.run import Run
from rlhf_cli.words import sweep
from tests.conftest import Typed
from tests.fabricated import fabricate
from tests.test_chain import TINY

Children = Callable[[str], None]
"""Take what a child does, a line of Python in which `key`, `log` and `stage` are known."""


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Plan]:
    """Two algorithms that start from one SFT policy and one reward model, and one on other data."""
    monkeypatch.setenv("RLHF_RUNS", str(tmp_path / "runs"))
    words = [["algo=ppo,rloo"], ["algo=dpo", "data=tldr", "eval.proxy=false"]]
    return {f"rlhf train {' '.join(job)}": plan(node) for w in words for job, node in sweep(w)}


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Children:
    """Let children do something else than train."""

    def let(line: str) -> None:
        def child(task: Task, slots: int) -> subprocess.Popen[bytes]:
            run, log = Run(task.step.path), tmp_path / "log"
            run.log.mkdir(parents=True, exist_ok=True)
            facts = (
                f"key, stage, log = {task.step.key!r}, {task.step.stage!r}, open({str(log)!r}, 'a')"
            )
            with (run.log / "console.txt").open("ab") as out:
                return subprocess.Popen(
                    [sys.executable, "-c", f"import sys, time; {facts}; {line}"],
                    stdout=out, stderr=out, start_new_session=True,
                )  # fmt: skip

        monkeypatch.setattr(campaign, "_child", child)

    return let


def quiet() -> tuple[Console, StringIO]:
    text = StringIO()
    return Console(file=text, width=160), text


def test_every_run_is_a_task_once_and_needs_its_parents(plans: dict[str, Plan]) -> None:
    found = campaign.tasks(plans)
    ppo, rloo, dpo = plans.values()
    assert [task.step.stage for task in found] == ["sft", "reward", "sft", "rl", "rl", "rl"]
    assert {task.step.key for task in found} == {
        s.key for each in plans.values() for s in each.steps
    }
    needs = {task.step.key: task.needs for task in found}
    sft, reward, *_ = (step.key for step in ppo.steps)
    assert needs[reward] == {sft}
    assert needs[ppo.steps[-1].key] == needs[rloo.steps[-1].key] == {sft, reward}
    assert needs[dpo.steps[-1].key] == {dpo.steps[0].key}
    commands = {task.step.key: task.command for task in found}
    assert commands[sft] == commands[ppo.steps[-1].key] == "rlhf train algo=ppo"
    assert commands[rloo.steps[-1].key] == "rlhf train algo=rloo"


def test_what_is_done_is_no_task_and_is_needed_by_none(plans: dict[str, Plan]) -> None:
    ppo = next(iter(plans.values()))
    for step in ppo.steps[:2]:
        Run(step.path).begin("", {"key": step.key})
        Run(step.path).finish()
    (words, node), *_ = sweep(["algo=ppo"])
    (task,) = campaign.tasks({" ".join(words): plan(node)})
    assert (task.step.stage, task.needs) == ("rl", frozenset())


@pytest.mark.parametrize("slots", [1, 2])
def test_no_run_begins_before_its_parents_and_no_more_than_slots_at_once(
    plans: dict[str, Plan], children: Children, tmp_path: Path, slots: int
) -> None:
    children("print('+', key, file=log, flush=True); time.sleep(0.3); print('-', key, file=log)")
    console, text = quiet()
    assert campaign.run(plans, slots, console) == []
    needs = {task.step.key: task.needs for task in campaign.tasks(plans)}
    running: set[str] = set()
    done: set[str] = set()
    most = 0
    for line in (tmp_path / "log").read_text().splitlines():
        sign, key = line.split()
        if sign == "+":
            assert needs[key] <= done
            running.add(key)
        else:
            running.remove(key)
            done.add(key)
        most = max(most, len(running))
    assert done == needs.keys() and 1 <= most <= slots
    lines = text.getvalue().splitlines()
    assert len(lines) == 6 and lines[-1].startswith("done 6 of 6: ")


def test_a_failure_keeps_only_what_starts_from_it_from_being_built(
    plans: dict[str, Plan], children: Children
) -> None:
    children("stage == 'reward' and sys.exit('error: the disk is full.')")
    console, text = quiet()
    failures = campaign.run(plans, 2, console)
    ppo, rloo, _ = plans.values()
    reward = ppo.steps[1].path
    assert {(one.path, one.reason) for one in failures} == {
        (reward, "the disk is full."),
        (ppo.steps[-1].path, f"not begun, for want of {reward.name}"),
        (rloo.steps[-1].path, f"not begun, for want of {reward.name}"),
    }
    assert f"failed: {reward}: the disk is full." in text.getvalue()
    assert text.getvalue().count("done ") == 3  # SFT on both data, and DPO


def test_no_run_begins_that_would_end_after_its_time(
    plans: dict[str, Plan], children: Children
) -> None:
    """Half a second each, one after the other, and 1.2 s for all: the third would end at 1.5 s."""
    children("time.sleep(0.5)")
    console, text = quiet()
    assert campaign.run(plans, 1, console, hours=1.2 / 3600) == []
    assert text.getvalue().count("done ") in (1, 2)  # 1 where Python itself starts slowly
    assert campaign.run(plans, 1, console, hours=0.0) == []
    assert text.getvalue().count("done ") in (1, 2)


def test_an_interrupt_ends_the_children(
    plans: dict[str, Plan], children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    children("time.sleep(600)")
    begun: list[subprocess.Popen[bytes]] = []
    stop = campaign._stop

    def watched(running: list[subprocess.Popen[bytes]]) -> None:
        begun.extend(running)
        stop(begun)

    class Clock:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def sleep(seconds: float) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "_stop", watched)
    monkeypatch.setattr(campaign, "time", Clock)
    with pytest.raises(KeyboardInterrupt):
        campaign.run(plans, 2, quiet()[0])
    assert len(begun) == 2 and all(child.returncode is not None for child in begun)


def test_a_child_that_ignores_an_interrupt_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "GRACE_SECONDS", 0.5)
    line = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        " print(1, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", line], stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None and child.stdout.readline() == b"1\n"
    campaign._stop([child])
    assert child.returncode == -9


def test_interrupted_the_verb_says_how_to_go_on(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run", interrupted)
    code, _, err = typed("figure", "etpo", "--run")
    assert (code, err) == (130, "\ninterrupted: give the same command again to go on.\n")


def test_failures_are_listed_at_the_end_and_what_is_there_is_drawn(
    typed: Typed, children: Children
) -> None:
    children("sys.exit('error: 13 brings bad luck.')")
    jobs = gallery.exhibits(["etpo"])[0].jobs

    def course(job: Job, share: float) -> dict[str, float]:
        return {"kl": share, "reward": share, "gold": share, "length": 20}

    fabricate(jobs[1:], course)
    code, out, err = typed("figure", "etpo", "--run", "--slots", "2")
    first = jobs[0].plan.steps
    assert code == 1 and "etpo.png" not in out
    assert err == (
        "error: 2 runs failed:\n"
        f"  {first[0].path}: 13 brings bad luck.\n"
        f"  {first[-1].path}: not begun, for want of {first[0].path.name}\n"
    )


MINIATURE = """
title: In miniature
source: Nobody 2026
claim: The proxy rises and gold falls.
draw: rlhf_cli.figures.kinds.overoptimisation.draw
prepare: rlhf_cli.best_of.prepare
options: {draws: 8, best_of: [1, 2, 4, 8]}
panels:
  all:
    nano: ["algo=p3o_v2,rloo seed=1"]
    paper: ["algo=p3o_v2,rloo seed=1"]
"""


def test_a_figure_is_made_from_nothing_by_one_command_and_then_redrawn(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "figure").mkdir(parents=True)
    (tmp_path / "conf" / "figure" / "miniature.yaml").write_text(MINIATURE)
    monkeypatch.setattr(gallery, "conf_dir", lambda: tmp_path / "conf")
    words = ["figure", "miniature", *TINY, "eval.points=4", "algo.optim.lr=0.01", "track=off"]
    code, out, err = typed(*words, "--run", "--slots", "2")
    assert (code, err) == (0, ""), out
    assert [out.count(f"runs/{stage}/") for stage in ("sft", "reward", "rl")] == [1, 1, 2]
    assert "done 4 of 4: " in out and "\nfigure: figures/miniature.png" in out
    (rloo,) = (tmp_path / "runs" / "rl").glob("rloo*")
    # the shell's words for this run alone, and all that it had to say
    assert Run(rloo).manifest()["command"].startswith("rlhf train algo=rloo seed=1 model.scratch")
    assert "rloo  8/8" in (rloo / "log" / "console.txt").read_text()

    def executed(*_: object) -> None:
        raise AssertionError("something is trained again")

    monkeypatch.setattr(launch, "execute", executed)
    monkeypatch.setattr(campaign, "_child", executed)
    assert typed(*words)[0] == 0
    assert typed(*words, "--run")[0] == 0
