"""How fast this is on a GPU, part by part: `bash benchmarks/gpu.sh`, which runs what follows in its order.

    prepare      random weights in the shape of a Pythia, rows of random words, and the runs an RL stage needs
    generation   the project's own sampler, beside the time in which memory can be read that often
    step         the project's RL stage with RLOO: whole steps, and the learning in them
    trl          TRL's RLOO trainer on the same weights and prompts, drawing with transformers
    trl-vllm     the same, drawing with a vLLM in the same process
    page         gpu.json, with every sample, and gpu.md, from what the parts have left in a folder

Each part is a process of its own with the GPU to itself, so parts follow one another and do not take turns.
A sample begins and ends where the GPU has nothing left to do. The arithmetic:

    generation   T tokens for each of N prompts of n tokens, all weights but the input embedding W and what a
                 token leaves in the cache C, in bytes: T W + N C sum_{t=1}^{T-1} (n + t), over the bytes per
                 second of a copy of a large tensor, of which each byte is read and written; the arithmetic of
                 the prompts costs nothing here, so nothing reaches the bound
    training     6 operations per weight and token and the products of attention (`benchmarks.floor`), the
                 output layer at the responses alone, each prompt read once for its responses, over the
                 seconds of `Learner.step`, the optimiser's included, and over the operations per second of
                 a large square product in bf16

TRL's weights and moments are bf16, the project's are bf16 with fp32 masters and moments: TRL moves fewer
bytes for less precision. Micro-batches have as many responses on both sides.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a bare machine must be able to say which rows it cannot measure
    from benchmarks.table import Line
    from benchmarks.turns import Turns
    from rlhf_cli.shapes import Shape

WARM, ROUNDS = 2, 3
"""Turns that do not count, and turns that do."""
ROWS = 256
"""Of the dataset of random words."""
END, PAD = "<|end|>", "<|pad|>"

GENERATION, TRL, VLLM, GEMM, SHEET = (
    ("generation", "memory bandwidth, measured", ">= 0.5"),
    ("online step, rloo", "TRL rloo", ">= 3"),
    ("online step, rloo", "TRL rloo, vLLM in its process", ">= 0.9"),
    ("training, rloo", "bf16 matrix product, measured", ">= 0.4"),
    ("training, rloo", "bf16 rate of the data sheet", ">= 0.4"),
)
"""Work, what it is held against, and the goal; a goal without TRL is a share of the bound."""

TITLES: Mapping[str, str] = {
    "a100-40": r"NVIDIA A100-(SXM4|PCIE)-40GB",
    "a100-80": r"NVIDIA A100(-SXM4-80GB| 80GB PCIe)",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
    "b200": r"NVIDIA B200",
    "l40s": r"NVIDIA L40S",
    "a6000": r"NVIDIA RTX A6000",
    "rtx4090": r"NVIDIA GeForce RTX 4090",
}
"""What CUDA calls those of `rlhf_cli.devices.GPUS`, whole: an H100 PCIe has another rate."""


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    like: str
    """The published model of that shape; empty for a shape that only tests need."""
    prompts: int = 32
    each: int = 2
    """Responses to a prompt of an online step; generation has a prompt for each."""
    prompt: int = 256
    """Tokens."""
    reply: int = 256
    """Tokens, of every response: none ends early."""
    micro_batch: int = 16
    """Responses."""
    copied: int = 2**30
    """Bytes of the tensor whose copy measures the bandwidth."""
    side: int = 8192
    """Of the square product."""

    @property
    def shape(self) -> Shape:
        """Of the decoder."""
        from rlhf_cli.shapes import PUBLISHED, neox

        return PUBLISHED[self.like] if self.like else neox(2, 32, 2, 512)

    @property
    def rows(self) -> int:
        """Responses of a step."""
        return self.prompts * self.each


SHAPES: Mapping[str, Sizes] = {
    "160m": Sizes("EleutherAI/pythia-160m"),
    "1.4b": Sizes("EleutherAI/pythia-1.4b"),
    "tiny": Sizes("", 4, 2, 8, 8, micro_batch=4, copied=2**20, side=64),
}
"""By name; tiny is for tests."""
MEASURED = ("160m", "1.4b")


@dataclass(frozen=True)
class Bench:
    """What a part is told."""

    name: str
    """Of the shape."""
    folder: Path
    device: str
    """cuda or cpu."""

    @property
    def sizes(self) -> Sizes:
        """Of that shape."""
        return SHAPES[self.name]

    @property
    def weights(self) -> Path:
        """The folder of random weights and of a tokenizer."""
        return self.folder / self.name / "weights"

    @property
    def data(self) -> Path:
        """The file of rows."""
        return self.folder / self.name / "rows.jsonl"

    def words(self, *more: str) -> list[str]:
        """Of a run on these weights and rows."""
        sizes, own = self.sizes, self.folder / self.name
        return [
            "model=custom", f"model.name={self.weights}", "model.precision=bf16", "data=custom",
            f"data.path={self.data}", "data.template=transcript",
            f"data.max_prompt_tokens={sizes.prompt}", f"data.max_response_tokens={sizes.reply}",
            "track=off", "sft.epochs=0", "sft.batch=4", "reward.epochs=0.01", "reward.batch=4",
            "reward.normalise=none", "reward.unended=null", "eval.points=1", "eval.prompts=4",
            f"launch.micro_batch={sizes.micro_batch}", f"paths.runs={own / 'runs'}",
            f"paths.cache={own / 'cache'}", *more,
        ]  # fmt: skip

    def keep(self, part: str, **found: Any) -> None:
        """Leaves what a part found for the page."""
        self.file(part).write_text(json.dumps({"device": self.machine(), **found}, indent=1) + "\n")

    def file(self, part: str) -> Path:
        """Where that is; `gpu.sh` writes the reason beside it, ending in .why, if there is nothing."""
        return self.folder / f"{part}-{self.name}.json"

    def machine(self) -> dict[str, str | float]:
        """The device."""
        if self.device == "cpu":
            return {"name": "cpu"}
        import torch

        about = torch.cuda.get_device_properties(0)
        return {
            "name": about.name,
            "memory_gb": round(about.total_memory / 2**30, 1),
            "cuda": str(torch.version.cuda),
        }

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def timed(self, times: int, work: Callable[[], object]) -> float:
        """Seconds of `work` at best, called so many times in a row."""
        found = []
        for _ in range(WARM + ROUNDS):
            self.wait()
            began = time.perf_counter()
            for _ in range(times):
                work()
            self.wait()
            found.append((time.perf_counter() - began) / times)
        return min(found)

    def bandwidth(self) -> float:
        """Bytes per second that a copy reads and writes."""
        import torch

        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * self.sizes.copied / self.timed(10, lambda: target.copy_(source))

    def rate(self) -> float:
        """Operations per second of a square product."""
        import torch

        side = self.sizes.side
        left, right = (
            torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2)
        )
        return 2 * side**3 / self.timed(10, lambda: torch.matmul(left, right))


def turned(bench: Bench, work: Callable[[Turns], object]) -> list[dict[str, Any]]:
    """Has work take its turns; returns what it told of those that count."""
    from benchmarks.turns import Over, Turns

    class Settled(Turns):
        """Turns that begin and end when the device has nothing left to do."""

        def begin(self) -> None:
            bench.wait()
            super().begin()

        def end(self) -> None:
            bench.wait()
            super().end()

    told = io.StringIO()
    with suppress(Over):
        work(Settled(io.StringIO("go\n" * (WARM + ROUNDS)), told))
    return [json.loads(line) for line in told.getvalue().splitlines()][WARM:]


def prepare(bench: Bench) -> None:
    """Weights, rows, and the runs of SFT and of the reward model that an RL stage starts from."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_cli.config import compose
    from rlhf_cli.launch import execute
    from rlhf_cli.models.load import scratch_config
    from rlhf_cli.plan import plan
    from rlhf_cli.recipes import Scratch

    shape, sizes = bench.sizes.shape, bench.sizes
    bench.weights.mkdir(parents=True, exist_ok=True)
    tokenizer = words_apart(shape.vocab)
    tokenizer.save_pretrained(bench.weights)
    scratch = Scratch(
        shape.layers, shape.width, shape.heads, shape.vocab, sizes.prompt + sizes.reply, 0
    )
    torch.manual_seed(scratch.seed)
    with torch.device(bench.device):
        config = scratch_config(scratch, tokenizer)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(bench.weights)
    del model
    some = random.Random(0)

    def text(count: int) -> str:
        return "".join(word(some.randrange(2, shape.vocab)) for _ in range(count))

    short = sizes.reply // 4
    rows = [
        {"prompt": text(sizes.prompt), "chosen": text(short), "rejected": text(short)}
        for _ in range(ROWS)
    ]
    bench.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    execute(plan(compose(bench.words("stage=reward"))), "python -m benchmarks.gpu prepare")
    bench.keep("prepare")


