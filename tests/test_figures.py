"""The figures of papers: their files, what they find and miss, what they write, and how they judge."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from rlhf_cli import dotted, gallery
from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.result import Result
from rlhf_cli.figures.spec import Spec
from rlhf_cli.gallery import Exhibit, Job
from rlhf_cli.rewards.shift import shift
from rlhf_cli.store.metrics import read
from rlhf_cli.words import collect, sweep
from tests.conftest import Typed
from tests.fabricated import fabricate
from tests.test_experiments import COMMITS

OWN = ("kinds.curves.draw", "kinds.frontier.draw")
DRAWN = [name for name in gallery.names() if gallery.spec(name).draw.endswith(OWN)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of runs."""
    monkeypatch.setenv("RLHF_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def told(name: str, scale: str) -> list[str]:
    """A figure at a scale, with what TL;DR from the hub leaves to the user."""
    lines = [line for panel in gallery.spec(name).panels.values() for line in panel["paper"]]
    commits = COMMITS if scale == "paper" and any("tldr" in line for line in lines) else []
    return [name, f"scale={scale}", *commits]


def a_course(job: Job, share: float) -> dict[str, float]:
    """KL 2 at the end; the reward is half of it, plus a tenth for each letter of the algorithm's name."""
    kl = 2 * share
    reward = kl * (0.5 + 0.1 * len(job.plan.recipe.name))
    return {"kl": kl, "reward": reward, "gold": 1 + reward / 2, "length": 20 + kl}


def made_up(draw: str, options: dict[str, Any], **panels: str) -> Exhibit:
    """A figure of some command lines."""
    lines = {name: {"nano": (line,), "paper": (line,)} for name, line in panels.items()}
    path = f"rlhf_cli.figures.kinds.{draw}.draw"
    spec = Spec("made_up", "A title", "Nobody 2026", "A claim.", path, options, lines)  # type: ignore[arg-type]
    return Exhibit(spec, "nano", ())


def drawn(exhibit: Exhibit) -> Result:
    """The same without files."""
    runs = {panel: [job.run for job in jobs] for panel, jobs in exhibit.panels.items()}
    result: Result = dotted.named("draw", exhibit.spec.draw, "function")(runs, exhibit.spec)
    return result


# --- which runs


def test_a_sweep_composes_what_the_command_line_would() -> None:
    words = [
        "data=tldr", "algo=ppo,rloo", "seed=1,2", "algo.beta=0.1", "model.scratch.width=64",
        "algo.optim.lr=range(1,3)", "model@reward.model=nano", "++algo.update.batch=64",
    ]  # fmt: skip
    jobs = list(sweep(words))
    assert len(jobs) == 8
    assert [node for _, node in jobs] == collect(["-m", *words])
    assert jobs[1][0][1:3] == ("algo=ppo", "seed=1") and jobs[1][0][5] == "algo.optim.lr=2"


@pytest.mark.parametrize("bad", ["algo=ppoo", "algo.bet=1", "algo.beta=[1,", "reward=mix"])
def test_a_sweep_complains_as_the_command_line_does(bad: str) -> None:
    with pytest.raises(UserError) as quick:
        list(sweep([bad]))
    with pytest.raises(UserError) as slow:
        collect(["-m", bad])
    assert str(quick.value) == str(slow.value)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        (name, scale)
        for name in gallery.names()
        for scale in ("nano", "paper")
        if (name, scale) != ("rm", "paper")  # the next test
    ],
)
def test_every_figure_plans_its_runs(name: str, scale: str, store: Path) -> None:
    (exhibit,) = gallery.exhibits(told(name, scale))
    assert [bool(jobs) for jobs in exhibit.panels.values()] == [True] * len(exhibit.spec.panels)
    assert exhibit.missing == exhibit.jobs
    for path in filter(None, (exhibit.spec.draw, exhibit.spec.prepare)):
        assert callable(dotted.named("draw", path, "function"))
    assert all(job.plan.recipe.model.regime == scale for job in exhibit.jobs)


def test_a_figure_of_two_datasets_asks_for_the_commit_that_one_of_them_lacks() -> None:
    with pytest.raises(UserError, match=r"^data\.revision=null is no commit of vwxyzjn/"):
        _ = gallery.exhibits(["rm", "scale=paper"])[0].jobs


