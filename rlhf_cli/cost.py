"""What a stage costs: arithmetic, talk between processes, hours of a GPU; from shapes and totals alone.

An estimate that no run on a GPU has confirmed; hours may well be off by a factor of two (docs/scale.md
holds it against published ones). Every text is taken to be as long as `data.max_prompt_tokens` and
`data.max_response_tokens` allow, which is too much for most, and every response to have a prompt of its own,
though responses to one prompt may share it (`rlhf_cli.packing`). Left out: the time of optimiser steps and of
offloading, the loading of weights and rows, judges that are no model of this process. Nothing is loaded and
nothing fetched: shapes come from the table of `rlhf_cli.shapes` or a `config.json` that is already here.
What memory it takes is in `rlhf_cli.memory`.

    pass of N parameters over L tokens   2 N L + 4 layers width L^2 FLOP    (Kaplan et al. 2020,
    its backward pass                    twice that                          arXiv:2001.08361)
    a step of drawing                    whichever is longest: reading weights and cache, the arithmetic,
                                         launching the kernels
    gradients of one optimiser step      ZeRO 0 and 1: 2 N numbers          (Rajbhandari et al. 2020,
    and the weights it changes,          ZeRO 2: (m + 1) N                   arXiv:1910.02054, section 7;
    in m micro-batches                   ZeRO 3: 3 m N                       2 and 3 reduce m times)
    a whole copy under ZeRO 3            N numbers, once per rollout and evaluation
    a model in shards                    N numbers, at every pass and every token that is drawn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from rlhf_cli import devices, hosts, packing
from rlhf_cli.devices import GPU, Precision
from rlhf_cli.recipes import Classifier, Model
from rlhf_cli.shapes import Shape, shape

if TYPE_CHECKING:
    from rlhf_cli.config import Recipe

Activity = Literal["learning", "drawing", "scoring", "talking"]

BUSY = 0.35
"""Share of `GPU.flops` that passes over given texts reach. 0.21 to 0.46 is what Chowdhery et al. 2022
(arXiv:2204.02311, table 3) list for large models trained with care; Python and padding cost as much."""
STREAM = 0.7
"""Share of `GPU.bandwidth` and of links that is reached; ours: copies reach 0.8 to 0.9, small kernels
less."""
LAUNCH = 0.6e-3
"""Seconds to launch the kernels of one layer in one step of drawing, without CUDA graphs; ours: 20 ms per
token of 32 layers, whatever their width."""

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
FROZEN = {"reference", "reward model", "guide", "classifier"}
"""What stands beside the learner."""
SFT = "SFT policy"
"""What a reward model's scale is measured with."""
JUDGES = {*FROZEN, SFT} - {"classifier"}
"""What `launch.frozen` places, where it does not learn."""
SMALL = 10_000_000
"""Parameters below which nobody needs a GPU."""
SAMPLE = 10_000
"""Rows that a cost is stated for where their number is not known before they are read."""

ROWS: Mapping[str, int] = {
    # Bai et al. 2022 (arXiv:2204.05862), 160,800 pairs; each has a demonstration
    "Anthropic/hh-rlhf/helpful-base": 43_835,
    "Anthropic/hh-rlhf/helpful-online": 22_007,
    "Anthropic/hh-rlhf/helpful-rejection-sampled": 52_421,
    "Anthropic/hh-rlhf/harmless-base": 42_537,
    # Huang et al. 2024 (arXiv:2403.17031)
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered": 116_722,
    "CarperAI/openai_summarize_comparisons": 92_858,
}
"""Training rows of what `conf/data` names on the hub, before any are dropped."""


