"""Policies against each other, response by response: from the samples of runs to tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from rlhf_cli.errors import UserError
from rlhf_cli.evals.grid import Cell, Grid
from rlhf_cli.evals.winrate import (
    Floats,
    Position,
    Share,
    WinRate,
    by_both_orders,
    by_score,
    position,
    win_rate,
)
from rlhf_cli.judges.cache import Question
from rlhf_cli.judges.llm import Estimate, Judge
from rlhf_cli.recipes import ByScore, Chat
from rlhf_cli.recipes import Judge as Source
from rlhf_cli.store.key import canonical
from rlhf_cli.store.run import Run, all_runs, find

SFT = "sft"
"""The word for the policy that the runs started from."""
COLUMNS = (
    "pair", "prompts", "wins", "ties", "losses", "left out", "win rate", "at equal length",
    "first shown",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """What a policy answered in one evaluation; all columns [N], prompt by prompt."""

    name: str
    origin: str
    """Which evaluation of which run."""
    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    lengths: Floats
    """Tokens."""
    reward: Floats
    """nan where there is none, as in `gold`."""
    gold: Floats

    def scores(self, kind: str) -> Floats:
        """Those that a judge by score goes by."""
        return self.gold if kind == "gold" else self.reward


@dataclass(frozen=True)
class Match:
    """One pair of policies, judged."""

    first: str
    second: str
    result: WinRate
    position: Position | None
    """None for a judge that is shown no order."""


def policies(root: Path, words: Sequence[str], judge: Source) -> list[Policy]:
    """The policies that runs (by directory, name or key) ended with, and the one called `sft`.

    Runs of `rlhf eval` are welcome; of several responses to a prompt, the first counts. Raises UserError
    for fewer than two policies, for runs that were asked different prompts, and for scores that are not
    there or not of one kind.
    """
    found = {word: find(root, word) for word in dict.fromkeys(words) if word != SFT}
    runs = list({run.path.resolve(): run for run in found.values()}.values())
    if not runs or len(runs) + (SFT in words) < 2:
        raise UserError(
            "a win rate is between two policies; name two runs by directory, name or key, or a run"
            f" and {SFT}."
        )
    if SFT in words:
        _refuse_unequal(runs, _sft_parent, f"`{SFT}` may mean several policies", "leave it out")
    if judge.kind == "reward":
        _refuse_unequal(
            runs, _reward, "rewards of different kinds cannot be compared", "use judge=gold or llm"
        )
    names = _names(runs)
    made = [_at_end(run, names[run], judge.prompts) for run in runs]
    if SFT in words:
        made.insert(0 if words[0] == SFT else len(made), _start(root, runs, judge.prompts))
    _check(made, judge)
    return made


def _refuse_unequal(
    runs: Sequence[Run], what: Callable[[Run], object], fault: str, remedy: str
) -> None:
    for run in runs[1:]:
        if what(run) != what(runs[0]):
            raise UserError(
                f"{fault}, since {runs[0].path.name} and {run.path.name} differ in theirs; {remedy}."
            )


def _sft_parent(run: Run) -> object:
    return run.manifest()["parents"].get("sft")


def _reward(run: Run) -> object:
    """What decides the scores in a run's samples."""
    manifest = run.manifest()
    science = manifest["science"]
    contract = science.get("contract", science)  # of another run, for one of `rlhf eval`
    return manifest["parents"].get("reward"), canonical(contract.get("scoring"))


def _names(runs: Sequence[Run]) -> dict[Run, str]:
    """The algorithm and the seed, and the key where several have both in common."""
    short = {}
    for run in runs:
        algo, seed = (run.manifest().get(word) for word in ("algo", "seed"))
        short[run] = str(algo) if seed is None else f"{algo} s{seed}"
    often = Counter(short.values())
    return {run: name if often[name] == 1 else f"{name} {run.key}" for run, name in short.items()}