@pytest.mark.parametrize("scale", ["nano", "paper"])
@pytest.mark.parametrize("name", DRAWN)
def test_every_claim_is_about_curves_that_the_runs_make(name: str, scale: str, store: Path) -> None:
    (exhibit,) = gallery.exhibits(told(name, scale))
    fabricate(exhibit.jobs, a_course, prompts=8, points=2)
    result = drawn(gallery.exhibits(told(name, scale))[0])
    wanted = exhibit.spec.options.get("claims") or exhibit.spec.options["pairs"]
    assert result.reason.count("[") >= len(wanted)


def test_figures_share_runs(store: Path) -> None:
    curves, winrate = gallery.exhibits(["rloo_curves"]), gallery.exhibits(["p3o_hh"])
    both = gallery.together([*curves, *winrate])
    # PPO with four seeds is in both
    assert len(both) == len(curves[0].jobs) + len(winrate[0].jobs) - 4


# --- the verb


def test_missing_runs_are_counted_after_the_commands_that_make_them(rlhf: Any) -> None:
    code, lines, err = rlhf("figure", "etpo")
    assert code == 2
    assert lines == ["rlhf train -m algo=etpo,ppo data=guess seed=1,2,3"]
    assert err == (
        "error: 6 of the 6 runs of etpo are missing; `rlhf figure etpo --run` makes them.\n"
    )


def test_figures_that_lack_least_come_first_and_those_left_out_are_named(
    rlhf: Any, store: Path
) -> None:
    (more,), (fewer,) = (gallery.exhibits([name]) for name in ("etpo", "ppomax_collapse"))
    assert (len(more.jobs), len(fewer.jobs)) == (6, 4)
    found = [job.run.key for job in gallery.together([more, fewer])]
    assert found == [job.run.key for job in [*fewer.jobs, *more.jobs]]
    code, out, _ = rlhf("figure", "etpo", "--run", "--hours", "0")
    assert code == 0
    assert out == ["left out for want of time: etpo (6 runs); the same command goes on with them."]


def test_words_beside_the_name_are_part_of_every_command(rlhf: Any) -> None:
    code, lines, err = rlhf("figure", "etpo", "scale=paper", "launch=deepspeed")
    assert (code, lines) == (
        2,
        ["rlhf train -m model=pythia_1b algo=etpo,ppo data=guess seed=1,2,3 launch=deepspeed"],
    )
    assert err == (
        "error: 6 of the 6 runs of etpo are missing;"
        " `rlhf figure etpo scale=paper launch=deepspeed --run` makes them.\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["p3o_h"],
            "there is no figure p3o_h; did you mean p3o_hh? `rlhf figure` lists those there are.",
        ),
        (["@"], "there is no figure @; `rlhf figure` lists those there are."),
        (["etpo", "scale=huge"], "scale=huge is not allowed: choose nano or paper."),
    ],
)
def test_a_mistake_is_one_sentence(rlhf: Any, words: list[str], sentence: str) -> None:
    assert rlhf("figure", *words) == (2, [], f"error: {sentence}\n")


def test_the_plan_of_a_figure_ends_with_its_commands(rlhf: Any) -> None:
    code, lines, err = rlhf("plan", "figure=ppomax_long", "scale=paper")
    assert (code, err) == (0, "")
    assert lines[-2:] == [
        "commands:",
        "  rlhf train -m experiment=secrets_hh_7b algo=ppo_max seed=1,2,3",
    ]
    assert any("GPU-hours" in line for line in lines)