def words_apart(vocab: int) -> Any:
    """A tokenizer whose words have four letters each: any ids are the same after a way through text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {END: 0, PAD: 1, **{word(i): i for i in range(2, vocab)}}
    core = Tokenizer(models.WordLevel(known, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(".{4}"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def word(number: int) -> str:
    """The text of a token."""
    return f"{number:04x}"


def generation(bench: Bench) -> None:
    """A prompt for each response, drawn by the sampler that training draws with."""
    import torch

    from rlhf_cli.engine.sampler import Expert, draw
    from rlhf_cli.models.load import load_policy
    from rlhf_cli.models.tokenizer import load_tokenizer

    sizes = bench.sizes
    tokenizer = load_tokenizer(bench.weights)
    policy = load_policy(bench.weights, "bf16", tokenizer).to(bench.device)
    some = random.Random(1)
    prompts = [
        [some.randrange(2, sizes.shape.vocab) for _ in range(sizes.prompt)]
        for _ in range(sizes.rows)
    ]
    uniform = torch.rand(sizes.rows, sizes.reply, generator=torch.Generator().manual_seed(0))
    bandwidth = bench.bandwidth()

    def drawing(turns: Turns) -> None:
        while True:
            with turns.turn():
                draw([Expert(policy)], prompts, 1, uniform, sizes.prompt, -1, 1)

    bench.keep("generation", bandwidth=bandwidth, samples=turned(bench, drawing))


def step(bench: Bench) -> None:
    """Whole steps of the RL stage; their part `learning` is `Learner.step`."""
    from benchmarks import ours
    from rlhf_cli.engine.learner import Learner

    sizes, learn, rate = bench.sizes, Learner.step, bench.rate()
    batch = sizes.rows
    update = f"{{episodes: {batch}00000, batch: {batch}, epochs: 1, minibatches: 1}}"
    words = bench.words("algo=rloo", f"algo.responses={sizes.each}", f"algo.update={update}")

    def running(turns: Turns) -> None:
        def learned(*given: Any, **more: Any) -> Any:
            bench.wait()
            with turns.part("learning"):
                said = learn(*given, **more)
                bench.wait()
            return said

        Learner.step = learned  # type: ignore[method-assign]
        try:
            ours.online(turns, words)
        finally:
            Learner.step = learn  # type: ignore[method-assign]

    bench.keep("step", rate=rate, samples=turned(bench, running))


def trl(bench: Bench, vllm: bool = False) -> None:
    """TRL's RLOO, the fastest it can be told to be without losing what the project has: a reference, a
    reward model, the same micro-batches.
    """
    for name in ("trl", "vllm") if vllm else ("trl",):
        if find_spec(name) is None:
            raise SystemExit(f"{name} is not installed")
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer  # type: ignore[attr-defined]

    from benchmarks import peers
    from rlhf_cli.config import compose
    from rlhf_cli.plan import plan

    sizes = bench.sizes
    made = plan(compose(bench.words("stage=reward")))
    policy, reward = (str(each.path / "checkpoints" / "final") for each in made.steps)
    prompts = [json.loads(line)["prompt"] for line in bench.data.read_text().splitlines()]
    colocated = {
        "use_vllm": True, "vllm_mode": "colocate",
        "vllm_max_model_length": sizes.prompt + sizes.reply,
    } if vllm else {}  # fmt: skip

    def running(turns: Turns) -> None:
        given: dict[str, Any] = {
            **peers.arguments(), **colocated, "bf16": True, "temperature": 1.0, "beta": 0.1,
            "model_init_kwargs": {"dtype": "bfloat16"}, "num_generations": sizes.each,
            "max_completion_length": sizes.reply,
            "per_device_train_batch_size": sizes.micro_batch,
            "gradient_accumulation_steps": sizes.rows // sizes.micro_batch,
        }  # fmt: skip
        RLOOTrainer(
            model=policy, reward_funcs=reward, args=RLOOConfig(**given),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[peers.callback(turns)],
        ).train()  # fmt: skip

    bench.keep("trl-vllm" if vllm else "trl", samples=turned(bench, running))


def least_read(shape: Shape, rows: int, prompt: int, reply: int) -> float:
    """Bytes in bf16 that generation cannot do without reading."""
    weights = shape.parameters - shape.vocab * shape.width
    columns = sum(prompt + t for t in range(1, reply))
    return 2.0 * (reply * weights + rows * shape.layers * shape.kv * columns)


def learned_with(sizes: Sizes, apart: bool) -> float:
    """Operations of a step's passes forward and back; apart: a prompt for each response."""
    from benchmarks import floor

    shape = floor.Shape(sizes.shape.layers, sizes.shape.width, sizes.shape.vocab)
    parts = floor.step(shape, [sizes.prompt] * sizes.prompts, sizes.each, sizes.reply, apart)
    return parts["forward"] + parts["backward"]


