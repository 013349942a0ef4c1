"""The frontier figure: its numbers, its files, what it refuses, and what it does without."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rlhf_cli.errors import UserError
from rlhf_cli.evals.table import points
from rlhf_cli.figures.frontier import draw, frontier
from rlhf_cli.figures.style import look, shade
from rlhf_cli.store.run import Run
from tests.test_store import a_run

ALGOS = ("p3o_v2", "p3o_v1", "ppo", "dpo_online")


def campaign(root: Path) -> list[Run]:
    """Four algorithms, two seeds each, five evaluations per run; the reward is KL / 2 + seed."""
    return [
        a_run(
            root,
            algo,
            seed=seed,
            gold=True,
            rows=[
                (step, step * (1.0 + place), step * (1.0 + place) / 2 + seed) for step in range(5)
            ],
        )
        for place, algo in enumerate(ALGOS)
        for seed in (1, 2)
    ]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_eight_runs_give_40_points_20_means_and_4_lines_of_slope_one_half(tmp_path: Path) -> None:
    files = frontier(campaign(tmp_path), tmp_path / "out" / "hh", "rlhf frontier --group hh")
    assert {kind: path.name for kind, path in files.items()} == {
        "png": "hh.png",
        "pdf": "hh.pdf",
        "csv": "hh.csv",
        "json": "hh.json",
        "fit": "hh_fit.csv",
    }
    rows = rows_of(files["csv"])
    assert [sum(row["mark"] == kind for row in rows) for kind in ("point", "mean")] == [40, 20]
    mean = next(r for r in rows if (r["mark"], r["curve"], r["step"]) == ("mean", "ppo", "2"))
    # KL 6 for both seeds; reward 3 + seed, so 4.5 with half the distance as standard error
    assert (mean["kl"], mean["kl_se"], mean["reward"], mean["reward_se"], mean["seeds"]) == (
        ("6.0", "0.0", "4.5", "0.5", "2")
    )
    fits = {row["curve"]: row for row in rows_of(files["fit"])}
    assert set(fits) == set(ALGOS)
    for fit in fits.values():
        assert float(fit["slope"]) == pytest.approx(0.5, abs=1e-9)
        assert float(fit["intercept"]) == pytest.approx(1.5, abs=1e-9)
        assert fit["n"] == "10"
    assert files["png"].read_bytes()[:4] == b"\x89PNG" and files["pdf"].read_bytes()[:4] == b"%PDF"


def test_the_origin_names_every_run_and_the_command(tmp_path: Path) -> None:
    runs = campaign(tmp_path)
    files = frontier(runs, tmp_path / "hh.png", "rlhf frontier")
    origin = json.loads(files["json"].read_text())
    assert origin["command"] == "rlhf frontier"
    assert [run["key"] for run in origin["runs"]] == [run.key for run in runs]
    assert all(
        run["metrics_sha256"] == drawn.manifest()["outputs"]["metrics.jsonl"]
        for run, drawn in zip(origin["runs"], runs, strict=True)
    )


def test_the_same_runs_give_the_same_picture_byte_for_byte(tmp_path: Path) -> None:
    runs = campaign(tmp_path)
    once = frontier(runs, tmp_path / "once" / "v1.5", "a")
    twice = frontier(runs, tmp_path / "twice" / "v1.5.png", "b")
    assert once["png"].name == twice["png"].name == "v1.5.png"
    for kind in ("png", "pdf", "csv", "fit"):
        assert once[kind].read_bytes() == twice[kind].read_bytes(), kind


def test_what_is_drawn_is_what_is_in_the_runs(tmp_path: Path) -> None:
    run = a_run(tmp_path, "ppo", seed=1, rows=[(0, 0.0, 1.0), (5, 2.0, 4.0), (9, 4.0, 7.0)])
    (axes,) = draw(points([run])).axes  # no gold, no second panel
    marks, line, _ = axes.get_lines()
    assert marks.get_xydata().tolist() == [[0.0, 1.0], [2.0, 4.0], [4.0, 7.0]]
    assert np.allclose(line.get_xydata(), [[0.0, 1.0], [4.0, 7.0]], atol=1e-9)
    across, upright = (bars.get_segments()[1] for bars in axes.collections)
    assert np.allclose(across, [[1.95, 4.0], [2.05, 4.0]], atol=1e-9)
    assert np.allclose(upright, [[2.0, 3.94], [2.0, 4.06]], atol=1e-9)


def test_gold_gets_a_second_panel_joined_in_order_of_steps(tmp_path: Path) -> None:
    run = a_run(tmp_path, "ppo", seed=1, gold=True, rows=[(0, 0.0, 0.0), (5, 2.0, 4.0)])
    reward, gold = draw(points([run])).axes
    assert (reward.get_ylabel(), gold.get_ylabel()) == (
        "reward (learned reward model)",
        "gold reward",
    )
    assert gold.get_lines()[1].get_xydata().tolist() == [[0.0, 3.0], [2.0, 5.0]]


def test_no_two_labels_overlap_and_none_leaves_the_page(tmp_path: Path) -> None:
    curves = [a_run(tmp_path, "ppo", seed=1, hyper={"beta": b}) for b in (0.1, 0.2, 0.5)]
    for runs in (campaign(tmp_path), campaign(tmp_path)[:1], curves):
        figure = draw(points(runs))
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        labels = [*figure.texts, legend.get_title(), *legend.get_texts()]
        labels += [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) >= 5
        for place, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, labels[place]
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, labels[place]
            assert not any(box.overlaps(other) for other in boxes[place + 1 :]), labels[place]


def test_the_title_says_which_data_and_how_many_prompts_and_seeds(tmp_path: Path) -> None:
    title = draw(points(campaign(tmp_path))).get_suptitle()
    assert title == "hh-embedded · nano · 280 held-out prompts · 2 seeds"


def test_one_evaluation_and_a_reward_of_nan_are_drawn_without_a_line(tmp_path: Path) -> None:
    one = a_run(tmp_path, "ppo", seed=1, rows=[(0, 0.0, 1.0), (5, 1.0, math.nan)])
    files = frontier([one], tmp_path / "one", "")
    assert [row["reward"] for row in rows_of(files["csv"])] == ["1.0", ""]
    assert rows_of(files["fit"]) == []


def test_runs_without_evaluations_or_from_other_parents_are_refused(tmp_path: Path) -> None:
    ppo = a_run(tmp_path, "ppo", seed=1)
    with pytest.raises(UserError, match=r"no evaluation to draw in 1 run\(s\), 0 of stage rl"):
        frontier([a_run(tmp_path, "ppo", seed=1, stage="sft")], tmp_path / "out", "")
    with pytest.raises(UserError, match=r"no evaluation to draw in 1 run\(s\), 1 of stage rl"):
        frontier([a_run(tmp_path, "ppo", seed=9, rows=[])], tmp_path / "out", "")
    with pytest.raises(UserError, match="sft parents differ"):
        frontier([ppo, a_run(tmp_path, "ppo", seed=2, parents={"sft": "z"})], tmp_path / "out", "")
    assert not list(tmp_path.glob("out*"))


def test_a_run_named_twice_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, "ppo", seed=1)
    monkeypatch.chdir(tmp_path)
    again = Run(run.path.relative_to(tmp_path))
    rows = rows_of(frontier([run, again], tmp_path / "out", "")["csv"])
    assert [row["mark"] for row in rows] == ["point"] * 3


def test_an_algorithm_looks_the_same_alone_and_among_others() -> None:
    assert len({look(algo).colour for algo in ALGOS}) == len({look(a).marker for a in ALGOS}) == 4
    assert look("somebodys_own") == look("somebodys_own")
    assert shade("#0072B2", 0) == shade("#0072B2", 3) == "#0072b2"
    assert len({shade("#0072B2", place) for place in range(3)}) == 3


def test_a_figure_is_made_without_torch_transformers_and_wandb(root: Path) -> None:
    code = (
        "import sys, rlhf_cli.figures.frontier; "
        "print(sorted({'torch', 'transformers', 'wandb', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_marks_that_no_other_dominates_are_told(tmp_path: Path) -> None:
    """One algorithm pays twice the KL of the other for the same reward; both start from the same point."""
    runs = [
        a_run(tmp_path, algo, seed=1, rows=[(step, kl * step, float(step)) for step in (0, 1, 2)])
        for algo, kl in (("ppo", 2.0), ("p3o_v2", 1.0))
    ]
    rows = rows_of(frontier(runs, tmp_path / "f", "rlhf frontier")["csv"])
    free = {(r["curve"], r["step"]): r["pareto_reward"] for r in rows if r["mark"] == "point"}
    assert free == {
        ("p3o_v2", "0"): "True", ("p3o_v2", "1"): "True", ("p3o_v2", "2"): "True",
        ("ppo", "0"): "True", ("ppo", "1"): "False", ("ppo", "2"): "False",
    }  # fmt: skip
    assert {r["pareto_gold"] for r in rows} == {"False"}  # there is none


def test_what_was_gained_by_the_kl_that_all_reached_is_beside_the_lines(tmp_path: Path) -> None:
    """The score gains a fifth of the KL and gold loses a tenth: 1 and -1/2 on average over 10 nats."""
    runs = [a_run(tmp_path, "ppo", seed=seed) for seed in (1, 2)]
    for run in runs:
        for step in (0, 5, 10):
            rows = [
                {
                    "prompt": f"p{i}",
                    "response": " Yes.",
                    "kl": step + i - 1,
                    "length": 4.0,
                    "ended": 1.0,
                }
                | {"score": step / 5 + i, "gold": i - step / 10}
                for i in range(3)
            ]
            run.keep_samples(step, rows)
    (fit,) = rows_of(frontier(runs, tmp_path / "f", "rlhf frontier")["fit"])
    assert float(fit["area_upto"]) == 10
    for name, gain in {"reward": 1.0, "gold": -0.5}.items():
        value, low, high = (float(fit[f"{name}_area{end}"]) for end in ("", "_low", "_high"))
        assert low <= value == pytest.approx(gain, abs=1e-9) and value <= high


def test_a_curve_may_be_summed_up_by_what_never_falls(tmp_path: Path) -> None:
    """Rewards 0, 2, 1 at KLs 0, 1, 2: the nearest that never falls is 0, 1.5, 1.5."""
    run = a_run(tmp_path, "ppo", seed=1, rows=[(0, 0.0, 0.0), (1, 1.0, 2.0), (2, 2.0, 1.0)])
    figure = draw(points([run]), "monotone")
    lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 3]
    assert any(np.allclose(line.get_ydata(), [0, 1.5, 1.5]) for line in lines)
    text = " ".join(t.get_text() for legend in figure.legends for t in [legend.get_title()])
    assert "least squares that never fall" in text
