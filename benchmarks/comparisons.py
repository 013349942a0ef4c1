"""Who races whom, at which sizes, and which ratios are asked for."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from benchmarks import floor
from benchmarks.race import Contestant, Result, spread
from benchmarks.table import Line, judged, missing

WORDS = [
    "data=hh", "track=off", "sft.epochs=0", "reward.epochs=0.05", "reward.unended=null",
    "eval.points=1", "eval.prompts=32", "launch.timeout=7200",
]  # fmt: skip
"""Of every run: the shipped data and the shipped nano model, hardly trained, for only the time counts."""
FOLDER = Path(__file__).parents[1] / "build" / "bench"
"""Where runs, logs and results go, unless told otherwise."""
ROWS = 2048
"""Rows of the dataset that contestants other than ours are given."""
BATCH = 32
"""Rows, or pairs, of an offline step."""
NO_TRL = "TRL is not installed: pip install 'rlhf-cli[bench]'"

Results = Mapping[str, Result]
Judge = Callable[[Results], list[Line]]


class Race(Protocol):
    """Contestants, and what is to be said of their results."""

    def enter(self, folder: Path) -> tuple[list[Contestant], Judge]:
        """Makes what they start from in a folder, once."""
        ...


@dataclass(frozen=True)
class Goals:
    """What ratios are to be; empty is a ratio that is only told."""

    trl: str = ""
    trl_dpo: str = ""
    bare: str = ""
    floor: str = ""
    ppo: str = ""
    memory: str = ""


@dataclass(frozen=True)
class Online:
    """Steps of drawing and learning: `prompts` of them, `each` responses to one, of `reply` tokens."""

    prompts: int
    each: int
    reply: int
    pairs: Mapping[str, Sequence[str]]
    """TRL's trainers that each of our algorithms is compared with."""
    goals: Goals = Goals()
    words: tuple[str, ...] = ()
    ppo: bool = False
    """Whether PPO takes part, with its critic and as many responses, each to a prompt of its own."""

    @property
    def size(self) -> str:
        """In short."""
        return f"{self.prompts} x {self.each} x {self.reply}"

    def ours(self, algo: str, folder: Path, **values: Any) -> Contestant:
        """A run of ours."""
        grouped = [f"algo.responses={self.each}"] if algo in self.pairs else []
        batch = self.prompts * self.each
        update = f"{{episodes: {batch}00000, batch: {batch}, epochs: 1, minibatches: 1}}"
        words = [*_words(folder, *self.words), f"algo={algo}", *grouped, f"algo.update={update}"]
        return our_run(f"ours-{algo}", "online", words, **values)

    def products(self, start: Start) -> Contestant:
        """Matrix products of the sizes that occur when all prompts are read once."""
        tokens = self.prompts * (max(start.lengths) + self.each * self.reply)
        sizes = floor.sizes(start.shape, tokens, self.prompts * self.each * self.reply)
        return Contestant("products", "benchmarks.floor:products", {"sizes": sizes})

    def enter(self, folder: Path) -> tuple[list[Contestant], Judge]:
        """Ours, TRL's, a bare loop for each of ours, and matrix products."""
        start = Start.of(folder, self.words)
        given = {
            "policy": start.policy, "reward": start.reward, "prompts": start.prompts,
            "rows": self.prompts * self.each, "each": self.each, "reply": self.reply,
        }  # fmt: skip
        algos = [*self.pairs, *(["ppo"] if self.ppo else [])]
        trainers = dict.fromkeys(t for many in self.pairs.values() for t in many if _trl())
        contestants = [
            *(self.ours(algo, folder) for algo in algos),
            *(
                Contestant(f"bare-{algo}", "benchmarks.bare:online", {"loss": algo, **given})
                for algo in self.pairs
            ),
            *(
                Contestant(f"trl-{name}", "benchmarks.peers:online", {"trainer": name, **given})
                for name in trainers
            ),
            self.products(start),
        ]
        return contestants, partial(self.lines, start)

    def lines(self, start: Start, results: Results) -> list[Line]:
        """Step by step, then memory."""
        goals, said = self.goals, list[Line]()
        for algo, trainers in self.pairs.items():
            work, ours = f"online step, {algo}, {self.size}", results[f"ours-{algo}"]
            for trainer in trainers:
                goal = goals.trl_dpo if trainer == "online_dpo" else goals.trl
                theirs = results.get(f"trl-{trainer}")
                said.append(quicker(work, f"TRL {trainer}", ours, theirs, goal))
            said.append(dearer(work, "bare loop", ours, results[f"bare-{algo}"], goals.bare))
            for apart, name, goal in (
                (True, "FLOP floor, a prompt for each response, padded", goals.floor),
                (False, "FLOP floor, a prompt once, nothing padded", ""),
            ):
                least = sum(self.operations(start, apart).values())
                said.append(_floor(work, name, ours, results["products"], least, goal))
        if self.ppo:
            said.append(
                dearer(
                    f"online step, ppo, {self.prompts * self.each} x 1 x {self.reply}", "our p3o_v2",
                    results["ours-ppo"], results["ours-p3o_v2"], goals.ppo,
                )
            )  # fmt: skip
        for algo, trainers in self.pairs.items():
            work, ours = f"training memory, {algo}, {self.size}", results[f"ours-{algo}"]
            for trainer in trainers:
                theirs = results.get(f"trl-{trainer}")
                said.append(leaner(work, f"TRL {trainer}", ours, theirs, goals.memory))
        return said

    def operations(self, start: Start, apart: bool) -> dict[str, float]:
        """Of each part of a step, on average over batches of prompts; apart: as `floor.step` has it."""
        steps = [
            floor.step(
                start.shape, start.lengths[i : i + self.prompts], self.each, self.reply, apart
            )
            for i in range(0, len(start.lengths) - self.prompts + 1, self.prompts)
        ]
        return {name: statistics.mean(each[name] for each in steps) for name in steps[0]}


