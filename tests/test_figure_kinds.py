"""Figures of a kind of their own: numbers worked out by hand, verdicts both ways, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import approx_fprime, minimize_scalar, root
from scipy.special import expit, softmax

from rlhf_cli import gallery
from rlhf_cli.data.corpus import Pair
from rlhf_cli.errors import UserError
from rlhf_cli.evals.bootstrap import Interval
from rlhf_cli.evals.curves import curves
from rlhf_cli.evals.grid import text
from rlhf_cli.evals.reward_report import Accuracy, Scored, report
from rlhf_cli.figures.claims import Part, judge
from rlhf_cli.figures.kinds import (
    bandit,
    beam,
    credit,
    exploration,
    reward_model,
    table,
    traces,
    winrate,
)
from rlhf_cli.figures.kinds.bandit import Bandit
from rlhf_cli.figures.kinds.exploration import Exploration
from rlhf_cli.figures.spec import Spec
from rlhf_cli.figures.style import pictures
from rlhf_cli.judges.cache import Answers, Question
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run
from rlhf_cli.tools import beams, corrupted
from tests.test_store import a_run
from tests.test_tools import Chain, chain  # noqa: F401 - a fixture

PROMPTS = tuple("abcdefgh")


def spec_of(name: str, **options: Any) -> Spec:
    """A figure of conf/figure with other options."""
    spec = gallery.spec(name)
    return replace(spec, options=spec.options | options)


def refused(sentence: str) -> Any:
    return pytest.raises(UserError, match=f"^{re.escape(sentence)}$")


# --- verdicts


def part(value: float, se: float, seeds: int = 4) -> Part:
    """With an interval of two standard errors, and ever so many degrees of freedom."""
    return Part("a - b", Interval(value, value - 2 * se, value + 2 * se, se, 1e9, seeds))


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([part(1.0, 0.4), part(0.3, 0.1)], "holds"),
        ([part(1.0, 0.4), part(0.1, 0.1)], "open"),
        ([part(1.0, 0.4), part(-0.3, 0.1)], "does not hold"),
        ([part(-0.1, 0.1)], "open"),
    ],
)
def test_a_claim_holds_if_all_its_parts_do_and_fails_with_one_surely_below(
    parts: list[Part], verdict: str
) -> None:
    assert judge(parts)[0] == verdict


def test_one_of_ten_parts_below_by_chance_refutes_nothing() -> None:
    """p = 0.028 for 2.2 standard errors: less than 0.05 alone, ten times that among ten."""
    assert judge([part(-0.22, 0.1)])[0] == "does not hold"
    assert judge([part(-0.22, 0.1), *[part(0.1, 0.1)] * 9])[0] == "open"


def test_the_reason_has_every_part_with_its_interval_and_says_where_one_seed_is_all() -> None:
    _, reason = judge([part(1.0, 0.25), part(-0.5, 0.25, seeds=1)])
    assert reason == (
        "a - b: +1.000 [+0.500, +1.500]; a - b: -0.500 [-1.000, +0.000], one seed (intervals of 95%)."
    )


# --- the bandit of CoPG

THETA = np.array([0.3, -0.2, 0.1])
MU1, MU2 = np.array([0.1, 0.2, 0.7]), np.array([0.05, 0.05, 0.9])
R, BETA = np.array([2.5, 2.0, 1.0]), 0.5


def toy(**changes: Any) -> Bandit:
    return spec_of("copg_bandit", **changes).typed(Bandit)


def log_ratio(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(softmax(theta) * 3)


def expected_pairs(of: Callable[[int, int], float]) -> float:
    return math.fsum(MU1[a] * MU2[b] * of(a, b) for a in range(3) for b in range(3))


def test_copg_ascends_the_papers_objective() -> None:
    """The mean over pairs of (R_half(y) - R_half(y')) (h(y) - h(y')), R_half = r - beta h / 2."""

    def objective(theta: NDArray[np.float64]) -> float:
        h = log_ratio(theta)
        half = R - BETA / 2 * h
        return expected_pairs(lambda a, b: (half[a] - half[b]) * (h[a] - h[b]))

    assert toy().copg(THETA) == pytest.approx(approx_fprime(THETA, objective), abs=1e-6)


def test_ipo_descends_the_mean_of_its_square_over_labels() -> None:
    """beta times the mean of (h_w - h_l - 1 / (2 beta))^2, whoever wins."""

    def loss(theta: NDArray[np.float64]) -> float:
        h = log_ratio(theta)

        def one(a: int, b: int) -> float:
            first, gap = expit(R[a] - R[b]), h[a] - h[b]
            right, wrong = (gap - 1 / (2 * BETA)) ** 2, (-gap - 1 / (2 * BETA)) ** 2
            return float(BETA * (first * right + (1 - first) * wrong))

        return expected_pairs(one)

    assert toy().ipo(THETA) == pytest.approx(-approx_fprime(THETA, loss), abs=1e-6)


@pytest.mark.parametrize("baseline", [0.0, "value"])
def test_the_policy_gradient_follows_reward_above_its_baseline_where_mu_draws(
    baseline: float | str,
) -> None:
    pi, h = softmax(THETA), log_ratio(THETA)
    b = float(pi @ R) if baseline == "value" else 0.0
    weight = (MU1 + MU2) * (R - BETA * h - b)
    slope = approx_fprime(THETA, lambda theta: float(weight @ np.log(softmax(theta))))
    ours = toy().pg_value(THETA) if baseline == "value" else toy().pg_zero(THETA)
    assert ours == pytest.approx(slope, abs=1e-6)


def test_regret_is_0_at_the_optimum_and_beta_kl_elsewhere() -> None:
    """J(pi*) - J(pi) = beta KL(pi | pi*)."""
    best, pi = softmax(R / BETA), softmax(THETA)
    assert best == pytest.approx([0.705385, 0.259496, 0.035119], abs=1e-6)
    assert toy().regret(R / BETA) == pytest.approx(0, abs=1e-12)
    assert toy().regret(THETA) == pytest.approx(BETA * pi @ np.log(pi / best), abs=1e-12)
    assert toy().regret(np.zeros(3)) == pytest.approx(0.291867, abs=1e-6)


def test_where_each_method_ends_is_where_its_direction_vanishes() -> None:
    """CoPG at the optimum; IPO at a weighted least-squares fit; the others at roots found elsewhere."""
    rows = [(a, b, math.sqrt(MU1[a] * MU2[b])) for a in range(3) for b in range(3)]
    design = np.array([[w * ((k == a) - (k == b)) for k in range(3)] for a, b, w in rows])
    wanted = np.array([w * (2 * expit(R[a] - R[b]) - 1) / (2 * BETA) for a, b, w in rows])
    ipo = softmax(np.linalg.lstsq(design, wanted)[0])
    assert ipo == pytest.approx([0.4242, 0.3527, 0.2231], abs=5e-5)

    def ends(method: Callable[[Bandit, NDArray[np.float64]], NDArray[np.float64]]) -> Any:
        found = root(lambda free: method(toy(), np.array([*free, 0.0]))[:2], [0.1, 0.1])
        return np.array([*found.x, 0.0])

    zero, value = ends(Bandit.pg_zero), ends(Bandit.pg_value)
    assert softmax(zero) == pytest.approx([0.194, 0.250, 0.556], abs=5e-4)
    assert softmax(value) == pytest.approx([0.8115, 0.1675, 0.0209], abs=5e-5)
    found = {
        name: bandit.regrets(toy(), ascent)[-1] for name, (_, ascent) in bandit.METHODS.items()
    }
    assert found == pytest.approx(
        {
            "CoPG": 0.0,
            "IPO": toy().regret(np.log(ipo)),
            "PG, no baseline": toy().regret(zero),
            "PG, value baseline": toy().regret(value),
        },
        abs=1e-5,
    )


def test_the_bandit_needs_no_runs_and_its_claim_holds() -> None:
    result = bandit.draw({}, gallery.spec("copg_bandit"))
    assert result.verdict == "holds"
    assert result.reason == (
        "regret at the start: 0.2919; after 2,000 steps CoPG: 0.0000; IPO: 0.1525; PG, no baseline:"
        " 0.6378; PG, value baseline: 0.0148 (exact, up to 0.001 counts as none)."
    )
    assert len(result.rows) == 4 * 2001


def test_at_the_papers_own_learning_rate_copg_has_not_arrived() -> None:
    result = bandit.draw({}, spec_of("copg_bandit", lr=1e-3))
    assert result.verdict == "does not hold"
    ends = [row["regret"] for row in result.rows if row["step"] == 2000]
    assert ends == pytest.approx(
        [0.0129, 0.152, 0.635, 0.0275], abs=3e-3
    )  # of five runs on drawn pairs


# --- the example of XPO

RARE = math.exp(-5)  # exp(-(1/8) / 0.025)


def example(**changes: Any) -> Exploration:
    return spec_of("xpo_stuck", **changes).typed(Exploration)


def test_regret_is_beta_kl_to_the_best_policy_where_the_better_arm_is_rare_too() -> None:
    ref = np.array([RARE, 1 - RARE])
    best = ref * np.exp(np.array([1.0, 0.5]) / 0.025)
    best /= best.sum()
    for margin in (-3.0, 0.0, 2.0, 11.0):
        pi = softmax(np.log(ref) + np.array([margin, 0.0]))
        kl = float(pi @ np.log(pi / best))
        assert example().regret(np.array(margin)) == pytest.approx(0.025 * kl, abs=1e-9)


def test_the_next_policy_has_the_least_loss_on_all_rounds() -> None:
    """Against a search over the margin by scipy, after 3 wins of a, 2 of b, and 40 draws of the reference."""
    ours = example(beta=0.25)  # so that the least loss is inside of what is allowed
    counts, rare = np.array([3.0, 2.0, 1.0, 39.0]), math.exp(-0.5)

    def loss(m: float) -> float:
        a = expit(math.log(rare / (1 - rare)) + m)
        terms = (-np.log(expit(0.25 * m)), -np.log(expit(-0.25 * m)), np.log(a), np.log(1 - a))
        return float(counts * [1, 1, 0.002, 0.002] @ terms)

    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded").x
    tried = ours.margins[(counts @ ours.losses(0.002)).argmin()]
    assert 0 < abs(found) < 3.9 and tried == pytest.approx(found, abs=0.02)


def test_without_pairs_of_unlike_arms_online_dpo_stays_and_xpo_leaves() -> None:
    alike = np.array([0.0, 0.0, 0.0, 7.0])
    assert example().margins[(alike @ example().losses(0.0)).argmin()] == 0
    assert example().margins[(alike @ example().losses(0.001)).argmin()] == pytest.approx(40)


def test_online_dpo_is_stuck_as_often_at_least_as_the_better_arm_is_never_drawn() -> None:
    stuck = (example(rounds=74).simulated(0.0) >= 0.125).mean(axis=0)
    se = math.sqrt(0.37 * 0.63 / 400)
    assert stuck[0] == 1 and stuck[74] > (1 - RARE) ** 148 - 3 * se


def test_where_nothing_is_hidden_neither_is_stuck_for_long() -> None:
    """At beta = 1 the reference draws the better arm in 88% of cases."""
    result = exploration.draw({}, spec_of("xpo_stuck", beta=1.0))
    assert result.verdict == "open"


@pytest.mark.parametrize(
    ("alpha", "verdict"), [((0.0, 0.001), "holds"), ((0.001, 0.0), "does not hold")]
)
def test_the_example_is_judged_where_the_proposition_ends(
    alpha: tuple[float, float], verdict: str
) -> None:
    result = exploration.draw({}, spec_of("xpo_stuck", alpha=alpha))
    assert result.verdict == verdict and "after 74 rounds" in result.reason
    assert len(result.rows) == 2 * 301


# --- traces of training


def a_trace(root: Path, seed: int, chosen: Sequence[float], **more: Any) -> Run:
    run = a_run(root, "dpo", seed, **more)
    ledger = Ledger(run.metrics_path)
    for place, value in enumerate(chosen):
        row = {"train/implicit_chosen": value, "train/implicit_rejected": value - 1}
        ledger.write({"step": 12 + place, "episodes": 1408 + place, **row})
    return run


def claims(*made: tuple[str, str, str]) -> list[dict[str, str]]:
    return [dict(zip(("panel", "metric", "lies"), one, strict=True)) for one in made]


def test_a_trace_is_averaged_over_stretches_and_judged_at_its_end_over_seeds(
    tmp_path: Path,
) -> None:
    """Stretches of two: 1 and 2 on average in the first, -1.5 and -2.5 in the last, so -2 -+ t / 2."""
    runs = [a_trace(tmp_path, 1, [0, 2, -1, -2]), a_trace(tmp_path, 2, [1, 3, -2, -3])]
    judged = claims(("all", "train/implicit_chosen", "below"))
    result = traces.draw({"all": runs}, spec_of("implicit", stretches=2, claims=judged))
    first, last = (row for row in result.rows if row["metric"] == "train/implicit_chosen")
    assert (first["step"], first["value"], last["step"], last["value"]) == (13, 1.5, 15, -2.0)
    assert last["high"] - last["value"] == pytest.approx(12.7062 * 0.5, rel=1e-5)
    assert result.verdict == "open"
    assert result.reason == (
        "all, preferred responses, how far below 0 at the end: +2.000 [-4.353, +8.353] (intervals of 95%)."
    )


@pytest.mark.parametrize(("lies", "verdict"), [("below", "holds"), ("above", "does not hold")])
def test_a_trace_lies_on_one_side(tmp_path: Path, lies: str, verdict: str) -> None:
    runs = [a_trace(tmp_path, seed, [0, -2 - seed / 10]) for seed in (1, 2, 3)]
    judged = claims(("all", "train/implicit_chosen", lies))
    result = traces.draw({"all": runs}, spec_of("implicit", stretches=2, claims=judged))
    assert result.verdict == verdict


def test_traces_refuse_two_settings_in_a_panel_short_runs_and_unknown_claims(
    tmp_path: Path,
) -> None:
    one = a_trace(tmp_path, 1, [0, 1])
    spec = spec_of("implicit", stretches=2, claims=claims(("all", "train/loss", "below")))
    with refused(
        "options.claims names train/loss in 'all', which is not drawn; choose among train/implicit_chosen in"
        " 'all'; train/implicit_rejected in 'all'."
    ):
        traces.draw({"all": [one]}, spec)
    with refused(
        f"{one.path.name} has 2 values of train/implicit_chosen, and options.stretches=3 are asked for; ask"
        " for fewer, or for another metric."
    ):
        traces.draw({"all": [one]}, spec_of("implicit", stretches=3))
    with refused(
        "the panel 'all' has two runs of one seed; give every setting a panel of its own."
    ):
        traces.draw({"all": [one, one]}, spec)


# --- reward models


def a_reward_model(root: Path, held: Scored, train: Sequence[Sequence[int]]) -> Run:
    run = Run(root / "reward" / "hh_embedded-nano-s1-0000000001")
    run.begin("seed: 1\n", {"key": run.key, "stage": "reward"})
    worth = report(held, np.array(train))
    run.report_path.write_text(json.dumps(asdict(worth)))
    ledger = Ledger(run.metrics_path)
    for step, share in ((10, 0.55), (20, 0.6)):
        row = {"step": step, "episodes": step * 16, "eval/accuracy": share}
        ledger.write(row | {"eval/accuracy_low": share - 0.1, "eval/accuracy_high": share + 0.1})
    run.finish()
    return run


def scored(gaps: Sequence[float], longer: Sequence[int]) -> Scored:
    """Pairs with these gaps, the chosen answer so much longer."""
    scores = np.array([[gap, 0.0] for gap in gaps])
    lengths = np.array([[10 + more, 10] for more in longer])
    return Scored(scores, lengths, [""] * len(scores), 1.0, scores.ravel()[:0])


def test_a_reward_model_is_compared_with_the_rule_of_length_pair_by_pair() -> None:
    """Longer and right twice (0, 0), shorter and right (1), shorter and wrong (0), equal and wrong (-1/2)."""
    worth = report(scored([1, 2, 1, -1, -1], [1, 1, -1, -1, 0]), np.array([[2, 1]]))
    gap = reward_model.over_length(worth)
    # mean 0.1, squares 0.01 + 0.01 + 0.81 + 0.01 + 0.36 over 4, and t of 4 degrees at 97.5%: 2.776
    assert (gap.value, gap.se) == pytest.approx((0.1, math.sqrt(0.3 / 5)))
    assert gap.high - gap.value == pytest.approx(2.776445 * math.sqrt(0.06), rel=1e-6)


def test_where_the_rule_prefers_the_shorter_answer_it_is_right_about_those() -> None:
    worth = report(scored([1, -1], [1, -1]), np.array([[1, 2]]))
    assert reward_model.over_length(worth).value == 0.0  # right where it is wrong, and the reverse


def test_accuracy_over_chance_is_the_share_less_a_half() -> None:
    gap = reward_model.over_chance(Accuracy(0.75, 0.0, 1.0, 8))
    assert (gap.value, gap.se) == pytest.approx((0.25, math.sqrt(8 * 0.1875 / 7 / 8)))


@pytest.mark.parametrize(
    ("gaps", "verdict"), [([1, 1, 1, -1], "holds"), ([1, -1, -1, -1], "does not hold")]
)
def test_a_reward_model_beats_length_or_does_not(
    tmp_path: Path, gaps: list[float], verdict: str
) -> None:
    held = scored(gaps * 25, [1, -1, 1, -1] * 25)
    run = a_reward_model(tmp_path, held, [[2, 1]])
    result = reward_model.draw({"HH": [run]}, gallery.spec("rm"))
    assert result.verdict == verdict
    assert result.reason.startswith("HH, accuracy minus chance: ")
    assert "; HH, accuracy minus that of preferring the longer answer: " in result.reason
    steps = [row for row in result.rows if row["plot"] == "steps"]
    assert [(row["x"], row["y"]) for row in steps] == [(10.0, 0.55), (20.0, 0.6)]
    pairs = [row["y"] for row in result.rows if row["plot"] == "gaps"]
    assert sum(map(int, map(str, pairs))) == 100
    assert result.rows[-1] | {"y": 0} == {
        "model": "HH", "key": "0000000001", "plot": "accuracy", "x": "length alone", "y": 0,
        "low": None, "high": None,
    }  # fmt: skip


def test_a_run_without_a_report_is_no_reward_model(tmp_path: Path) -> None:
    run = a_run(tmp_path, "ppo", seed=1)
    with refused(
        f"{run.path} has no report.json, which finished reward models have; name runs of stage=reward and"
        " train them again if they are older than reports."
    ):
        reward_model.draw({"HH": [run]}, gallery.spec("rm"))


# --- win rates


def measured(
    root: Path,
    algo: str,
    seed: int,
    gold: Sequence[float | None],
    score: Sequence[float | None] | None = None,
    kl: float = 1.0,
    **more: Any,
) -> Run:
    """A run whose last responses have these scores; the first have 0. Its responses name it and its step."""
    run = a_run(root, algo, seed, rows=[(0, 0.0, 0.0), (5, kl, 0.5)], prompts=len(gold), **more)
    score = gold if score is None else score
    for step, golds, scores in ((0, [0.0] * len(gold), [0.0] * len(gold)), (5, gold, score)):
        rows = [
            {"prompt": prompt, "response": f"{algo} {seed} {step}", "kl": kl * (step > 0)}
            | {"length": 5.0 + step, "gold": golds[place], "score": scores[place]}
            for place, prompt in enumerate(PROMPTS[: len(gold)])
        ]
        run.keep_samples(step, rows)
    return run


def expects(*orders: tuple[str, str, str]) -> list[dict[str, str]]:
    return [dict(zip(("measure", "better", "worse"), order, strict=True)) for order in orders]


def rates(result: Any) -> dict[tuple[str, str, str], float]:
    return {(row["measure"], row["first"], row["second"]): row["win_rate"] for row in result.rows}


def test_a_matrix_has_every_pair_by_quality_and_by_reward(tmp_path: Path) -> None:
    """ppo has more gold on 3 of 4 prompts in seed 1, and a tie more in seed 2: (6/8 + 7/8) / 2 by pairs."""
    runs = [
        measured(tmp_path, "p3o_v2", 1, [0, 0, 0, 2], [1, 1, 1, 1]),
        measured(tmp_path, "p3o_v2", 2, [0, 0, 0, 1], [1, 1, 1, 1]),
        measured(tmp_path, "ppo", 1, [1, 1, 1, 1], [0, 0, 0, -1]),
        measured(tmp_path, "ppo", 2, [1, 1, 1, 1], [0, 0, 0, -1]),
    ]
    spec = spec_of("p3o_winrate", expects=expects(("reward", "p3o_v2", "ppo")))
    result = winrate.draw({"HH": runs}, spec)
    assert rates(result) == {
        ("quality", "sft", "p3o_v2"): 3 / 8,
        ("quality", "sft", "ppo"): 0.0,
        ("quality", "p3o_v2", "ppo"): (1 / 4 + 1 / 8) / 2,
        ("reward", "sft", "p3o_v2"): 0.0,
        ("reward", "sft", "ppo"): 5 / 8,
        ("reward", "p3o_v2", "ppo"): 1.0,
    }
    assert all(row["seeds"] == 2 for row in result.rows)
    assert result.verdict == "holds"
    assert result.reason == (
        "HH, p3o_v2 over ppo by reward, win rate minus 1/2: +0.500 [+0.500, +0.500] (intervals of 95%)."
    )
    assert pictures(result.figure)["png"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("better", "worse", "verdict"), [("ppo", "sft", "holds"), ("sft", "ppo", "does not hold")]
)
def test_an_order_is_judged_whichever_way_round_the_matrix_has_it(
    tmp_path: Path, better: str, worse: str, verdict: str
) -> None:
    runs = [measured(tmp_path, "ppo", seed, [1] * 7 + [-1]) for seed in (1, 2, 3)]
    spec = spec_of("p3o_winrate", expects=expects(("quality", better, worse)))
    assert winrate.draw({"HH": runs}, spec).verdict == verdict


def test_over_one_policy_the_claim_is_about_differences_of_win_rates(tmp_path: Path) -> None:
    """7 of 8 against 1 of 8: 3/4 apart. Settings of an algorithm are policies of their own."""
    runs = [
        measured(tmp_path, "rloo", 1, [1] * 7 + [-1], hyper={"responses": 4}),
        measured(tmp_path, "rloo", 1, [1] * 4 + [-1] * 4, hyper={"responses": 2}),
        measured(tmp_path, "ppo", 1, [1] + [-1] * 7),
    ]
    wanted = expects(("quality", "rloo responses=4", "ppo"))
    result = winrate.draw({"all": runs}, spec_of("rloo_winrate", expects=wanted))
    assert {names[1:]: rate for names, rate in rates(result).items() if names[0] == "quality"} == {
        ("rloo responses=4", "sft"): 7 / 8,
        ("rloo responses=2", "sft"): 1 / 2,
        ("ppo", "sft"): 1 / 8,
    }
    assert result.verdict == "holds"
    assert result.reason.startswith(
        "all, rloo responses=4 over ppo by quality, difference of win rates over sft: +0.750 ["
    )


def test_where_there_is_no_gold_a_language_model_tells_from_its_cache(tmp_path: Path) -> None:
    """Preferred in both orders on a and b, in one on c: two wins, a tie, and d was never asked."""
    runs = [measured(tmp_path, algo, 1, [None] * 4, [0, 0, 0, 0]) for algo in ("ppo", "vpg")]
    answers = Answers(tmp_path / "cache")

    def say(prompt: str, first: str, second: str, verdict: str) -> None:
        question = Question("m", "hh-1", prompt, f"{first} 1 5", f"{second} 1 5")
        answers.add(question, f"Verdict: {verdict}")

    for prompt in "ab":
        say(prompt, "ppo", "vpg", "A")
        say(prompt, "vpg", "ppo", "B")
    say("c", "ppo", "vpg", "A")
    say("c", "vpg", "ppo", "A")
    llm = {"model": "m", "prompt": "hh-1", "cache": str(tmp_path / "cache")}
    spec = spec_of(
        "rloo_winrate", against="vpg", llm=llm, expects=expects(("quality", "ppo", "sft"))
    )
    for prompt in PROMPTS[:4]:
        for first, second in (("sft", "vpg 1 5"), ("vpg 1 5", "sft")):
            answers.add(Question("m", "hh-1", prompt, first, second), "Verdict: tie")
    # SFT's responses are those of step 0, under either run's name.
    for owner in ("ppo", "vpg"):
        for prompt in PROMPTS[:4]:
            pair = (f"{owner} 1 0", "vpg 1 5")
            for first, second in (pair, pair[::-1]):
                answers.add(Question("m", "hh-1", prompt, first, second), "Verdict: tie")
    result = winrate.draw({"all": runs}, spec)
    assert rates(result)["quality", "ppo", "vpg"] == pytest.approx(5 / 6)
    assert rates(result)["quality", "sft", "vpg"] == 0.5


def test_a_policy_nobody_can_judge_is_named(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "ppo", 1, [None] * 4, [0, 0, 0, 0])]
    with refused(
        "nobody can tell the quality of sft from that of ppo in the panel HH; ask a language model by"
        " `rlhf winrate judge=llm`, and name it in options.llm."
    ):
        winrate.draw({"HH": runs}, gallery.spec("p3o_winrate"))
    runs = [measured(tmp_path, "vpg", 1, [0, 0, 0, 0], [None] * 4)]
    with refused(
        "nobody can tell the reward of sft from that of vpg in the panel HH; train the runs with"
        " eval.proxy=true."
    ):
        winrate.draw({"HH": runs}, gallery.spec("p3o_winrate"))


def test_policies_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "ppo", 1, [0] * 4), measured(tmp_path, "vpg", 2, [0] * 4)]
    with refused(
        "ppo and vpg have no seed in common, and runs are compared seed by seed; give both the same"
        " seeds."
    ):
        winrate.draw({"HH": runs}, gallery.spec("p3o_winrate"))


def test_a_policy_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "ppo", 1, [0] * 4)]
    with refused("options.against=rloo is none of the policies; choose one of sft, ppo."):
        winrate.draw({"HH": runs}, spec_of("rloo_winrate", against="rloo"))
    with refused(
        "options.expects names dpo_online and ppo, which are not compared; the policies are sft, ppo."
    ):
        winrate.draw({"HH": runs}, gallery.spec("p3o_winrate"))


# --- the table


def runs_of(root: Path, algo: str, gold: float, kl: float = 1.0) -> list[Run]:
    """Two seeds whose gold rises in a straight line to about `gold` at `kl` nats."""
    wiggle = np.linspace(-0.1, 0.1, len(PROMPTS))
    return [measured(root, algo, seed, list(gold + 0.01 * seed + wiggle), kl=kl) for seed in (1, 2)]


def test_the_shared_kl_is_the_largest_that_half_of_the_curves_reached(tmp_path: Path) -> None:
    ends = {"ppo": 0.4, "vpg": 1.0, "rloo": 2.0}
    gathered = curves([run for algo, kl in ends.items() for run in runs_of(tmp_path, algo, 1, kl)])
    assert table.shared_kl(gathered, (0.25, 0.5, 1.0, 2.0, 4.0)) == 1.0  # two of three got there
    assert table.shared_kl(gathered, (3.0, 4.0)) == 3.0  # none; then the smallest


@pytest.mark.parametrize(("best", "verdict"), [("p3o_v2", "holds"), ("ppo", "does not hold")])
def test_curves_are_sorted_by_gold_at_the_same_kl_and_the_best_is_judged(
    tmp_path: Path, best: str, verdict: str
) -> None:
    """At half the KL at which they end, gold is half of that at the end."""
    runs = [
        *runs_of(tmp_path, "ppo", 2.0, kl=1.0),
        *runs_of(tmp_path, "p3o_v2", 4.0, kl=1.0),
        *runs_of(tmp_path, "spin", 1.0, kl=0.2),
    ]
    spec = spec_of("table_frontier", best=best, kls=[0.5])
    result = table.draw({"HH": runs}, spec)
    rows = {str(row["curve"]): row for row in result.rows}
    assert list(rows) == ["p3o_v2", "ppo", "spin"]
    assert [rows[name]["gold"] for name in ("p3o_v2", "ppo")] == pytest.approx([2.0075, 1.0075])
    assert rows["spin"]["gold"] is None and rows["spin"]["reached"] == 0
    assert rows["spin"]["kl_at_end"] == pytest.approx(0.2)
    assert result.verdict == verdict
    below, above = (1, 0) if best == "p3o_v2" else (0, 1)
    assert result.reason.startswith(
        f"HH, gold at a KL of 0.5 nats: of 1 others that got there {below} lie below {best} and {above}"
        " above, by intervals of 95% that are not corrected, and 1 did not get there; highest beside it: "
    )


def test_the_table_has_both_rewards_at_the_kl_and_what_they_took(tmp_path: Path) -> None:
    runs = [*runs_of(tmp_path, "ppo", 2.0), *runs_of(tmp_path, "p3o_v2", 4.0)]
    result = table.draw({"HH": runs}, spec_of("table_frontier", kls=[0.5]))
    assert result.table is not None
    head, first, second = text(result.table, "csv").splitlines()
    lines = [dict(zip(head.split(","), row.split(","), strict=True)) for row in (first, second)]
    assert [line["curve"] for line in lines] == ["p3o_v2", "ppo"]
    assert float(lines[0]["gold there"]) == pytest.approx(2.0075)
    assert (lines[0]["at KL"], lines[0]["tried"], lines[0]["seeds"]) == ("0.5", "1", "2")
    assert float(lines[0]["episodes"]) == 11 * 128  # of the last row that `a_run` writes
    assert result.table.notes[0].startswith("Intervals of 95% over prompts and seeds at the KL;")


def test_the_best_must_be_one_curve(tmp_path: Path) -> None:
    with refused(
        "options.best=p3o_v2 is 0 curves in the panel HH; it must be one, whose runs differ in their seed"
        " only."
    ):
        table.draw({"HH": runs_of(tmp_path, "ppo", 1.0)}, gallery.spec("table_frontier"))


# --- beams and credit, drawn from what was prepared


def prepared(spec: Spec, run: Run, made: Mapping[str, Any]) -> Run:
    file = spec.made_of(run)
    file.parent.mkdir()
    file.write_text(json.dumps(made))
    return run


def decoded(wins: Mapping[int, int], tokens: Mapping[int, int]) -> dict[str, Any]:
    """Of 8 prompts so many win at each width, by one point; the others lose by as much."""
    return {
        "prompts": list(PROMPTS),
        "answers": [0.0] * 8,
        "widths": {
            width: [
                {"tokens": tokens[width], "score": 1.0 if place < won else -1.0}
                for place in range(8)
            ]
            for width, won in wins.items()
        },
    }


@pytest.mark.parametrize(
    ("wins", "verdict"),
    [
        ({1: 1, 5: 7, 20: 1}, "holds"),
        ({1: 1, 5: 7, 20: 8}, "open"),
        ({1: 7, 5: 1, 20: 0}, "does not hold"),
    ],
)
def test_five_beams_are_best_and_more_are_longer_or_not(
    tmp_path: Path, wins: dict[int, int], verdict: str
) -> None:
    spec = spec_of("beam", widths=[1, 5, 20])
    made = decoded(wins, {1: 10, 5: 12, 20: 30})
    runs = [prepared(spec, measured(tmp_path, "dpo", seed, [0] * 8), made) for seed in (1, 2)]
    result = beam.draw({"TL;DR": runs}, spec)
    assert result.verdict == verdict
    assert "tokens, 20 beams - 5: +18.000 [+18.000, +18.000]" in result.reason
    values = {(row["measure"], row["width"]): row["value"] for row in result.rows}
    assert [values["win rate", width] for width in (1, 5, 20)] == [wins[w] / 8 for w in (1, 5, 20)]
    assert [values["length", width] for width in (1, 5, 20)] == [10, 12, 30]


def test_other_options_ask_for_another_preparation(tmp_path: Path) -> None:
    run = measured(tmp_path, "dpo", 1, [0] * 8)
    spec = spec_of("beam", widths=[1, 5, 20])
    prepared(spec, run, {})
    assert spec.made(run) == {}
    with refused(
        f"{run.path.name} has not been prepared for the figure beam; `rlhf figure beam --run` does that."
    ):
        beam.draw({"TL;DR": [run]}, spec_of("beam", widths=[1, 5, 10]))


def test_the_best_width_must_be_decoded() -> None:
    with pytest.raises(UserError, match=r"options\.best=5 .*must be one of options\.widths"):
        beam.draw({}, spec_of("beam", widths=[1, 2]))


def credited(before: float, inside: float, after: float) -> dict[str, Any]:
    """Four tokens, the middle two of which are the sentence."""
    return {
        "tokens": [" a", " b", ".", " c"],
        "credit": [before, inside / 2, inside / 2, after],
        "span": [1, 3],
    }


@pytest.mark.parametrize(
    ("inside", "after", "verdict"),
    [(0.5, 0.1, "holds"), (0.5, -0.6, "does not hold"), (-0.5, 0.0, "does not hold")],
)
def test_credit_is_lost_in_the_sentence_and_not_after_it(
    tmp_path: Path, inside: float, after: float, verdict: str
) -> None:
    """The drop is `inside` in the sentence and `after` after it, give or take, in every answer."""
    pairs = [
        {
            "prompt": prompt,
            "beta": 0.2,
            "original": credited(0.3, inside + 0.01 * place, after),
            "corrupted": credited(0.3, 0.0, 0.0),
        }
        for place, prompt in enumerate(PROMPTS)
    ]
    spec = gallery.spec("credit")
    run = prepared(spec, measured(tmp_path, "dpo", 1, [0] * 8), {"pairs": pairs})
    result = credit.draw({"TL;DR": [run]}, spec)
    assert result.verdict == verdict
    drops = {row["where"]: row["drop"] for row in result.rows if "where" in row}
    assert drops == pytest.approx({"in the sentence": inside + 0.035, "after it": after})
    tokens = [row for row in result.rows if "token" in row]
    assert [row["answer"] for row in tokens] == ["original"] * 4 + ["corrupted"] * 4
    assert [row["credit"] for row in tokens[4:]] == [0.3, 0.0, 0.0, 0.0]


def test_an_answer_is_corrupted_in_its_middle_sentence_by_the_next_answers_first_new_one() -> None:
    pairs = [
        Pair("p", " One. Two. Three.", " x"),
        Pair("q", " Two. New one! Four.", " x"),  # " Two." is nothing new to p
        Pair("r", " Alone.", " x"),  # q gets its only sentence; r itself has one sentence
        Pair("s", " Five. Six.", " x"),  # nothing follows
    ]
    found = list(corrupted.corruptions(pairs))
    assert [(prompt, old.text, new.text) for prompt, old, new in found] == [
        ("p", " One. Two. Three.", " One. New one! Three."),
        ("q", " Two. New one! Four.", " Two. Alone. Four."),
    ]
    assert [(old.sentence, new.sentence) for _, old, new in found] == [
        (" Two.", " New one!"),
        (" New one!", " Alone."),
    ]


def test_the_credit_of_a_real_policy_is_the_same_up_to_the_corrupted_sentence(
    chain: Chain,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that the policy would read cut is left out, as its sentence may be what is missing."""
    run = Run(chain.runs / "rl" / "mine-s1-aaaaaaaaaa")
    long, one, two, three = chain.corpus.heldout.prompts[:4]
    pairs = (
        Pair(long, " Rest." * 100, " x"),
        Pair(one, " A. B. C.", " x"),
        Pair(two, " D. E.", " x"),
        Pair(three, " F.", " x"),
    )
    short = replace(chain.corpus, heldout=replace(chain.corpus.heldout, pairs=pairs))
    monkeypatch.setattr(corrupted, "corpus_of", lambda _: short)
    spec = spec_of("credit", answers=2)
    corrupted.prepare({"HH": [run]}, spec)
    first, second = spec.made(run)["pairs"]
    assert (first["prompt"], second["prompt"], first["beta"]) == (one, two, 0.2)
    for pair, sentences in (
        (first, (" B.", " D.")),
        (second, (" E.", " F.")),
    ):
        spans = [pair[name]["span"] for name in ("original", "corrupted")]
        for name, (begin, end), sentence in zip(
            ("original", "corrupted"), spans, sentences, strict=True
        ):
            assert "".join(pair[name]["tokens"][begin:end]) == sentence
            assert pair[name]["tokens"][-1] == "<|end|>"
        begin = spans[0][0]
        before = [pair[name]["credit"][:begin] for name in ("original", "corrupted")]
        assert len(before[0]) > 1 and before[0] == pytest.approx(before[1], abs=1e-5)  # fp32
        assert pair["original"]["credit"][begin:] != pair["corrupted"]["credit"][begin:]
    with refused(
        "options.answers=3 is more than the 2 held-out answers of rl/mine-s1-aaaaaaaaaa that have two"
        " sentences and are not too long for it; lower it."
    ):
        corrupted.credits(run, 3)


def test_a_run_is_decoded_once_with_every_width_and_judged_by_gold(
    chain: Chain,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(chain.runs / "rl" / "mine-s1-aaaaaaaaaa")
    spec = spec_of("beam", widths=[1, 3], prompts=2, best=3)
    beams.prepare({"HH": [run]}, spec)
    made = spec.made(run)
    prompts, gold = list(chain.corpus.heldout.prompts[:2]), chain.corpus.gold
    assert gold is not None and made["prompts"] == prompts
    chosen = {pair.prompt: pair.chosen for pair in reversed(chain.corpus.heldout.pairs)}
    assert made["answers"] == gold(prompts, [chosen[prompt] for prompt in prompts])
    for width in ("1", "3"):
        said = [one["response"] for one in made["widths"][width]]
        assert [one["score"] for one in made["widths"][width]] == gold(prompts, said)
    monkeypatch.setattr(beams, "beams", None)  # would fail if it were called again
    beams.prepare({"HH": [run]}, spec)
