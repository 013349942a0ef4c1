"""`rlhf report`: what the page says is what the runs hold, it fetches nothing, and it is only text."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf_cli.errors import UserError
from rlhf_cli.evals.comparison import compare
from rlhf_cli.evals.curves import curves
from rlhf_cli.evals.grid import Grid, shown
from rlhf_cli.evals.overoptimisation import overoptimisation
from rlhf_cli.evals.table import points
from rlhf_cli.figures.learning import series
from rlhf_cli.figures.panels import distances
from rlhf_cli.report.page import write
from rlhf_cli.report.samples import checkpoints
from rlhf_cli.report.settings import differences
from rlhf_cli.store.metrics import Ledger
from rlhf_cli.store.run import Run
from tests.conftest import Typed
from tests.test_store import a_run

SECTIONS = [
    "summary", "frontier", "matched", "win-rates", "learning", "over-optimisation", "samples",
    "budget", "settings", "provenance",
]  # fmt: skip
STEPS = (0, 4, 8, 12)
PROMPTS = 8
VOID = {"meta", "link", "br"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """A page, read: elements, the text under each id, tables by their captions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.under: dict[str, str] = defaultdict(str)
        self.tables: dict[str, list[list[str]]] = {}
        self.doubts: list[str] = []
        self._open: list[tuple[str, str, str]] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        assert self._open == [], "elements are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        if tag in VOID:
            return
        self._open.append((tag, given.get("id", ""), given.get("class", "")))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "li" and self._within("doubts"):
            self.doubts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        for _, name, _ in self._open:
            if name:
                self.under[name] += data
        inside = self._open[-1][0] if self._open else ""
        if inside in ("td", "th"):
            self._rows[-1][-1] += data
        elif inside == "caption":
            self._caption += data
        elif inside == "li" and self._within("doubts"):
            self.doubts[-1] += data

    def _within(self, name: str) -> bool:
        return any(name in classes.split() for _, _, classes in self._open)

    @property
    def sections(self) -> list[str]:
        return [given["id"] for tag, given in self.elements if tag == "section"]