@dataclass(frozen=True)
class Offline:
    """Steps of SFT, of the reward model and of DPO on rows of the dataset."""

    goals: Mapping[str, str]
    """By TRL's name of the trainer."""
    memory: str

    def enter(self, folder: Path) -> tuple[list[Contestant], Judge]:
        """Each of ours, then each of TRL's."""
        start, base = Start.of(folder, ()), _words(folder)
        update = f"{{episodes: {BATCH}000000, batch: {2 * BATCH}, epochs: 1, minibatches: 1}}"
        sft = ["stage=sft", "sft.epochs=10000", f"sft.batch={BATCH}", "sft.loss_on_prompt=false"]
        reward = ["stage=reward", "reward.epochs=10000", f"reward.batch={BATCH}"]
        contestants = [
            our_run("ours-SFT", "supervised", [*base, *sft], stage="sft"),
            our_run("ours-Reward", "supervised", [*base, *reward], stage="reward"),
            our_run("ours-DPO", "online", [*base, "algo=dpo", f"algo.update={update}"]),
        ]
        rows = {"SFT": start.demos, "Reward": start.pairs, "DPO": start.pairs}
        if _trl():
            contestants += [
                Contestant(
                    f"trl-{trainer}", "benchmarks.peers:offline",
                    {"trainer": trainer, "policy": start.policy, "data": data, "batch": BATCH},
                )
                for trainer, data in rows.items()
            ]  # fmt: skip
        return contestants, self.lines

    def lines(self, results: Results) -> list[Line]:
        """Step by step, then memory."""
        kinds = [
            (trainer, goal, results[f"ours-{trainer}"], results.get(f"trl-{trainer}"))
            for trainer, goal in self.goals.items()
        ]
        what = {"SFT": "demonstrations", "Reward": "pairs", "DPO": "pairs"}
        return [
            *(
                quicker(
                    f"{kind} step, {BATCH} {what[kind]}", f"TRL {kind}Trainer", ours, theirs, goal
                )
                for kind, goal, ours, theirs in kinds
            ),
            *(
                leaner(f"training memory, {kind}", f"TRL {kind}Trainer", ours, theirs, self.memory)
                for kind, _, ours, theirs in kinds
            ),
        ]


@dataclass(frozen=True)
class Start:
    """What contestants start from."""

    policy: str
    reward: str
    """Folders of weights."""
    shape: floor.Shape
    prompts: list[str]
    lengths: list[int]
    """Of the prompts, in tokens."""
    demos: dict[str, list[str]]
    pairs: dict[str, list[str]]
    """Columns as TRL reads them."""

    @classmethod
    def of(cls, folder: Path, words: Sequence[str]) -> Start:
        """Makes the SFT policy and the reward model, unless they are there, and reads the rows."""
        from rlhf_cli.config import compose
        from rlhf_cli.data.tokens import Encoder
        from rlhf_cli.models.tokenizer import load_tokenizer
        from rlhf_cli.plan import plan
        from rlhf_cli.worker import corpus_of

        typed = [*_words(folder, *words), "stage=reward"]
        made = plan(compose(typed))
        policy, reward = (step.path / "checkpoints" / "final" for step in made.steps)
        if not reward.exists():
            # In a process of its own: contestants must not inherit what a run leaves in the environment.
            subprocess.run([sys.executable, "-m", "rlhf_cli", "train", *typed], check=True)
        rows = corpus_of(made.recipe.data).train  # type: ignore[arg-type]
        tokenizer = load_tokenizer(policy)
        ids = Encoder.of(tokenizer, made.recipe.data).prompts(rows.prompts[:ROWS])
        config: dict[str, Any] = json.loads((policy / "config.json").read_text())
        demos, pairs = rows.demos[:ROWS], rows.pairs[:ROWS]
        return cls(
            policy=str(policy),
            reward=str(reward),
            shape=floor.Shape(
                config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
            ),
            prompts=[tokenizer.decode(each) for each in ids],  # shortened as our own are
            lengths=[len(each) for each in ids],
            demos={
                "prompt": [each.prompt for each in demos],
                "completion": [each.response for each in demos],
            },
            pairs={
                "prompt": [each.prompt for each in pairs],
                "chosen": [each.chosen for each in pairs],
                "rejected": [each.rejected for each in pairs],
            },
        )