def _at_end(run: Run, name: str, most: int | None) -> Policy:
    files = sorted(run.samples.glob("*.jsonl"), key=lambda file: int(file.stem))
    if not files:
        raise UserError(
            f"{run.path.name} has no evaluation whose responses could be compared; name an RL run, or"
            f" {SFT} for the policy it started from."
        )
    status = run.status()
    step = "" if run.stage == "eval" else f" after step {int(files[-1].stem)}"
    far = "" if status == "done" else f" (the run is {status})"
    return _policy(name, f"{run.path.name}{step}{far}", run, files[-1], most)


def _start(root: Path, runs: Sequence[Run], most: int | None) -> Policy:
    """The SFT policy, as an RL run found it before its first step."""

    def measured(run: Run) -> object:
        return _sft_parent(run), _reward(run), run.manifest().get("data")

    for run in (*runs, *all_runs(root)):
        first = run.samples / "000000.jsonl"
        if run.stage == "rl" and first.is_file() and measured(run) == measured(runs[0]):
            return _policy(SFT, f"{run.path.name} before step 1", run, first, most)
    raise UserError(
        f"no RL run in {root} began with the SFT policy of {runs[0].path.name} and was measured alike;"
        f" leave {SFT} out."
    )


def _policy(name: str, origin: str, run: Run, file: Path, most: int | None) -> Policy:
    rows = run.responses(int(file.stem))
    rows = rows[:: run.manifest()["science"].get("draws", 1)][:most]

    def column(field: str) -> Floats:
        return np.array([math.nan if (x := row.get(field)) is None else x for row in rows], float)

    return Policy(
        name,
        origin,
        tuple(row["prompt"] for row in rows),
        tuple(row["response"] for row in rows),
        column("length"),
        column("score"),
        column("gold"),
    )


def _check(made: Sequence[Policy], judge: Source) -> None:
    for policy in made:
        if policy.prompts != made[0].prompts:
            raise UserError(
                f"{made[0].name} and {policy.name} answered different prompts ({made[0].origin};"
                f" {policy.origin}); name runs on the same data with the same eval.prompts."
            )
        if isinstance(judge, ByScore) and np.isnan(policy.scores(judge.kind)).all():
            raise UserError(
                f"judge={judge.kind} compares the {judge.kind} of responses, but {policy.name} has none"
                f" ({policy.origin}); choose another judge."
            )


# --- by a language model


def questions(made: Sequence[Policy], judge: Judge) -> list[Question]:
    """All that is asked of a judge about all pairs: both orders, but nothing about equal responses."""
    return [
        question
        for pair in combinations(made, 2)
        for straight, swapped in _orders(*pair, judge)
        if straight != swapped
        for question in (straight, swapped)
    ]


def _orders(first: Policy, second: Policy, judge: Judge) -> list[tuple[Question, Question]]:
    """[N] the question with each of the two responses shown first."""
    return [
        (judge.question(prompt, one, other), judge.question(prompt, other, one))
        for prompt, one, other in zip(first.prompts, first.responses, second.responses, strict=True)
    ]


def announce(made: Sequence[Policy], source: Source) -> str:
    """What judging will take, in a sentence; nobody is asked yet."""
    if isinstance(source, ByScore):
        return f"judge={source.kind} reads scores that are there: no calls."
    judge = Judge(source)
    return _said(judge.estimate(questions(made, judge)), source)


def _said(estimate: Estimate, source: Chat) -> str:
    price = "" if estimate.price is None else f", for at most {estimate.price:.2f}"
    return (
        f"judge={source.model}: {estimate.calls:,} calls, {estimate.cached:,} answers are there; about"
        f" {estimate.tokens_in:,} tokens in and at most {estimate.tokens_out:,} out{price}."
    )


# --- judged


def judged(made: Sequence[Policy], source: Source, console: Console) -> list[Match]:
    """Every pair of policies. Progress is shown on the console if it is a terminal.

    Raises UserError if a language model does not answer.
    """
    pairs = list(combinations(made, 2))
    if isinstance(source, ByScore):
        return [_by_score(*pair, source) for pair in pairs]
    judge = Judge(source)
    verdicts = _verdicts(judge, questions(made, judge), console)
    return [_by_verdict(*pair, judge, verdicts) for pair in pairs]


