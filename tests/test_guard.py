"""Numbers that go wrong: steps that are left out, KL that runs away, and what is done about either."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlhf_cli import recipes
from rlhf_cli.engine import masters
from rlhf_cli.engine.learner import Judged, Learner
from rlhf_cli.engine.world import start
from rlhf_cli.errors import UserError
from rlhf_cli.plan import plan
from rlhf_cli.stages.guard import Guard
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.checkpoint_script import CASES, learner
from tests.test_chain import TINY, rlhf

SMALL = [*TINY, "algo=ppo", "track=off", "eval.points=1"]


def stepped(one: Learner, seed: int, factor: float) -> dict[str, float]:
    """A step on rows of their own; factor: on the loss."""
    rows = torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))
    rows = rows.to(next(one.engine.module.parameters()).dtype)

    def judge(part: torch.Tensor) -> Judged:
        loss = one.engine(part).float().pow(2).mean(-1)[:, None, None] * factor
        return Judged({"policy": loss}, {}, torch.ones_like(loss), {1: 4.0, 2: 4.0, 3: 4.0})

    return one.step([rows], judge)


def digest(one: Learner) -> str:
    sha = hashlib.sha256()
    for name, tensor in masters.gathered(one.engine, one.launch.zero):
        sha.update(name.encode() + tensor.float().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("zero, precision, offload", CASES)
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_whose_gradient_is_no_number_is_left_out_and_changes_nothing(
    zero: int, precision: str, offload: str, factor: float, fault: Callable[..., None]
) -> None:
    world = start(60)
    sick, twin = (learner(world, zero, precision, offload, 0) for _ in range(2))
    assert stepped(sick, 1, 1.0)["skipped"] == stepped(twin, 1, 1.0)["skipped"] == 0
    before = digest(sick)
    assert before == digest(twin)
    found = stepped(sick, 2, factor)
    assert found["skipped"] == 1 and not math.isfinite(found["grad_norm"])
    assert digest(sick) == before
    twin.step_index += 1  # the schedule goes on
    assert stepped(sick, 3, 1.0)["skipped"] == stepped(twin, 3, 1.0)["skipped"] == 0
    assert digest(sick) == digest(twin) != before
    if (zero, precision, offload, factor) == (0, "fp32", "none", math.nan):
        fault(
            "a loss or gradient that is NaN or infinite",
            "step left out, weights as before",
            "1 step",
        )


def guarded(said: list[str], **rule: Any) -> Guard:
    return Guard(recipes.Guard(**{"skips": 2, "kl": 10.0, "action": "warn", **rule}), said.append)


def at(step: int) -> Learner:
    return cast(Learner, SimpleNamespace(step_index=step, ease=1.0))


def test_skipped_steps_are_counted_and_one_too_many_ends_the_run(
    fault: Callable[..., None],
) -> None:
    said: list[str] = []
    guard = guarded(said)
    for step in (3, 5):
        assert not guard.after({"loss": math.nan, "skipped": 1.0}, at(step))
    assert said == [
        f"step {step}: the gradient is no number (loss nan); the step is left out ({n} of at most 2)."
        for n, step in enumerate((3, 5), 1)
    ]
    assert guard.row(at(5)) == {"guard/skipped": 2, "guard/rate": 1.0}
    with pytest.raises(UserError) as ended:
        guard.after({"loss": math.inf, "skipped": 1.0}, at(9))
    assert str(ended.value) == (
        "step 9: the gradient is no number (loss inf), 3 times in this run, and guard.skips=2: the run"
        " diverged; lower the learning rate or raise beta (the last checkpoint is kept)."
    )
    fault(
        "more such steps than guard.skips",
        "the run ends with the count, exit 2",
        "the steps since the last checkpoint",
    )


def test_a_loss_that_is_no_number_though_its_gradient_is_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"^the loss is nan at step 4: the run diverged; .*\.$"):
        guarded([]).after({"loss": math.nan, "skipped": 0.0}, at(4))


def test_a_checkpoint_holds_what_a_guard_has_counted() -> None:
    guard, one = guarded([], action="back_off"), at(7)
    guard.after({"loss": math.nan, "skipped": 1.0}, one)
    guard.kl(20.0, one)
    again, other = guarded([]), at(0)
    again.restore(guard.state(one), other)
    assert (again.skipped, again.said, other.ease) == (1, 20.0, 0.5)


def test_a_kl_is_spoken_of_again_when_it_has_grown_by_half() -> None:
    said: list[str] = []
    guard, one = guarded(said), at(4)
    for kl in (9.0, 11.0, 16.0, 17.0, 12.0):
        guard.kl(kl, one)
    assert said == [
        "step 4: the KL to the SFT policy is 11 nats (guard.kl=10); raise algo.beta.",
        "step 4: the KL to the SFT policy is 17 nats (guard.kl=10); raise algo.beta.",
    ]
    guarded(said, kl=None).kl(1e9, one)
    assert len(said) == 2


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the SFT policy, the reward model and an undisturbed run."""
    folder = tmp_path_factory.mktemp("guard")
    done = rlhf(folder, "train", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def trained(parents: Path, folder: Path, *words: str) -> tuple[int, str, Run]:
    shutil.copytree(parents / "runs", folder / "runs", ignore=lambda at, names: {"rl"} & {*names})
    done = rlhf(folder, "train", *SMALL, *words)
    (path,) = (folder / "runs" / "rl").iterdir()
    return done.returncode, done.stdout + done.stderr, Run(path)


def numbers(run: Run) -> list[dict[str, float]]:
    timed = ("perf/", "wall", "budget/seconds", "guard/")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read(run.metrics_path)
    ]