def lines(bench: Bench) -> list[Line]:
    """The rows of one shape, each with a ratio or with the reason why there is none."""
    from benchmarks.race import spread
    from benchmarks.table import Line, judged, missing
    from rlhf_cli.devices import GPUS

    sizes = bench.sizes
    size = f"{bench.name}, {sizes.rows} x ({sizes.prompt} + {sizes.reply})"
    found = {part: _found(bench, part) for part in PARTS}

    def line(
        row: tuple[str, str, str],
        said: tuple[str, str],
        above: Sequence[float],
        below: Sequence[float],
        note: str,
    ) -> Line:
        ratio, rounds = spread(above, below)
        work, against, goal = row
        told = judged(ratio, goal)
        return Line(f"{work}, {size}", against, *said, ratio, rounds, goal, told, note)

    def seconds(part: str, inner: str = "") -> list[float]:
        samples = found[part]["samples"]
        return [each["parts"][inner] if inner else each["seconds"] for each in samples]

    def lost(row: tuple[str, str, str], *parts: str) -> Line | None:
        if all("why" not in found[part] for part in parts):
            return None
        whys = [f"{p}: {found[p]['why']}" for p in ("prepare", *parts) if "why" in found[p]]
        work, against, goal = row
        return missing(f"{work}, {size}", against, goal, "; ".join(whys).replace("|", "/"))

    def generated() -> Line:
        took, speed = seconds("generation"), found["generation"]["bandwidth"]
        read = least_read(sizes.shape, sizes.rows, sizes.prompt, sizes.reply)
        note = f"{read / 1e9:.1f} GB at {speed / 1e9:.0f} GB/s"
        least = [read / speed] * len(took)
        return line(GENERATION, (_said(took), f"{least[0]:.3f} s"), least, took, note)

    def quicker(row: tuple[str, str, str], part: str) -> Line:
        mine, theirs = seconds("step"), seconds(part)
        note = "TRL without fp32 masters and moments"
        return line(row, (_said(mine), _said(theirs)), theirs, mine, note)

    def learning(row: tuple[str, str, str], rate: float) -> Line:
        took, done = seconds("step", "learning"), learned_with(sizes, apart=False)
        reached, apart = [done / each for each in took], learned_with(sizes, apart=True)
        note = f"{apart / done:.2f} times that if each response counted with a prompt of its own"
        said = (f"{median(reached) / 1e12:.3g} TFLOP/s", f"{rate / 1e12:.3g} TFLOP/s")
        return line(row, said, reached, [rate] * len(took), note)

    def sheet() -> Line:
        title = str(found["step"]["device"]["name"])
        known = next((gpu for gpu, name in TITLES.items() if re.fullmatch(name, title)), None)
        if known is None:
            work, against, goal = SHEET
            return missing(f"{work}, {size}", against, goal, f"no data sheet of {title} is known")
        return learning(SHEET, GPUS[known].half)

    return [
        lost(GENERATION, "generation") or generated(),
        lost(TRL, "step", "trl") or quicker(TRL, "trl"),
        lost(VLLM, "step", "trl-vllm") or quicker(VLLM, "trl-vllm"),
        lost(GEMM, "step") or learning(GEMM, found["step"]["rate"]),
        lost(SHEET, "step") or sheet(),
    ]