def _verdicts(judge: Judge, asked: Sequence[Question], console: Console) -> dict[Question, float]:
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("judging", total=judge.estimate(asked).calls)
        answers = judge.verdicts(asked, lambda: bar.advance(task))
    return dict(zip(asked, answers, strict=True))


def _by_score(first: Policy, second: Policy, source: ByScore) -> Match:
    scores = first.scores(source.kind), second.scores(source.kind)
    outcome = by_score(*scores, source.tolerance)
    result = win_rate(outcome, first.lengths - second.lengths)
    return Match(first.name, second.name, result, None)


def _by_verdict(
    first: Policy, second: Policy, judge: Judge, verdicts: dict[Question, float]
) -> Match:
    orders = _orders(first, second, judge)
    # Equal responses tie unasked.
    straight, swapped = (
        np.array([verdicts.get(pair[place], 0.5) for pair in orders]) for place in (0, 1)
    )
    result = win_rate(by_both_orders(straight, swapped), first.lengths - second.lengths)
    return Match(first.name, second.name, result, position(straight, swapped))


# --- as tables


def tables(made: Sequence[Policy], source: Source, matches: Sequence[Match]) -> list[Grid]:
    """The pairs with all there is to say, and for more than two policies a matrix of rates."""
    title = f"Win rates by {source.model if isinstance(source, Chat) else source.kind}"
    rows = tuple(_row(match) for match in matches)
    pairs = Grid(title, COLUMNS, rows, tuple(_notes(made, source, matches)))
    grids = [pairs.without_empty_columns()]
    if len(made) > 2:
        grids.append(_matrix(f"{title}: of the row over the column", made, matches))
    return grids


def _row(match: Match) -> tuple[object, ...]:
    result = match.result
    return (
        f"{match.first} over {match.second}",
        result.wins + result.ties + result.losses,
        result.wins,
        result.ties,
        result.losses,
        result.untold or None,
        _cell(result.rate),
        _cell(result.at_equal_length),
        match.position.first if match.position else None,
    )


def _cell(share: Share) -> Cell:
    return Cell(share.value, interval=(share.low, share.high))


def _matrix(title: str, made: Sequence[Policy], matches: Sequence[Match]) -> Grid:
    rate = {(match.first, match.second): match.result.rate.value for match in matches}
    rate |= {(second, first): 1 - value for (first, second), value in rate.items()}
    names = [policy.name for policy in made]
    rows = tuple((row, *(rate.get((row, column)) for column in names)) for row in names)
    return Grid(title, ("policy", *names), rows)


def _notes(made: Sequence[Policy], source: Source, matches: Sequence[Match]) -> list[str]:
    notes = [
        "The win rate counts a tie as half a win; intervals are of 95% over prompts, not over seeds.",
        "At equal length: what a logistic regression on the difference in tokens leaves of it"
        " (Dubois et al. 2024, arXiv:2404.04475).",
        *(f"{policy.name}: {policy.origin}." for policy in made),
    ]
    untold = sum(match.result.untold for match in matches)
    if isinstance(source, ByScore):
        notes.append(f"Scores that differ by no more than {source.tolerance:g} tie.")
        return [*notes, *([f"Left out, since a score is missing: {untold:,}."] if untold else [])]
    undone = sum(match.position.contradicted for match in matches if match.position)
    told = len(made[0].prompts) * len(matches) - untold
    notes += [
        f"{source.model} at temperature 0, wording {source.prompt}, asked in both orders; what is not a"
        f" win in both is a tie. In {undone:,} of {told:,} comparisons it preferred a place, first or"
        " second, to a response.",
        "First shown: share of decided verdicts for the response shown first, 0.5 without bias.",
    ]
    unreadable = f"Left out, since an answer was unreadable even asked twice: {untold:,}."
    return [*notes, *([unreadable] if untold else [])]