def test_a_figure_is_drawn_with_its_numbers_its_origin_and_its_verdict(
    typed: Typed, tmp_path: Path
) -> None:
    (exhibit,) = gallery.exhibits(["etpo"])
    fabricate(exhibit.jobs, a_course, spread=0.05)
    code, out, err = typed("figure", "etpo", "--out", "drawn")
    assert (code, err) == (0, "")
    # etpo has a letter more than ppo: gold 2 x 0.1 / 2 above it at the end
    assert out.startswith("etpo: holds: gold, etpo - ppo: +0.100 [")
    files = sorted((tmp_path / "drawn").iterdir())
    assert [file.name for file in files] == [
        f"etpo.{k}" for k in ("csv", "json", "md", "pdf", "png")
    ]
    whole = json.loads((tmp_path / "drawn" / "etpo.json").read_text())
    assert [run["key"] for run in whole["runs"]] == [job.run.key for job in exhibit.jobs]
    assert (whole["verdict"], whole["command"]) == ("holds", "rlhf figure etpo")
    with (tmp_path / "drawn" / "etpo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 5  # curves, metrics, evaluations
    last = next(
        r for r in rows if (r["curve"], r["metric"], r["x"]) == ("ppo", "eval/kl", "5120.0")
    )
    assert float(last["value"]) == pytest.approx(2, abs=0.3)
    caption = (tmp_path / "drawn" / "etpo.md").read_text()
    assert f"**Claimed** ({exhibit.spec.source}): {exhibit.spec.claim}" in caption
    assert (
        "**Measured** at scale nano: 6 runs of nano on guess-embedded, seeds 1, 2, 3, 24 held-out prompts at"
        " every evaluation, commit c0ffee0." in caption
    )
    assert "**Holds.**\n\n- gold, etpo - ppo: +0.100 [" in caption


def test_the_same_runs_give_the_same_files_byte_for_byte(typed: Typed, tmp_path: Path) -> None:
    fabricate(gallery.exhibits(["etpo"])[0].jobs, a_course)
    for folder in ("once", "twice"):
        assert typed("figure", "etpo", "--out", folder)[0] == 0
    for kind in ("png", "pdf", "csv", "md"):
        once, twice = (tmp_path / folder / f"etpo.{kind}" for folder in ("once", "twice"))
        assert once.read_bytes() == twice.read_bytes(), kind


# --- curves


def claimed(**claim: Any) -> dict[str, Any]:
    return {"metrics": ["eval/reward", "eval/eos_rate"], "claims": [claim]}


@pytest.mark.parametrize(
    ("claim", "difference", "verdict"),
    [
        # rewards at the end: ppo 2 x 0.8, rloo and raft 2 x 0.9, reinforce 2 x 1.4
        ({"above": ["reinforce"], "below": ["ppo"]}, 1.2, "holds"),
        ({"above": ["ppo"], "below": ["reinforce"]}, -1.2, "does not hold"),
        ({"above": ["rloo"], "below": ["raft"]}, 0.0, "open"),
        ({"above": ["rloo"], "below": ["ppo"], "at": 0.5}, 0.1, "holds"),
        # the mean of a line from 0 is half of its end
        ({"above": ["rloo"], "below": ["ppo"], "at": "area"}, 0.1, "holds"),
        ({"above": [{"curve": "rloo", "at": 0.5}], "below": ["ppo"]}, -0.7, "does not hold"),
        ({"above": ["rloo", "rloo"], "below": ["ppo", "raft"]}, 0.2, "holds"),
        ({"above": ["rloo"], "below": ["raft"], "within": 0.1}, 0.1, "holds"),
        ({"above": ["rloo"], "below": ["ppo"], "within": 0.1}, 0.3, "does not hold"),
    ],
)
def test_a_claim_is_judged_by_the_difference_of_its_curves(
    store: Path, claim: dict[str, Any], difference: float, verdict: str
) -> None:
    exhibit = made_up(
        "curves", claimed(metric="reward", **claim), all="algo=ppo,rloo,raft,reinforce seed=1,2,3"
    )
    # The noise of an evaluation is the same in all of them.
    fabricate(exhibit.jobs, a_course, spread=0.02)
    result = drawn(exhibit)
    assert result.verdict == verdict
    said = result.reason.split("; ")[0].split(": ")[-1].split(" [")[0]
    assert float(said) == pytest.approx(difference, abs=0.03)


def test_the_best_setting_of_an_algorithm_stands_for_it(store: Path) -> None:
    def course(job: Job, share: float) -> dict[str, float]:
        levels = {0.1: 1.0, 0.2: 3.0, 0.5: 2.0} if job.plan.recipe.name == "ppo" else {0.2: 2.5}
        reward = share * levels[job.plan.recipe.algo.beta]  # type: ignore[attr-defined]
        return {"kl": share, "reward": reward, "gold": reward, "length": 20}

    claim = claimed(metric="reward", above=["ppo"], below=["rloo"])
    exhibit = made_up("curves", claim, all="algo=ppo algo.beta=0.1,0.2,0.5 seed=1,2")
    other = made_up("curves", claim, all="algo=rloo seed=1,2")
    fabricate([*exhibit.jobs, *other.jobs], course)
    runs = [job.run for job in [*exhibit.jobs, *other.jobs]]
    result = dotted.named("draw", exhibit.spec.draw, "function")({"all": runs}, exhibit.spec)
    assert result.reason.startswith("reward, best ppo - rloo: +0.500 [")
    assert {row["curve"] for row in result.rows} == {
        "ppo beta=0.1", "ppo beta=0.2", "ppo beta=0.5", "rloo",
    }  # fmt: skip


def test_a_setting_that_most_share_is_not_in_a_name(store: Path) -> None:
    claim = claimed(metric="reward", above=["ppo lam=1.0"], below=["ppo"])
    lines = "algo=ppo algo.lam=0.95,1.0 algo.clip=0.2,0.3 seed=1"
    exhibit = made_up("curves", claim, all=lines)
    jobs = [job for job in exhibit.jobs if not {"algo.lam=1.0", "algo.clip=0.3"} <= {*job.words}]
    fabricate(jobs, a_course)
    runs = {"all": [job.run for job in jobs]}
    result = dotted.named("draw", exhibit.spec.draw, "function")(runs, exhibit.spec)
    assert {row["curve"] for row in result.rows} == {"ppo", "ppo clip=0.3", "ppo lam=1.0"}


def test_a_claim_may_compare_panels(store: Path) -> None:
    def course(job: Job, share: float) -> dict[str, float]:
        reward = share * job.plan.recipe.algo.beta  # type: ignore[attr-defined]
        return {"kl": share, "reward": reward, "gold": reward, "length": 20}

    terms = ({"curve": "ppo", "panel": "more"}, {"curve": "ppo", "panel": "less"})
    claim = claimed(metric="gold", above=terms[:1], below=terms[1:])
    exhibit = made_up(
        "curves", claim, less="algo=ppo seed=1,2", more="algo=ppo algo.beta=0.7 seed=1,2"
    )
    fabricate(exhibit.jobs, course)
    assert drawn(exhibit).reason.startswith("gold, ppo (more) - ppo (less): +0.500 [")


def test_a_claim_may_be_about_how_unevenly_curves_change(store: Path) -> None:
    """KL by a zigzag of 0.4 on a line: changes of 0.9, 0.1, 0.9, 0.1, whose deviation is sqrt(0.64 / 3)."""

    def course(job: Job, share: float) -> dict[str, float]:
        apart = job.plan.recipe.name == "ppo" and round(4 * share) % 2
        kl = 2 * share + (0.4 if apart else 0.0)
        return {"kl": kl, "reward": kl, "gold": kl, "length": 20}

    claim = claimed(metric="kl", above=["ppo"], below=["rloo"], at="wobble")
    exhibit = made_up("curves", claim, all="algo=ppo,rloo seed=1,2,3")
    fabricate(exhibit.jobs, course, spread=0.001)
    result = drawn(exhibit)
    assert result.verdict == "holds"
    assert result.reason.startswith("kl, ppo's wobble - rloo's wobble: +0.46")


def test_a_claim_about_curves_that_there_are_none_of_is_refused(store: Path) -> None:
    claim = claimed(metric="reward", above=["pppo"], below=["rloo"])
    exhibit = made_up("curves", claim, all="algo=ppo,rloo seed=1")
    fabricate(exhibit.jobs, a_course)
    with pytest.raises(UserError) as refused:
        drawn(exhibit)
    assert str(refused.value) == (
        "no panel has the curves pppo and rloo that options.claims names; choose among ppo, rloo."
    )


def test_a_range_over_seeds_alone_is_that_of_student(store: Path) -> None:
    def course(job: Job, share: float) -> dict[str, float]:
        return {"kl": share, "reward": share, "gold": share, "length": 20, "rouge_l": 0.1 * share}

    options = {
        **claimed(metric="reward", above=["ppo"], below=["ppo"]),
        "metrics": ["eval/rouge_l"],
    }
    exhibit = made_up("curves", options, all="algo=ppo seed=1,2,3")
    fabricate(exhibit.jobs, course)
    last = [read(job.run.metrics_path)[-1]["eval/rouge_l"] for job in exhibit.jobs]
    low, high = stats.t.interval(0.95, 2, sum(last) / 3, stats.sem(last))
    row = drawn(exhibit).rows[-1]
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


def test_single_responses_give_a_win_rate_over_the_start_and_quantiles_of_the_reward(
    store: Path,
) -> None:
    def course(job: Job, share: float) -> dict[str, float]:
        return {"kl": share, "reward": share, "gold": 9 * share, "length": 20}

    options = {
        **claimed(metric="reward", above=["ppo"], below=["ppo"]),
        "metrics": ["win_rate", "spread"],
    }
    exhibit = made_up("curves", options, all="algo=ppo seed=1,2")
    fabricate(exhibit.jobs, course)
    rows = drawn(exhibit).rows
    wins = [row["value"] for row in rows if row["metric"] == "win_rate"]
    assert wins[0] == 0.5 and wins[-1] == 1.0  # all ties, then 9 above with a scatter of 0.3
    last = [row["score"] for job in exhibit.jobs for row in job.run.responses(40)]
    quantiles = statistics.quantiles(last, n=10, method="inclusive")
    row = rows[-1]
    assert (row["low"], row["high"]) == (pytest.approx(quantiles[0]), pytest.approx(quantiles[8]))
    assert row["value"] == pytest.approx(statistics.median(last))


# --- frontiers


@pytest.mark.parametrize(
    ("pair", "verdict", "difference"),
    [
        # per nat: ppo 0.8, p3o_v2 1.1
        (("p3o_v2", "ppo"), "holds", 0.3),
        (("ppo", "p3o_v2"), "does not hold", -0.3),
    ],
)
def test_a_frontier_is_judged_at_the_same_kl(
    store: Path, pair: tuple[str, str], verdict: str, difference: float
) -> None:
    options = {"pairs": [pair], "kls": [1.0]}
    exhibit = made_up("frontier", options, all="algo=ppo,p3o_v2 seed=1,2")
    fabricate(exhibit.jobs, a_course, spread=0.001)
    result = drawn(exhibit)
    assert result.verdict == verdict
    assert result.reason.startswith(f"all, reward at 1 nats, {pair[0]} - {pair[1]}: ")
    assert float(result.reason.split(": ")[1].split(" [")[0]) == pytest.approx(
        difference, abs=0.005
    )
    lines = [row for row in result.rows if row["mark"] == "line" and row["curve"] == "ppo"]
    # the course is a straight line through 0
    assert [row["reward"] for row in lines] == pytest.approx(
        [0.8 * row["kl"] for row in lines], abs=0.01
    )  # type: ignore[operator]


def test_a_frontier_that_no_two_curves_reach_is_open(store: Path) -> None:
    options = {"pairs": [("p3o_v2", "ppo")], "kls": [9.0]}
    exhibit = made_up("frontier", options, all="algo=ppo,p3o_v2 seed=1,2")
    fabricate(exhibit.jobs, a_course)
    result = drawn(exhibit)
    said = "No KL of the claim was reached by two curves that it compares."
    assert (result.verdict, result.reason) == ("open", said)


def test_an_option_that_is_not_allowed_is_named(store: Path) -> None:
    exhibit = made_up(
        "frontier", {"pairs": [("p3o_v2", "ppo")], "kl": [1.0]}, all="algo=ppo seed=1"
    )
    fabricate(exhibit.jobs, a_course)
    with pytest.raises(UserError, match=r"^options\.kls? "):
        drawn(exhibit)


# --- looks


def labels(figure: Figure) -> list[Any]:
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    found = [*figure.texts, legend.get_title(), *legend.get_texts()]
    for axes in figure.axes:
        found += [axes.xaxis.label, axes.yaxis.label, axes.title]
    return [label for label in found if label.get_text()]


@pytest.mark.parametrize("name", ["p3o_hh", "rloo_robust", "ppomax_tricks"])
def test_no_two_labels_overlap_and_none_leaves_the_page(name: str, store: Path) -> None:
    fabricate(gallery.exhibits([name])[0].jobs, a_course, prompts=8)
    figure = drawn(gallery.exhibits([name])[0]).figure
    found = labels(figure)
    boxes = [label.get_window_extent() for label in found]
    for place, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, found[place]
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, found[place]
        assert not any(box.overlaps(other) for other in boxes[place + 1 :]), found[place]


# --- the shift


def test_the_shift_is_a_standard_normal_number_of_the_prompt_alone() -> None:
    prompts = [f"Human: {i}" for i in range(4000)]
    numbers = shift(prompts, [""] * 4000)
    assert numbers == shift(prompts, ["other"] * 4000)
    assert stats.kstest(numbers, "norm").pvalue > 0.01


def test_a_difference_of_either_sign_is_open() -> None:
    unsure = Interval(0.1, -0.1, 0.3, 0.1, 10.0, 2)
    assert judge([Part("a - b", unsure)])[0] == "open"
