"""Runs read prompt by prompt, gathered into curves, and averaged over prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from rlhf_cli.errors import UserError
from rlhf_cli.evals import curves as module
from rlhf_cli.evals.curves import Curve, Means, curves, mean_of_known, means
from rlhf_cli.store.run import Run
from tests.test_store import ROWS, a_run

PROMPTS = ("Human: Hi", "Human: Why?", "Human: How?")


def a_path(
    kl: ArrayLike,
    reward: ArrayLike,
    gold: ArrayLike | None = None,
    *,
    seed: int = 1,
    setting: str = "ppo",
    prompts: Sequence[str] | None = None,
) -> module.Path:
    """A run by its arrays [K,N]; without gold, gold is nan."""
    kl, reward = (np.array(x, dtype=np.float64) for x in (kl, reward))
    steps = np.arange(len(kl)) * 5
    return module.Path(
        key=f"{setting}-{seed}",
        algo=setting.split()[0],
        seed=seed,
        beta=None,
        setting=setting,
        step=steps,
        episodes=steps * 128,
        kl=kl,
        reward=reward,
        gold=np.full_like(kl, np.nan) if gold is None else np.array(gold, dtype=np.float64),
        length=np.full_like(kl, 12.0),
        prompts=tuple(prompts or (f"prompt {i}" for i in range(kl.shape[1]))),
    )


def a_curve(*paths: module.Path, name: str | None = None) -> Curve:
    """Runs as one curve, called by the setting of the first."""
    return Curve(name or paths[0].setting, paths[0].algo, paths)


def sampled(run: Run, prompts: Sequence[str] = PROMPTS, **columns: Any) -> Run:
    """The run with samples at each of its evaluations: kl is step + place of the prompt."""
    for step, *_ in ROWS:
        rows = [
            {"prompt": prompt, "response": " Yes.", "kl": step + i, "length": 4.0, "ended": 1.0}
            | {name: column[i] for name, column in columns.items()}
            for i, prompt in enumerate(prompts)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run.samples / f"{step:06d}.jsonl").write_text(text)
    return run


def test_a_run_becomes_arrays_of_evaluations_by_prompts(tmp_path: Path) -> None:
    run = sampled(a_run(tmp_path, "ppo", seed=7), score=[1.0, None, 3.0], gold=[-1.0, 0.0, 0.5])
    (curve,) = curves([run])
    (path,) = curve.paths
    assert (curve.name, curve.algo) == ("ppo", "ppo")
    assert (path.key, path.algo, path.seed, path.beta) == (run.key, "ppo", 7, 0.1)
    assert path.prompts == PROMPTS
    assert path.step.tolist() == [0, 5, 10]
    assert path.episodes.tolist() == [0, 640, 1280]
    assert path.kl.tolist() == [[0.0, 1.0, 2.0], [5.0, 6.0, 7.0], [10.0, 11.0, 12.0]]
    assert path.reward[2, [0, 2]].tolist() == [1.0, 3.0] and np.isnan(path.reward[:, 1]).all()
    assert path.gold[1].tolist() == [-1.0, 0.0, 0.5]
    assert path.length.tolist() == [[4.0] * 3] * 3


def test_a_column_that_no_row_has_is_nan(tmp_path: Path) -> None:
    (curve,) = curves([sampled(a_run(tmp_path, "ppo", seed=1))])
    (path,) = curve.paths
    assert np.isnan(path.reward).all() and np.isnan(path.gold).all()
    assert path.gold.shape == (3, 3)


def test_by_setting_seeds_are_one_curve_and_by_algo_a_sweep_is(tmp_path: Path) -> None:
    def one(algo: str, seed: int, hyper: Mapping[str, Any]) -> Run:
        return sampled(a_run(tmp_path, algo, seed=seed, hyper=hyper, beta=hyper["beta"]))

    runs = [one("ppo", seed, {"beta": beta}) for beta in (0.1, 0.2) for seed in (1, 2)]
    runs += [one("dpo", 1, {"beta": 0.1})]
    by_setting = {c.name: [(p.seed, p.beta) for p in c.paths] for c in curves(runs)}
    assert by_setting == {
        "dpo": [(1, 0.1)],
        "ppo beta=0.1": [(1, 0.1), (2, 0.1)],
        "ppo beta=0.2": [(1, 0.2), (2, 0.2)],
    }
    dpo, ppo = curves(runs, by="algo")
    assert (dpo.name, ppo.name, len(ppo.paths)) == ("dpo", "ppo", 4)
    assert [p.setting for p in ppo.paths] == ["ppo beta=0.1"] * 2 + ["ppo beta=0.2"] * 2


def test_a_run_named_twice_counts_once_and_other_stages_do_not(tmp_path: Path) -> None:
    run = sampled(a_run(tmp_path, "ppo", seed=1))
    (curve,) = curves([run, run, a_run(tmp_path, "ppo", seed=2, stage="sft")])
    assert len(curve.paths) == 1


@pytest.mark.parametrize(
    "prompts", [PROMPTS[:2], PROMPTS[::-1], ("Human: Hi", "Human: Why?", "Human: Who?")]
)
def test_runs_that_were_asked_different_prompts_are_refused(
    tmp_path: Path, prompts: Sequence[str]
) -> None:
    first = sampled(a_run(tmp_path, "dpo", seed=1))
    other = sampled(a_run(tmp_path, "ppo", seed=1), prompts)
    with pytest.raises(UserError) as refusal:
        curves([first, other])
    assert str(refusal.value) == (
        f"{first.path.name} and {other.path.name} were asked different prompts at their evaluations;"
        " name runs with the same data and eval.prompts."
    )


def test_missing_samples_are_named_with_the_fix(tmp_path: Path) -> None:
    run = sampled(a_run(tmp_path, "ppo", seed=1))
    lost = run.samples / "000005.jsonl"
    lost.unlink()
    with pytest.raises(UserError) as refusal:
        curves([run])
    assert str(refusal.value) == (
        f"{lost} is missing, without which nothing is known of single prompts; copy the folder"
        f" samples of {run.path.name} back, or leave the run out."
    )


def test_means_leave_out_what_is_missing_and_fill_a_shorter_run_with_nan() -> None:
    long = a_path([[0, 0], [1, 3]], [[1.0, math.nan], [2.0, 4.0]])
    short = a_path([[0, 2]], [[math.nan, math.nan]])
    mean = means(a_curve(long, short))
    np.testing.assert_array_equal(mean.kl, [[0, 2], [1, math.nan]])
    np.testing.assert_array_equal(mean.reward, [[1, 3], [math.nan, math.nan]])
    assert np.isnan(mean.gold).all()
    np.testing.assert_array_equal(mean.length, [[12, 12], [12, math.nan]])


def test_weights_count_prompts_as_often_as_they_say() -> None:
    curve = a_curve(a_path([[0, 0, 0], [1, 2, 6]], [[1.0, 2.0, 3.0], [1.0, math.nan, 4.0]]))
    mean = means(curve, np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 3.0, 0.0]]))
    assert mean.kl.shape == (3, 1, 2)
    assert mean.kl[:, 0, 1].tolist() == pytest.approx([3, 10 / 3, 2], abs=1e-12)
    np.testing.assert_allclose(mean.reward[:, 0, 1], [2.5, 4, math.nan], atol=1e-12)


def test_a_curve_without_one_of_its_runs_keeps_the_others() -> None:
    one, two = np.array([[1.0]]), np.array([[2.0]])
    both = Means(*[np.concatenate([one, two])] * 4)
    assert both.without(0).kl.tolist() == [[2.0]] and both.without(1).gold.tolist() == [[1.0]]


def test_the_mean_of_nothing_known_is_nan() -> None:
    values = np.array([[1.0, math.nan, 3.0], [math.nan] * 3])
    np.testing.assert_array_equal(mean_of_known(values), [2.0, math.nan])
    np.testing.assert_array_equal(mean_of_known(values, axis=0), [1.0, math.nan, 3.0])