def _words(folder: Path, *more: str) -> list[str]:
    return [*WORDS, f"paths.runs={folder / 'runs'}", *more]


def our_run(name: str, kind: str, words: list[str], **values: Any) -> Contestant:
    """A run from its beginning, whatever an earlier race has left of it."""
    from rlhf_cli.config import compose
    from rlhf_cli.plan import plan

    shutil.rmtree(plan(compose(words)).steps[-1].path, ignore_errors=True)
    return Contestant(name, f"benchmarks.ours:{kind}", {"words": words, **values})


def _trl() -> bool:
    return find_spec("trl") is not None


def quicker(work: str, against: str, ours: Result, theirs: Result | None, goal: str) -> Line:
    """How many times as long they take."""
    if why := _why(ours, theirs):
        return missing(work, against, goal, why)
    assert theirs is not None
    ratio, rounds = spread(_seconds(theirs), _seconds(ours))
    return _line(work, against, _said(ours), _said(theirs), ratio, rounds, goal)


def dearer(work: str, against: str, ours: Result, theirs: Result, goal: str) -> Line:
    """How many times as long we take."""
    if why := _why(ours, theirs):
        return missing(work, against, goal, why)
    ratio, rounds = spread(_seconds(ours), _seconds(theirs))
    return _line(work, against, _said(ours), _said(theirs), ratio, rounds, goal)


def leaner(work: str, against: str, ours: Result, theirs: Result | None, goal: str) -> Line:
    """Our peak of memory beside theirs, both less libraries and models; one number for a whole race."""
    if why := _why(ours, theirs):
        return missing(work, against, goal, why)
    assert theirs is not None
    mine, other = ours.memory_mb, theirs.memory_mb
    return _line(work, against, f"{mine:.0f} MB", f"{other:.0f} MB", mine / other, None, goal)


def _floor(
    work: str, against: str, ours: Result, products: Result, operations: float, goal: str
) -> Line:
    if why := _why(ours, products):
        return missing(work, against, goal, why)
    rates = [floor.rate(each.parts) for each in products.samples]
    least = [operations / each for each in rates]
    ratio, rounds = spread(_seconds(ours), least)
    note = f"{operations / 1e9:.1f} GFLOP at {statistics.median(rates) / 1e9:.0f} GFLOP/s"
    theirs = f"{statistics.median(least):.3f} s"
    return _line(work, against, _said(ours), theirs, ratio, rounds, goal, note)


def _line(
    work: str,
    against: str,
    ours: str,
    theirs: str,
    ratio: float,
    rounds: tuple[float, float] | None,
    goal: str,
    note: str = "",
) -> Line:
    return Line(work, against, ours, theirs, ratio, rounds, goal, judged(ratio, goal), note)


def _why(*results: Result | None) -> str:
    """Why there is nothing to compare; empty if there is."""
    if None in results:
        return NO_TRL
    return "; ".join(f"{each.name} {each.failed}" for each in results if each and each.failed)


def _seconds(result: Result) -> list[float]:
    return [each.seconds for each in result.samples]


def _said(result: Result) -> str:
    return f"{result.seconds:.3f} s"


RACES: dict[str, Race] = {
    "online": Online(
        32, 2, 48,
        {"p3o_v2": ["rloo", "grpo"], "rloo": ["rloo"], "dpo_online": ["online_dpo"]},
        Goals(">= 2.5", ">= 2", "<= 1.2", "<= 2.2", "<= 1.6", "<= 0.5"),
        ppo=True,
    ),
    "groups": Online(16, 4, 32, {"rloo": ["rloo", "grpo"]}, words=("data.max_response_tokens=32",)),
    "long": Online(
        32, 2, 64, {"rloo": ["rloo"], "p3o_v2": ["grpo"]},
        words=("data.max_prompt_tokens=40", "data.max_response_tokens=64"),
    ),
    "offline": Offline({"SFT": ">= 2", "Reward": ">= 1.5", "DPO": ">= 1.8"}, "<= 0.5"),
}  # fmt: skip
"""By name."""