def sampled(
    root: Path,
    algo: str,
    seed: int,
    *,
    pace: float = 1.0,
    gold: bool = True,
    response: str = " Yes.",
    prompts: int = PROMPTS,
    steps: Sequence[int] = STEPS,
    **manifest: object,
) -> Run:
    """A run at a KL of `pace` times 0, 1, 2, ..., whose samples have just these means."""
    run = a_run(root, algo, seed, rows=(), prompts=prompts, **manifest)
    run.update(command=f"rlhf train algo={algo} seed={seed}", commit="c0ffee" * 6)
    run.metrics_path.unlink()
    ledger, chance = Ledger(run.metrics_path), random.Random(f"{algo} {seed}")
    for point, step in enumerate(steps):
        kl = pace * point
        rows = [
            {
                "prompt": f"\n\nHuman: question {at}?\n\nAssistant:",
                "response": response,
                "kl": kl + (at % 2 - 0.5) / 10,
                "length": 20.0 + point,
                "score": kl / 2 + chance.gauss(0, 0.3),
                **({"gold": kl / 3 + chance.gauss(0, 0.3)} if gold else {}),
            }
            for at in range(prompts)
        ]
        run.keep_samples(step, rows)
        row: dict[str, float] = {"step": step, "episodes": 128 * step, "eval/prompts": prompts}
        row |= {"eval/kl": kl, "eval/kl_se": 0.05, "eval/reward_se": 0.1, "eval/length": 20 + point}
        row |= {"eval/reward": sum(r["score"] for r in rows) / prompts}
        if gold:
            row |= {"eval/gold": sum(r["gold"] for r in rows) / prompts, "eval/gold_se": 0.1}
        ledger.write(row)
    run.finish()
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two algorithms with two seeds each; the second goes twice as far."""
    root = tmp_path_factory.mktemp("pair")
    ways = (("p3o_v2", 1.0), ("ppo", 2.0))
    return [sampled(root, algo, seed, pace=pace) for algo, pace in ways for seed in (1, 2)]


@pytest.fixture(scope="module")
def page(pair: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return made(pair, tmp_path_factory.mktemp("page"))


def made(runs: Sequence[Run], folder: Path, kls: Sequence[float] = ()) -> Page:
    return Page(write(runs, folder, kls, "rlhf report").read_text(encoding="utf-8"))


def lines(grid: Grid) -> list[list[str]]:
    return [[*grid.columns], *([shown(cell) for cell in row] for row in grid.rows)]


# --- what is on the page


def test_the_sections_stand_in_order_and_the_menu_leads_to_each(page: Page) -> None:
    assert page.sections == SECTIONS
    links = [given["href"] for tag, given in page.elements if tag == "a"]
    assert links == ["#content", *(f"#{name}" for name in SECTIONS)]


def test_the_head_says_data_model_seeds_day_and_commit(page: Page) -> None:
    assert "<h1>hh-embedded · nano</h1>" in page.text
    facts = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page.text))
    day = facts.pop("trained")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d( to \d{4}-\d\d-\d\d)?", day)
    assert {
        name: facts[name] for name in ("data", "model", "seeds", "runs", "curves", "commit")
    } == {
        "data": "hh-embedded",
        "model": "nano",
        "seeds": "1, 2",
        "runs": "4",
        "curves": "2",
        "commit": "c0ffeec0ff",
    }


def test_the_tables_are_those_of_compare(page: Page, pair: list[Run]) -> None:
    grids = compare(pair, kls=[1, 2, 5]).grids
    assert page.tables[grids["matched"].title] == lines(grids["matched"])
    whole, summary = grids["curves"], page.tables[grids["curves"].title]
    assert summary[0] == ["curve", "seeds", "KL", "proxy", "gold", "tried", "episodes"]
    assert summary == [[row[whole.columns.index(c)] for c in summary[0]] for row in lines(whole)]
    assert summary[2][:3] == ["ppo", "2", "6.00 ± 0.00"]  # three evaluations of 2 nats each
    assert page.tables["Means over seeds"] == [
        ["curve", "episodes", "steps"],
        ["p3o_v2", "1,536", "12"],
        ["ppo", "1,536", "12"],
    ]


def test_curves_are_compared_at_the_kls_that_are_asked_for(pair: list[Run], tmp_path: Path) -> None:
    grid = compare(pair, kls=[1.5]).grids["matched"]
    assert made(pair, tmp_path, [1.5]).tables[grid.title] == lines(grid)
    with pytest.raises(UserError, match="a KL of -1 nats tells no curves apart"):
        made(pair, tmp_path, [-1])


def test_win_rates_are_counted_over_all_pairs_of_seeds(page: Page, pair: list[Run]) -> None:
    def ends(run: Run, step: int) -> list[float]:
        text = (run.samples / f"{step:06d}.jsonl").read_text()
        return [json.loads(line)["gold"] for line in text.splitlines()]

    def rate(ours: list[list[float]], theirs: list[list[float]]) -> str:
        both = [(x > y) for a in ours for b in theirs for x, y in zip(a, b, strict=True)]
        return f"{sum(both) / len(both):.2f}"

    p3o, ppo = ([ends(run, 12) for run in mine] for mine in (pair[:2], pair[2:]))
    sft = [ends(pair[0], 0)]
    assert page.tables["By gold"] == [
        ["over", "sft", "p3o_v2", "ppo"],
        ["sft", "", rate(sft, p3o), rate(sft, ppo)],
        ["p3o_v2", rate(p3o, sft), "", rate(p3o, ppo)],
        ["ppo", rate(ppo, sft), rate(ppo, p3o), ""],
    ]
    assert len(page.tables["By reward, run by run"]) == 1 + 10  # pairs of four runs and sft


def test_the_fit_of_gold_is_that_of_overoptimisation(page: Page, pair: list[Run]) -> None:
    found = [overoptimisation(curve) for curve in curves(pair)]
    table = page.tables["Gold against √KL"]
    assert [row[0] for row in table] == ["curve", "p3o_v2", "ppo"]
    assert [row[1] for row in table[1:]] == [shown(one.alpha) for one in found]
    assert [row[4] for row in table[1:]] == [str(one.turning) for one in found]


def test_answers_are_shown_where_the_kl_is_nearest_to_the_smallest_final_one(
    page: Page, pair: list[Run]
) -> None:
    # finals: 3 nats and 6; of 0, 2, 4 and 6 both 2 and 4 are as near to 3, and the first is taken
    assert [(c.curve, c.seed, c.step) for c in checkpoints(curves(pair))] == [
        ("p3o_v2", 1, 12),
        ("ppo", 1, 4),
    ]
    assert page.tables["Which evaluations"][1:] == [
        ["p3o_v2", "1", "12", "3"],
        ["ppo", "1", "4", "2"],
    ]
    assert [n for n in range(PROMPTS) if f"question {n}?" in page.under["samples"]] == [*range(6)]
    first = json.loads((pair[2].samples / "000004.jsonl").read_text().splitlines()[0])
    for name, of in (("KL", "kl"), ("reward", "score"), ("gold", "gold")):
        assert f"<dt>{name}</dt><dd>{first[of]:.2f}</dd>" in page.text


def test_a_learning_curve_is_the_mean_where_all_seeds_have_been(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path, "ppo", seed=1, rows=[(0, 0.0, 1.0), (5, 1.0, 2.0), (9, 2.0, 5.0)]),
        a_run(tmp_path, "ppo", seed=2, rows=[(0, 0.0, 2.0), (5, 1.0, 4.0)]),
    ]
    (curve,) = series(runs, "eval/reward")
    assert curve.seeds == (((0, 1.0), (640, 2.0), (1152, 5.0)), ((0, 2.0), (640, 4.0)))
    assert curve.mean == [(0, 1.5), (640, 3.0)]
    assert series(runs, "eval/gold") == []


def test_gold_is_drawn_against_the_square_root_of_the_kl_which_is_never_below_0(
    tmp_path: Path,
) -> None:
    run = a_run(
        tmp_path, "ppo", seed=1, gold=True, rows=[(0, -1e-9, 0.0), (5, 4.0, 1.0), (9, 9.0, 2.0)]
    )
    _, gold = distances(points([run])).values()
    (line,) = gold.axes[0].get_lines()
    assert line.get_xydata().tolist() == [[0.0, 3.0], [2.0, 3.5], [3.0, 4.0]]


def test_settings_that_differ_are_told_by_curve_and_by_seed_where_seeds_differ(
    tmp_path: Path,
) -> None:
    one = a_run(tmp_path, "ppo", seed=1, hyper={"beta": 0.1, "clip": 0.2}, commit="ab" * 20)
    two = a_run(tmp_path, "ppo", seed=2, hyper={"beta": 0.1, "clip": 0.2})
    other = a_run(tmp_path, "dpo", seed=1, hyper={"beta": 0.1}, versions={"torch": "2"})
    grid = differences({"ppo": [one, two], "dpo": [other]})
    assert (grid.columns, grid.rows) == (
        ("setting", "ppo", "dpo"),
        (
            ("algo.clip", "0.2", ""),
            ("algo_class", "ppo", "dpo"),
            ("commit", "ababababab (s1), not set (s2)", ""),
            ("versions.torch", "", "2"),
        ),
    )


def test_the_provenance_has_every_run_and_every_command_once(page: Page, pair: list[Run]) -> None:
    rows = page.tables["Runs"]
    assert [row[1] for row in rows[1:]] == [run.key for run in pair]
    assert rows[0][:5] == ["run", "key", "status", "sft parent", "reward parent"]
    assert rows[1][2:6] == ["done", "aaaa", "bbbb", "c0ffeec0ff"]
    trained = [
        f"rlhf train algo={algo} seed={seed}" for algo in ("p3o_v2", "ppo") for seed in (1, 2)
    ]
    said = re.search(r"<pre .*?>(.*?)</pre>", page.text, re.DOTALL)
    assert said is not None and said[1].splitlines() == [*trained, "rlhf report"]


def test_the_same_runs_give_the_same_page(page: Page, pair: list[Run], tmp_path: Path) -> None:
    assert made(pair, tmp_path).text == page.text


# --- what it does with less


def test_a_run_alone_is_set_against_the_policy_it_started_from(tmp_path: Path) -> None:
    alone = made([sampled(tmp_path, "ppo", 1)], tmp_path)
    assert alone.sections == [name for name in SECTIONS if name != "settings"]
    assert alone.doubts == []
    assert [row[0] for row in alone.tables["By gold"]] == ["over", "sft", "ppo"]


def test_without_gold_nothing_is_said_of_gold(tmp_path: Path) -> None:
    runs = [sampled(tmp_path, algo, 1, gold=False) for algo in ("ppo", "p3o_v2")]
    found = made(runs, tmp_path)
    assert found.sections == [name for name in SECTIONS if name != "over-optimisation"]
    assert "By reward" in found.tables and "By gold" not in found.tables
    assert not re.search(r"<dt>gold</dt>|gold reward", found.text)


def test_without_samples_what_needs_them_is_left_out_and_said_first(tmp_path: Path) -> None:
    run = sampled(tmp_path, "ppo", 1)
    shutil.rmtree(run.samples)
    found = made([run], tmp_path)
    assert found.sections == [
        "summary",
        "frontier",
        "learning",
        "over-optimisation",
        "budget",
        "provenance",
    ]
    assert found.doubts == [
        f"Nothing can be said of single prompts: {run.samples}/000000.jsonl is missing, without which"
        f" nothing is known of single prompts; copy the folder samples of {run.path.name} back, or leave"
        " the run out."
    ]


def test_unfinished_runs_are_named_and_those_without_evaluation_left_out(tmp_path: Path) -> None:
    done, half, new = (sampled(tmp_path, "ppo", seed) for seed in (1, 2, 3))
    half.update(status="running")
    new.update(outputs={})
    new.fail("out of memory")
    new.metrics_path.unlink()
    found = made([done, half, new], tmp_path)
    assert found.doubts == [
        f"{half.path.name} is interrupted: its last evaluation stands for its end.",
        f"{new.path.name} is failed and has not been evaluated: it is left out.",
    ]
    assert [row[1:3] for row in found.tables["Runs"][1:]] == [
        [done.key, "done"],
        [half.key, "interrupted"],
    ]
    with pytest.raises(UserError, match="has no evaluation to compare"):
        made([new], tmp_path)


def test_unequal_runs_are_reported_with_what_is_unequal_first(tmp_path: Path) -> None:
    longer = sampled(tmp_path, "ppo", 1, steps=(*STEPS, 16))
    found = made([longer, sampled(tmp_path, "p3o_v2", 1)], tmp_path)
    assert found.doubts == [
        "Unequal, compared by force: numbers of episodes are 2048, but 1536 in p3o_v2."
    ]
    assert found.sections == SECTIONS


def test_a_gamed_reward_is_noted_beside_the_learning_curves(tmp_path: Path) -> None:
    run = sampled(tmp_path, "ppo", 1)
    last = {
        "step": 16,
        "episodes": 2048,
        "eval/prompts": PROMPTS,
        "eval/kl": 4.0,
        "eval/length": 60,
    }
    Ledger(run.metrics_path).write({**last, "eval/reward": 5.0, "eval/reward_se": 0.1})
    run.keep_samples(16, [json.loads(line) for line in (run.samples / "000012.jsonl").open()])
    run.finish()
    found = made([run], tmp_path)
    assert "while responses went from 20 to 60 tokens." in found.under["learning"]


# --- only text, and nothing from elsewhere


def test_nothing_is_fetched_and_no_script_runs(page: Page) -> None:
    for tag, given in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in given.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}:
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?:|@import|url\((?!#)", page.text)
    policy = next(g["content"] for t, g in page.elements if "http-equiv" in g)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


HOSTILE = (
    "</div><script>alert(1)</script> </style> <img src=//x onerror=y> &amp; \" '"
    " {{ 7 * 7 }} \x07\x1b[31m \u202egnp.exe\u2069 \u2028."
)


def test_whatever_a_prompt_or_an_answer_says_is_only_shown(tmp_path: Path) -> None:
    run = sampled(tmp_path, "ppo", 1, response=HOSTILE, title=HOSTILE, group=HOSTILE)
    found = made([run], tmp_path)  # that all elements close is checked there
    seen = HOSTILE.replace("\x07", "\u2407").replace("\x1b", "\u241b")
    seen = seen.replace("\u202e", "⟨U+202E⟩").replace("\u2069", "⟨U+2069⟩")
    assert found.under["samples"].count(seen) == 6
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img"} and "<script" not in found.text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", found.text)
    assert found.text.count("</style>") == 1


def test_the_page_can_be_read_without_seeing_it(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    names = [given["id"] for _, given in page.elements if "id" in given]
    assert len(names) == len(set(names))
    wanted = re.findall(r'(?:href="#|url\(#|labelledby=")([\w-]+)', page.text)
    assert set(wanted) <= set(names)
    drawings = [
        given for tag, given in page.elements if tag == "svg" and "aria-hidden" not in given
    ]
    # two panels of the frontier, four curves of learning, two distances and two swatches
    assert len(drawings) == 2 + 4 + 2 + 2
    assert all(given["role"] == "img" and given["aria-label"] for given in drawings)
    assert page.text.count("<table") == page.text.count("<caption>")
    assert page.text.startswith('<!doctype html>\n<html lang="en">')


def test_a_page_of_twelve_runs_is_below_five_megabytes(tmp_path: Path) -> None:
    steps = range(0, 36, 4)
    runs = [
        sampled(tmp_path, algo, seed, response="word " * 60, prompts=280, steps=steps)
        for algo in ("ppo", "p3o_v2", "rloo", "dpo")
        for seed in (1, 2, 3)
    ]
    text = made(runs, tmp_path).text
    assert len(text.encode()) < 5e6


# --- the command


def test_the_command_writes_the_page_where_it_is_told(typed: Typed, tmp_path: Path) -> None:
    run = sampled(tmp_path / "runs", "ppo", 1)
    code, out, err = typed("report", run.key, "--out", "pages/a.html")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "page: pages/a.html",
        "next: open the page, rlhf compare --out tables/NAME, rlhf winrate --help",
    ]
    assert Page((tmp_path / "pages/a.html").read_text(encoding="utf-8")).sections[0] == "summary"
    assert typed("report", "--kl", "1,2", "--out", "pages")[1].startswith(
        "page: pages/report.html\n"
    )
    code, _, err = typed("report", "--kl", "low")
    assert (code, err) == (
        2,
        "error: --kl=low is not allowed: give KLs in nats with commas between, such as --kl 1,2,5.\n",
    )


def complaints(file: Path, width: int, profile: Path) -> list[str]:
    """What a browser writes to its console while it draws the page; it is kept from any network."""
    assert BROWSER is not None
    picture = profile.with_suffix(".png")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-component-update",
        f"--user-data-dir={profile}", f"--window-size={width},900", f"--screenshot={picture}",
        file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="NOT TESTED in a browser: there is no chromium here")
def test_a_browser_has_nothing_to_complain_of_and_would_if_anything_were_fetched(
    pair: list[Run], tmp_path: Path
) -> None:
    file = write(pair, tmp_path, (), "")
    for width in (1280, 390):
        assert complaints(file, width, tmp_path / f"profile-{width}") == []
    file.write_text(
        file.read_text().replace("</main>", "<img src='https://example.org/a.png'></main>")
    )
    (said,) = complaints(file, 1280, tmp_path / "profile")
    assert "Content Security Policy" in said