def _found(bench: Bench, part: str) -> dict[str, Any]:
    """What a part has left, or why it has left nothing."""
    file = bench.file(part)
    if file.exists():
        whole: dict[str, Any] = json.loads(file.read_text())
        return whole if whole.get("samples", True) else {"why": "no turn that counts was finished"}
    why = file.with_suffix(".why")
    return {"why": why.read_text().strip() if why.exists() else "it was not run"}


def _said(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} s"


def page(benches: Sequence[Bench]) -> None:
    """gpu.json and gpu.md."""
    from benchmarks import table

    folder = benches[0].folder
    said = [line for bench in benches for line in lines(bench)]
    parts = {
        file.stem: json.loads(file.read_text())
        for bench in benches
        for file in sorted(folder.glob(f"*-{bench.name}.json"))
    }
    device = next((each["device"] for each in parts.values()), {"name": "no device"})
    packages = {**table.versions(), **{name: _version(name) for name in ("deepspeed", "vllm")}}
    host = {name: told for name, told in table.machine().items() if name != "threads"}
    about = {"date": date.today().isoformat(), **host, **packages, "device": device}
    whole = {**about, "lines": [vars(each) for each in said], "parts": parts}
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    measured = [each for each in said if each.met is not None]
    named = ", ".join(f"{name} {packages[name]}" for name in packages if name != "commit")
    text = f"""# How fast on a GPU

Written by `bash benchmarks/gpu.sh` on {about["date"]}, at commit {packages["commit"]}.

{", ".join(f"{name} {value}" for name, value in device.items())}; {about["processor"]},
{about["cores"]} cores; {named}.

Random weights of published shapes, bf16; {ROUNDS} turns of each part count, after {WARM} that do not, and a
number is their median. Parts follow one another. What a bound is made of is in `benchmarks/gpu.py`.
{sum(bool(each.met) for each in measured)} of {len(measured)} goals that were measured are met, \
{len(said) - len(measured)} of {len(said)} rows were not measured.

| work | against | ours | theirs | ratio | rounds | goal | met | note |
|---|---|---|---|---|---|---|---|---|
"""
    text += "".join("| " + " | ".join(table.cells(each)) + " |\n" for each in said)
    (folder / "gpu.md").write_text(text)
    print(text)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def name_rows(shapes: Sequence[str]) -> None:
    """Says what there is to measure, for a machine that can measure nothing."""
    for shape in shapes:
        for work, against, goal in (GENERATION, TRL, VLLM, GEMM, SHEET):
            print(f"not measured: {work}, {shape}, against {against} (goal {goal})")


PARTS: Mapping[str, Callable[[Bench], None]] = {
    "prepare": prepare,
    "generation": generation,
    "step": step,
    "trl": trl,
    "trl-vllm": lambda bench: trl(bench, vllm=True),
}


def main(typed: Sequence[str]) -> None:
    """Parts, one after the other: alone in a process each, where they are measured."""
    asked = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    asked.add_argument("parts", nargs="+", choices=[*PARTS, "page", "rows"], metavar="PART")
    asked.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(MEASURED))
    asked.add_argument("--folder", type=Path, default=Path("build/gpu"))
    asked.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    said = asked.parse_args(typed)
    if "rows" in said.parts:
        name_rows(said.shapes)
        return
    if said.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # stages take a GPU wherever they find one
    said.folder.mkdir(parents=True, exist_ok=True)
    benches = [Bench(name, said.folder.resolve(), said.device) for name in said.shapes]
    for part in said.parts:
        if part == "page":
            page(benches)
            continue
        for bench in benches:
            PARTS[part](bench)


if __name__ == "__main__":
    main(sys.argv[1:])