@dataclass(frozen=True)
class Net:
    """A model in a process."""

    name: str
    shape: Shape
    precision: Precision
    has_head: bool = True
    """Whether it has the output layer of a language model, rather than one score."""
    learned: float = 0.0
    """Parameters that learn."""
    depth: float = 1.0
    """Share of its layers that gradients flow through."""

    @property
    def parameters(self) -> int:
        """How many it has."""
        return self.shape.parameters if self.has_head else self.shape.scorer

    def forward(self, rows: float, length: float, out: float) -> float:
        """FLOP of a pass over rows of so many tokens; logits are formed at the last `out` of each."""
        one, head = self.shape, self.shape.head if self.has_head else 0
        matrices = 2 * (one.layers * one.layer * length + head * out)
        return rows * (matrices + 4 * one.layers * one.attention * length**2)

    def backward(self, forward: float) -> float:
        """FLOP of the gradients: of activations as deep as they flow, of the weights that learn."""
        return forward * (self.depth + self.learned / self.parameters)


@dataclass(frozen=True)
class Work:
    """Something done, by all processes together."""

    activity: Activity
    flop: float
    seconds: float
    """Of one GPU."""


@dataclass(frozen=True)
class Cost:
    """What a stage costs."""

    works: tuple[Work, ...]
    learned: float
    """Tokens that are learned from, each as often as it is."""
    drawn: float
    """Tokens that are drawn."""
    rows: int | None = None
    """Where their number is not known: the rows that all of this is stated for."""

    @property
    def flop(self) -> float:
        """FLOP of the whole stage."""
        return sum(work.flop for work in self.works)

    @property
    def gpu_hours(self) -> float:
        """Of the GPU that `launch.gpu` names, over all processes."""
        return sum(work.seconds for work in self.works) / 3600

    def share(self, activity: Activity) -> float:
        """Of the time, how much goes to one activity."""
        return sum(w.seconds for w in self.works if w.activity == activity) / 3600 / self.gpu_hours


def of_stage(stage: str, made: Recipe, scored: bool) -> Cost | None:
    """The cost of a stage; None where the policy is so small that any machine will do.

    scored: whether the chain has a reward model of its own. Raises `shapes.Unknown`.
    """
    if shape(made.model, "model").parameters < SMALL:
        return None
    desk = Desk.longest(made)
    return {"sft": desk.sft, "reward": desk.reward}.get(stage, lambda: desk.rl(scored))()


def rollout_flop(made: Recipe, scored: bool, prompt: float, reply: float) -> float:
    """FLOP of drawing, scoring and learning from one rollout, its texts of these mean lengths in tokens.

    scored: as in `of_stage`. Raises `shapes.Unknown`.
    """
    desk = Desk(made, prompt, reply)
    nets = desk.cast(scored)
    drawn = [work for each in desk.draws(nets, 1, 0) for work in desk.draw(each)]
    return sum(work.flop for work in [*drawn, *desk.passes(nets, 1, 0)])


@dataclass(frozen=True)
class Draw:
    """Responses that are drawn at one time, by all processes together."""

    experts: Sequence[Net]
    """The models whose product is drawn from, one step after the other."""
    rows: float
    """Responses."""
    prompts: float
    times: int = 1
    """How often that is done in the stage."""


