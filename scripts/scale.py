"""Writes the tables of docs/scale.md from `rlhf_cli.cost` and `rlhf_cli.memory`: python scripts/scale.py.

What stands between `<!-- NAME -->` and `<!-- end -->` is replaced by the table of that name; the rest stays.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rlhf_cli import memory
from rlhf_cli.config import Recipe, compose, recipe
from rlhf_cli.cost import STREAM, Activity, Desk
from rlhf_cli.devices import GPUS, named
from rlhf_cli.memory import LADDER, Preset, fitting, of_stage
from rlhf_cli.recipes import Model, Scratch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
SLOTS = 8
"""GPUs of a host."""
HOSTS = TemporaryDirectory(prefix="hosts-")
"""Of hostfiles, by the number of GPUs."""
ACTIVITIES: tuple[Activity, ...] = ("drawing", "scoring", "learning", "talking")


def base() -> Recipe:
    """PPO on texts of 256 and 256 tokens, a rollout of 512 responses learned from once in four steps."""
    words = ["algo=ppo", "model=pythia_1b", "data.max_prompt_tokens=256"]
    words += ["data.max_response_tokens=256", "launch.checkpointing=true"]
    update = "algo.update={episodes: 512, batch: 512, epochs: 1, minibatches: 4}"
    return recipe(compose([*words, update]))


def with_model(made: Recipe, policy: Model, reward: Model | None = None) -> Recipe:
    """The recipe with another policy, and a reward model like it or another."""
    return replace(made, model=policy, reward=replace(made.reward, model=reward or policy))


def on(made: Recipe, gpu: str, count: int, preset: Preset) -> Recipe:
    """The recipe on so many GPUs, on hosts of eight."""
    made = preset.under(made, count)
    made = replace(made, launch=replace(made.launch, gpu=gpu))
    if count <= SLOTS:
        return made
    file = Path(HOSTS.name) / f"{count}"
    file.write_text("".join(f"host-{rank} slots={SLOTS}\n" for rank in range(count // SLOTS)))
    return replace(made, launch=replace(made.launch, hostfile=str(file)))


def rollout(made: Recipe) -> tuple[dict[str, float], float]:
    """Seconds of the clock by activity of a rollout and its learning, and bytes that a GPU sends."""
    desk, update = Desk.longest(made), made.algo.update
    nets = desk.cast(True)
    steps, rows = update.epochs * update.minibatches, update.batch / update.minibatches
    spoken = ([nets["policy"], nets["critic"]], steps, rows, 1, made.algo.sampling().responses)
    drawn = [work for each in desk.draws(nets, 1, 0) for work in desk.draw(each)]
    works = [*drawn, *desk.passes(nets, 1, 0), *desk.talk(*spoken)]
    spent = {
        name: sum(w.seconds for w in works if w.activity == name) / desk.processes
        for name in ACTIVITIES
    }
    return spent, spent["talking"] * desk.reach * STREAM


# --- our own presets

SIZES = {
    "1B": ("EleutherAI/pythia-1b", ("a100-80", 1), ("rtx4090", 4)),
    "7B": ("meta-llama/Llama-2-7b-hf", ("a100-80", 8), ("h100", 8)),
    "70B": ("meta-llama/Llama-2-70b-hf", ("h200", 64), ("b200", 64)),
}
"""Size to a model and two machines for it: a GPU's name and how many."""


@dataclass(frozen=True)
class Case:
    """A size on a machine, under the first preset that fits."""

    size: str
    gpu: str
    count: int
    made: Recipe
    fits: bool

    @property
    def machine(self) -> str:
        return f"{self.count} x {named(self.gpu).title}"

    @property
    def preset(self) -> str:
        """What is typed, or that nothing helps."""
        launch = self.made.launch
        if not self.fits:
            return "none"
        preset = Preset(launch.zero, launch.offload, launch.frozen, launch.gather)
        words = preset.words(replace(launch, offload="none", frozen="whole", gather="whole"))
        return f"`{words.replace('launch=deepspeed ', '')}`"


def cases(start: Recipe) -> list[Case]:
    found = []
    for size, (name, *machines) in SIZES.items():
        made = with_model(start, replace(start.model, name=name))
        for gpu, count in machines:
            stages = [(stage, made, True) for stage in ("sft", "reward", "rl")]
            fit = fitting(stages, GPUS[gpu], count)
            preset = fit[0] if fit else LADDER[-1]
            found.append(Case(size, gpu, count, on(made, gpu, count, preset), fit is not None))
    return found


def memories(some: Sequence[Case]) -> str:
    rows = []
    for case in some:
        found = of_stage("rl", case.made, True)
        phases = [
            f"{found.at(each) / 1e9:,.0f}" if each in found.phases else "-"
            for each in memory.PHASES
        ]
        held = found.host(min(case.count, SLOTS))
        host = f"{held / 1e9:,.0f}" if held else "-"
        rows.append([case.size, case.machine, case.preset, *phases, host])
    return table(["", "on", "recommended preset", *memory.PHASES, "host"], rows)