def test_a_warning_changes_no_number_and_no_key(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    code, said, run = trained(parents, tmp_path, "guard.kl=0.0001")
    (twin,) = map(Run, (parents / "runs" / "rl").iterdir())
    assert code == 0 and run.key == twin.key and numbers(run) == numbers(twin)
    assert (
        "warning: step 4: the KL to the SFT policy is 0 nats (guard.kl=0.0001); raise algo.beta."
        in said
    )
    fault("the KL runs away, guard.action=warn", "said with step and KL; the run goes on")


def test_backing_off_halves_the_rates_and_is_in_the_key(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    code, said, run = trained(parents, tmp_path, "guard.kl=0.0001", "guard.action=back_off")
    (twin,) = map(Run, (parents / "runs" / "rl").iterdir())
    assert code == 0 and run.key != twin.key
    assert "learning rates are 0.5 of their schedule from now on." in said
    ours, theirs = read(run.metrics_path), read(twin.metrics_path)
    rates = [row.get("guard/rate", 1.0) for row in ours]
    assert rates[0] == 1 and rates[-1] < 1
    for before, row, plain in zip(rates, ours[1:], theirs[1:], strict=False):
        assert row["train/lr"] == pytest.approx(before * plain["train/lr"])
    fault(
        "the KL runs away, guard.action=back_off", "learning rates halved; said, logged, in the key"
    )


def test_a_run_that_is_to_stop_at_a_runaway_says_what_to_do(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    code, said, run = trained(parents, tmp_path, "guard.kl=0.0001", "guard.action=stop")
    assert code == 2 and run.status() == "failed"
    assert said.splitlines()[-1] == (
        "error: step 4: the KL to the SFT policy is 0 nats (guard.kl=0.0001), and guard.action=stop; raise"
        " algo.beta or lower algo.optim.lr, or go on with guard.action=warn."
    )
    fault(
        "the KL runs away, guard.action=stop",
        "the run ends with one sentence, exit 2",
        "the steps since the last checkpoint",
    )


def test_a_learning_rate_that_breaks_the_weights_ends_the_run_before_they_are_saved(
    parents: Path, tmp_path: Path, fault: Callable[..., None]
) -> None:
    code, said, run = trained(
        parents, tmp_path, "algo.optim.lr=1e30", "algo.critic_lr=1e30", "guard.skips=1"
    )
    assert code == 2 and "the run diverged" in said and "Traceback" not in said
    assert run.status() == "failed" and not run.final.exists()
    fault("a learning rate of 1e30", "ends after guard.skips steps, no final model, exit 2")


def test_only_backing_off_is_in_a_key() -> None:
    from rlhf_cli.config import compose

    keys = {
        words: plan(compose(["algo=ppo", *words])).steps[-1].key
        for words in ((), ("guard.skips=7",), ("guard.action=stop",), ("guard.action=back_off",))
    }
    assert len({keys[()], keys[("guard.skips=7",)], keys[("guard.action=stop",)]}) == 1
    assert keys[("guard.action=back_off",)] != keys[()]