@dataclass(frozen=True)
class Desk:
    """One recipe, and what its stages take."""

    made: Recipe
    prompt: float
    """Tokens of a prompt."""
    reply: float
    """Tokens of a response."""

    @classmethod
    def longest(cls, made: Recipe) -> Desk:
        """With texts as long as the data allow."""
        return cls(made, made.data.max_prompt_tokens, made.data.max_response_tokens)

    @property
    def length(self) -> float:
        """Tokens of a prompt and its response."""
        return self.prompt + self.reply

    @property
    def gpu(self) -> GPU:
        """What each process has, or is taken to have."""
        return devices.named(self.made.launch.gpu)

    @property
    def on_cpu(self) -> bool:
        """Whether it is taken to run on one: no GPU is named, and nobody needs any for the policy."""
        small = shape(self.made.model, "model").parameters < SMALL
        return self.made.launch.gpu is None and small

    @property
    def processes(self) -> int:
        """On all hosts together."""
        return hosts.workers(self.made.launch)

    def sft(self) -> Cost:
        """Demonstrations through the policy; logits at every token of them."""
        made, part = self.made, self.made.sft
        policy = self.net("policy", made.model, learns=True)
        rows, sample = self.rows("demos")
        seen = rows * part.epochs
        evaluated = min(made.eval.points, seen / part.batch) * made.eval.prompts
        return Cost(
            works=(
                self.learn(policy, seen, self.length),
                *self.read(policy, evaluated, self.length),
                *self.talk([policy], seen / part.batch, part.batch),
            ),
            learned=seen * self.length,
            drawn=0,
            rows=sample,
        )

    def reward(self) -> Cost:
        """Both sides of every pair through the reward model, and its calibration on drawn responses."""
        made, part = self.made, self.made.reward
        scorer = self.net("reward model", part.model, learns=True, head=False)
        rows, sample = self.rows("pairs")
        seen = rows * part.epochs
        evaluated = min(made.eval.points, seen / part.batch) * made.eval.prompts
        return Cost(
            works=(
                self.learn(scorer, 2 * seen, 0),
                *self.read(scorer, 2 * evaluated + part.calibration, 0),
                *self.draw(self.calibration()),
                *self.talk([scorer], seen / part.batch, 2 * part.batch),
            ),
            learned=2 * seen * self.length,
            drawn=part.calibration * self.reply,
            rows=sample,
        )

    def rl(self, scored: bool) -> Cost:
        """Drawing, scoring and learning of every rollout, and the evaluations."""
        made, algo, update = self.made, self.made.algo, self.made.algo.update
        nets = self.cast(scored)
        actors = [net for name, net in nets.items() if name not in FROZEN]
        rollouts = update.episodes // update.batch
        evaluations = 1 + min(made.eval.points, rollouts)
        draws = self.draws(nets, rollouts, evaluations)
        rows = self.given(rollouts) * update.epochs
        steps = rollouts * update.epochs * update.minibatches
        return Cost(
            works=(
                *(work for each in draws for work in self.draw(each)),
                *self.passes(nets, rollouts, evaluations),
                *self.talk(
                    actors, steps, rows / steps, rollouts + evaluations, algo.sampling().responses
                ),
            ),
            learned=rows * self.length,
            drawn=sum(each.rows * each.times for each in draws) * self.reply,
        )

    def calibration(self) -> Draw:
        """What a reward model's scale is measured on."""
        count = self.made.reward.calibration
        return Draw([self.net(SFT, self.made.model)], count, count)

    def evaluation(self, policy: Net, times: int = 1) -> Draw:
        """What an evaluation is made of."""
        return Draw([policy], self.made.eval.prompts, self.made.eval.prompts, times)

    def laws(self, nets: Mapping[str, Net]) -> dict[str, list[Net]]:
        """What each source that is drawn is drawn from."""
        policy, ref = nets["policy"], nets["reference"]
        return {"policy": [policy], "greedy": [policy], "ref": [ref], "mixture": [policy, ref]}

    def given(self, rollouts: int) -> int:
        """Rows that so many rollouts are learned from once, those read beside them included."""
        algo = self.made.algo
        batch, group = algo.update.batch, algo.sampling().responses
        return rollouts * (batch + algo.side().responses * (batch // group))

    def draws(self, nets: Mapping[str, Net], rollouts: int, evaluations: int) -> list[Draw]:
        """Responses of all rollouts and evaluations."""
        made, sources = self.made, list(self.made.algo.sampling().sources)
        prompts = made.algo.update.batch // len(sources)
        found = [
            Draw(experts, prompts * each, prompts, rollouts)
            for law, experts in self.laws(nets).items()
            if (each := sources.count(law))  # type: ignore[arg-type]
        ]
        return [*found, self.evaluation(nets["policy"], evaluations)]

    def passes(self, nets: Mapping[str, Net], rollouts: int, evaluations: int) -> list[Work]:
        """What is read and what is learned from."""
        made, update = self.made, self.made.algo.update
        given = self.given(rollouts)
        asked = self.asked(nets, given, rollouts * update.batch, evaluations * made.eval.prompts)
        learners = [net for name, net in nets.items() if name not in FROZEN and net.learned]
        return [
            *(
                work
                for name, rows in asked.items()
                for work in self.read(nets[name], rows, self.reply)
            ),
            *(self.learn(net, given * update.epochs, self.reply) for net in learners),
        ]

    def asked(
        self, nets: Mapping[str, Net], given: float, scored: float, evaluated: float
    ) -> dict[str, float]:
        """Rows that each model reads without learning from them.

        given: rows of all rollouts; scored: those that a reward is wanted for; evaluated: those of
        evaluations.
        """
        algo = self.made.algo
        wanted = scored if "reward" in _needs(self.made) else 0
        rows = dict.fromkeys(nets, given + evaluated)
        rows |= {
            "reward model": evaluated + (0 if algo.trains_reward else wanted),
            "learning reward model": scored,
            "classifier": evaluated + wanted,
        }
        if "Q" in nets:
            # Soft values ask policy, reference and the slow copy; the loss asks the reference again.
            rows |= {"Q": 0, "Q copy": given}
            rows["policy"] += given
            rows["reference"] += given * (1 + algo.update.epochs)
        return {name: rows[name] for name in nets}

    def cast(self, scored: bool) -> dict[str, Net]:
        """Every model of an RL stage by what it is called, as `stages.rl` loads them."""
        made, needs = self.made, _needs(self.made)
        trunk = made.reward.model if scored else made.model
        nets = [self.net("policy", made.model, learns=True)]
        if "critic" in needs:
            nets.append(self.net("critic", trunk, learns=True, head=False))
        if made.algo.trains_reward:
            nets.append(self.net("learning reward model", trunk, learns=True, head=False))
        if "q" in needs:
            copy = self.net("Q copy", made.model)
            nets += [replace(copy, name="Q", learned=copy.parameters), copy]
        nets.append(self.net("reference", made.model))
        if scored:
            nets.append(self.net("reward model", made.reward.model, head=False))
        if "guide" in needs:
            nets.append(self.net("guide", made.model))
        for part in () if made.data.pays else made.reward.parts:
            if isinstance(source := part.source, Classifier):
                one = shape(source, "reward.source")
                nets.append(Net("classifier", one, source.precision, has_head=False))
        return {net.name: net for net in nets}

    def net(self, name: str, model: Model, learns: bool = False, head: bool = True) -> Net:
        """One model of the recipe; learns: as far as its tuning lets it."""
        one = shape(model, "model" if model == self.made.model else "reward.model")
        learned, depth, tuning = 0.0, 1.0, model.tuning
        if learns and tuning.lora is not None:
            learned = tuning.lora.rank * one.layers * one.edges
        elif learns and tuning.layers is not None:
            depth = min(1.0, tuning.layers / one.layers)
            top = 0 if one.tied and head else one.head if head else one.width
            learned = depth * one.layers * one.layer + top
        elif learns:
            learned = one.parameters if head else one.scorer
        return Net(name, one, model.precision, head, learned, depth)

    def most(self, rows: float, group: int = 1) -> float:
        """Rows of a micro-batch, of so many that a minibatch has; group: how many stay together."""
        mine, most = int(rows // self.processes), self.made.launch.micro_batch
        return packing.largest(mine, most, group, self.on_cpu)

    def read(self, net: Net, rows: float, out: float) -> list[Work]:
        """A pass over given rows, and the gathering of what it is in shards of."""
        scoring = self.work("scoring", net, net.forward(rows, self.length, out))
        times = ceil(rows / self.processes / self.made.launch.micro_batch)
        return [scoring, *self.gathering(net, times)]

    def in_shards(self, net: Net) -> bool:
        """Whether a model's layers are gathered whenever they are called without learning."""
        launch = self.made.launch
        if net.learned or net.name not in {*FROZEN, SFT}:
            return launch.zero == 3 and launch.gather == "layers"
        return launch.frozen == "sharded" and net.name in JUDGES

    def gathering(self, net: Net, times: float) -> list[Work]:
        """The time it takes to gather a model in shards so often; none of one that is whole."""
        n = self.processes
        sent = times * net.parameters * BYTES[net.precision] * (n - 1) / n
        if not sent or not self.in_shards(net):
            return []
        return [Work("talking", 0.0, n * sent / (self.reach * STREAM))]

    def learn(self, net: Net, rows: float, out: float) -> Work:
        """A pass over given rows, its gradients, and the pass that checkpointing repeats."""
        forward = net.forward(rows, self.length, out)
        again = self.made.launch.checkpointing * net.depth
        return self.work("learning", net, forward * (1 + again) + net.backward(forward))

    def work(self, activity: Activity, net: Net, flop: float) -> Work:
        """So much arithmetic of one model on given texts."""
        return Work(activity, flop, flop / (self.gpu.flops(net.precision) * BUSY))

    def draw(self, each: Draw) -> list[Work]:
        """The work of drawing, all rows of a process at once, and of gathering what is in shards."""
        n, prompt, gpu = self.processes, self.prompt, self.gpu
        flop = seconds = 0.0
        mine, middle = each.rows / n, prompt + self.reply / 2
        for net in each.experts:
            one, number = net.shape, BYTES[net.precision]
            rate = gpu.flops(net.precision) * BUSY
            filling = net.forward(each.prompts / n, prompt, 1)
            matrices = 2 * (one.layers * one.layer + one.head)
            read = (matrices / 2 + mine * one.layers * one.kv * middle) * number
            token = mine * (matrices + 4 * one.layers * one.attention * middle)
            step = max(read / (gpu.bandwidth * STREAM), token / rate, one.layers * LAUNCH)
            flop += filling + self.reply * token
            seconds += filling / rate + self.reply * step
        drawing = Work("drawing", each.times * n * flop, each.times * n * seconds)
        steps = each.times * (1 + self.reply)
        return [drawing, *(work for net in each.experts for work in self.gathering(net, steps))]

    def talk(
        self, nets: Sequence[Net], steps: float, rows: float, copies: float = 0, group: int = 1
    ) -> list[Work]:
        """The time of what `sent` counts, none of it while something is computed; none of one process."""
        seconds = self.sent(nets, steps, rows, copies, group) / (self.reach * STREAM)
        return [Work("talking", 0.0, self.processes * seconds)] if seconds else []

    def sent(
        self, nets: Sequence[Net], steps: float, rows: float, copies: float = 0, group: int = 1
    ) -> float:
        """Bytes that each process sends in so many optimiser steps.

        rows: of a minibatch, of which `group` stay together; copies: how often ZeRO 3 gathers a whole one.
        """
        n, zero, total = self.processes, self.made.launch.zero, 0.0
        parts = ceil(rows / n / self.most(rows, group))
        for net in nets:
            whole, learned = float(net.parameters), net.learned
            told = {2: (parts + 1) * learned, 3: parts * (2 * whole + learned)}.get(
                zero, 2 * learned
            )
            gathered = copies * whole if zero == 3 and not self.in_shards(net) else 0.0
            total += (steps * told + gathered) * BYTES[net.precision]
        return total * (n - 1) / n

    @property
    def reach(self) -> float:
        """Bytes per second that a process can pass on in a ring through all of them.

        Between hosts, each of a host's processes carries its share of what leaves it.
        """
        slots = hosts.slots(self.made.launch)
        between = min(slots.values()) * self.gpu.network
        return self.gpu.link if len(slots) == 1 else min(self.gpu.link, between)

    def rows(self, kind: Literal["demos", "pairs"]) -> tuple[int, int | None]:
        """Training rows of the data; where nobody knows, a round number, and that number again."""
        data = self.made.data
        embedded = getattr(data, "embedded", None)
        source = getattr(data, "source", "embedded")
        if embedded is not None and source == "embedded":
            return getattr(embedded, kind), None
        if source == "hub":
            repository = getattr(data, "pairs_hub" if kind == "pairs" else "hub", data.hub)  # type: ignore[attr-defined]
            folders = getattr(data, "subsets", None)
            names = [f"{repository}/{each}" for each in folders] if folders else [repository]
            if ROWS.keys() >= set(names):
                return sum(ROWS[name] for name in names), None
        return SAMPLE, SAMPLE


def _needs(made: Recipe) -> set[str]:
    # By value: naming the enum itself would import torch.
    return {need.value for need in made.algo.needs}