def times(some: Sequence[Case]) -> str:
    rows = []
    for case in some:
        spent, sent = rollout(case.made)
        total = sum(spent.values())
        each = [f"{spent[name]:,.1f}" for name in ACTIVITIES]
        told = [f"{total:,.1f}", f"{512 / total:,.1f}", f"{sent / 1e9:,.0f}"]
        rows.append([case.size, case.machine, *each, *told])
    return table(["", "on", *ACTIVITIES, "seconds", "responses/s", "GB sent"], rows)


# --- published runs


def opt(start: Recipe, layers: int, width: int, heads: int) -> Model:
    """An OPT (Zhang et al. 2022, arXiv:2205.01068, table 1), built as a GPT-NeoX of its shape."""
    shape = Scratch(layers=layers, width=width, heads=heads, vocab=50272, context=2048, seed=0)
    return replace(start.model, name=None, revision=None, scratch=shape)


OPTS = {
    "6.7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "30B": (48, 7168, 56),
    "66B": (64, 9216, 72),
}
CHAT = [
    # actor, GPU, how many, hours
    ("6.7B", "a100-40", 8, 5.7),
    ("13B", "a100-40", 8, 10.8),
    ("6.7B", "a100-80", 8, 4.1),
    ("13B", "a100-80", 8, 9.0),
    ("30B", "a100-80", 8, 18.0),
    ("66B", "a100-80", 8, 2.1 * 24),
    ("13B", "a100-80", 64, 1.25),
    ("30B", "a100-80", 64, 4.0),
    ("66B", "a100-80", 64, 7.5),
]
"""DeepSpeed-Chat, step 3: 131,900 queries of 256 tokens and as long an answer, 1,024 of them at a time."""


def chat(start: Recipe) -> str:
    algo = start.algo
    update = replace(algo.update, episodes=1024, batch=1024, minibatches=1)
    start = replace(start, algo=replace(algo, update=update))  # type: ignore[type-var]
    rows = []
    for size, gpu, count, hours in CHAT:
        made = with_model(start, opt(start, *OPTS[size]), opt(start, 24, 1024, 16))
        spent, _ = rollout(on(made, gpu, count, Preset(3)))
        said = 131_900 / 1024 * sum(spent.values()) / 3600
        rows.append([size, f"{count} x {named(gpu).title}", *compared(hours, said)])
    return table(["actor", "on", "published, h", "said, h", "error"], rows)


RAY = [
    # model, GPUs, seconds of DeepSpeed-Chat, seconds of OpenRLHF
    ("7B", "meta-llama/Llama-2-7b-hf", 16, 855.09, 471.11),
    ("13B", "meta-llama/Llama-2-13b-hf", 32, 1528.93, 608.93),
    ("34B", "codellama/CodeLlama-34b-hf", 32, 3634.98, 1526.4),
    ("70B", "meta-llama/Llama-2-70b-hf", 32, 10407.0, 4488.53),
]
"""OpenRLHF's comparison on A800-80GB, which is an A100 with two thirds of its NVLink: 1,024 prompts, once."""


def ray(start: Recipe) -> str:
    algo = start.algo
    update = replace(algo.update, episodes=1024, batch=1024, minibatches=8)
    data = replace(start.data, max_prompt_tokens=1024, max_response_tokens=1024)  # type: ignore[type-var]
    start = replace(start, algo=replace(algo, update=update), data=data)  # type: ignore[type-var]
    rows = []
    for size, name, count, theirs, best in RAY:
        made = with_model(start, replace(start.model, name=name))
        said = sum(rollout(on(made, "a100-80", count, Preset(3)))[0].values())
        _, ours, error = compared(theirs, said)
        other = f"{said / best - 1:+.0%}"
        rows.append([size, f"{count}", f"{theirs:,.0f}", error, f"{best:,.0f}", other, ours])
    head = ["model", "GPUs", "DeepSpeed-Chat, s", "error", "OpenRLHF, s", "error", "said, s"]
    return table(head, rows)


def compared(published: float, said: float) -> tuple[str, str, str]:
    return (
        f"{published:,.4g}",
        f"{said:,.3g}" if said < 100 else f"{said:,.0f}",
        f"{said / published - 1:+.0%}",
    )


def cards() -> str:
    rows = [
        [
            f"`{name}`",
            card.title,
            f"{card.memory / 1e9:,.0f}",
            f"{card.bandwidth / 1e12:.2f}",
            f"{card.half / 1e12:,.0f}",
            f"{card.single / 1e12:,.0f}",
            f"{card.link / 1e9:,.0f}",
            f"{card.network / 1e9:,.1f}",
        ]
        for name, card in GPUS.items()
    ]
    head = ["`launch.gpu`", "", "GB", "TB/s", "half, TFLOP/s", "fp32", "link, GB/s", "network"]
    return table(head, rows)


# --- the page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> Mapping[str, str]:
    """Every table by its name."""
    start = base()
    some = cases(start)
    made: dict[str, Callable[[], str]] = {
        "cards": cards,
        "memory": lambda: memories(some),
        "time": lambda: times(some),
        "deepspeed-chat": lambda: chat(start),
        "openrlhf": lambda: ray(start),
    }
    return {name: make() for name, make in made.items()}


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables as they are now."""
    for name, text in made.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, text=text: f"{match[1]}{text}\n{match[2]}",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
    return page


def main(page: Path) -> None:
    page.write_text(filled(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
