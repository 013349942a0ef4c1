"""What a stage holds in one process: bytes of every model in every phase, and which preset makes it fit.

An estimate, for texts as long as the data allow; `scripts/memory.py` holds it against measured peaks. A model
that learns, of N parameters of which n learn, over p processes, takes (Rajbhandari et al. 2020,
arXiv:1910.02054):

    weights         2 N bytes in bf16 or fp16, 4 N in fp32; under ZeRO 3 a p-th of that
    optimiser       12 n: two moments, and a master in fp32 where weights are not or are sharded; a p-th from
                    ZeRO 1 on; in the host's memory with launch.offload, gradients in fp32 beside them
    gradients       as large as the weights that learn; a p-th from ZeRO 2 on, and a bucket to add them up in

Models that only answer are where `launch.frozen` says: whole in every process, in the host's memory until
they are asked, or a p-th in each. Under ZeRO 3 the weights of those that learn are gathered into a whole copy
before every rollout and evaluation; with `launch.gather=layers` the first process alone has that copy, in the
host's memory, and layers are gathered one after another whenever they are called.

    drawing         keys and values of all responses of a process, and the distribution of the next token
    scoring         one model's pass over a micro-batch
    learning        what every layer keeps of a micro-batch for the backward pass, gradients, and logits or
                    what one layer has at once, whichever is more
    stepping        gradients in fp32 and what AdamW needs for its own arithmetic
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from rlhf_cli import hosts, packing
from rlhf_cli.checks import placement
from rlhf_cli.cost import BYTES, FROZEN, JUDGES, Desk, Draw, Net
from rlhf_cli.devices import GPU
from rlhf_cli.recipes import Launch, Vllm

if TYPE_CHECKING:
    from rlhf_cli.config import Recipe

Phase = Literal["drawing", "scoring", "learning", "stepping"]
PHASES: tuple[Phase, ...] = get_args(Phase)

ADAM, MASTER, GRADIENT, SCRATCH = 8, 4, 4, 4
"""Bytes a parameter: both moments; the fp32 copy; its gradient; what AdamW's own arithmetic needs."""
LOGIT = 12
"""Bytes a logit of a backward pass: its log-softmax and two gradients, all fp32."""
READ: Mapping[int, int] = {4: 8, 2: 10}
"""Bytes a logit where nothing is kept, by bytes of a number: over the temperature, fp32, its log-softmax."""
BUCKET, LIVE, AHEAD = 5e8, 1e9, 5e7
"""DeepSpeed's own settings: numbers of the bucket in which gradients are added up (`reduce_bucket_size`),
most weights that ZeRO 3 has gathered at one time while it learns (`stage3_max_live_parameters`), and those
that it gathers ahead of their use (`stage3_prefetch_bucket_size`)."""
MOST = 4096
"""Processes beyond which nobody is told to go."""


@dataclass(frozen=True)
class Part:
    """Bytes of one model in one process."""

    name: str
    weights: float = 0.0
    states: float = 0.0
    """Of the optimiser: there all the time, as weights are."""
    adds: Mapping[Phase, float] = field(default_factory=dict)
    """What it takes beside these in a phase."""
    visits: float = 0.0
    """Weights that are there only while models are asked."""
    host: float = 0.0
    """In the host's memory."""
    host_once: float = 0.0
    """In the memory of the first host, by the first process alone."""

    @property
    def always(self) -> float:
        """What is there all the time."""
        return self.weights + self.states


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage takes in one process."""

    parts: tuple[Part, ...]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those in which anything is added, in the order they come."""
        return tuple(each for each in PHASES if any(each in part.adds for part in self.parts))

    def at(self, phase: Phase) -> float:
        """Bytes at the fullest moment of a phase. Models score one after another, and learn together."""
        added = [part.adds.get(phase, 0.0) for part in self.parts]
        always = sum(part.always for part in self.parts)
        if phase == "scoring":
            return always + sum(part.visits for part in self.parts) + max(added)
        return always + sum(added)

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment of all."""
        return max(self.at(phase) for phase in self.phases)

    def host(self, processes: int) -> float:
        """Bytes in the memory of the first host, which has so many processes."""
        return sum(processes * part.host + part.host_once for part in self.parts)

    @property
    def copies(self) -> float:
        """Bytes of the whole copies that ZeRO 3 gathers on the device; 0 where it gathers none."""
        return sum(part.weights for part in self.parts if part.name == COPIES)


COPIES = "whole copies"
"""What the weights are gathered into under ZeRO 3."""


def of_stage(stage: str, made: Recipe, scored: bool) -> Memory:
    """What a stage holds; scored: whether the chain has a reward model of its own.

    Raises `shapes.Unknown`.
    """
    hold = Hold(Desk.longest(made))
    return {"sft": hold.sft, "reward": hold.reward}.get(stage, lambda: hold.rl(scored))()


@dataclass(frozen=True)
class Hold:
    """One recipe, and what its stages hold."""

    desk: Desk

    @property
    def launch(self) -> Launch:
        """How it is run."""
        return self.desk.made.launch

    def sft(self) -> Memory:
        """The policy: logits at every token of a demonstration, and a few responses at the end."""
        desk, made = self.desk, self.desk.made
        policy = desk.net("policy", made.model, learns=True)
        rows = desk.most(made.sft.batch)
        return self._memory(
            [policy], [], [desk.evaluation(policy)], rows, desk.length, desk.length, 1
        )

    def reward(self) -> Memory:
        """The reward model, and at the end the policy that its scale is measured with."""
        desk, made = self.desk, self.desk.made
        scorer = desk.net("reward model", made.reward.model, learns=True, head=False)
        rows, draw = desk.most(2 * made.reward.batch, 2), desk.calibration()
        found = self._memory([scorer], [], [draw], rows, 0, 0, 2)
        (policy,), (drawing,) = draw.experts, self._drawn(draw).values()
        there = _weights(policy) / (desk.processes if self.launch.frozen == "sharded" else 1)
        return Memory((*found.parts, Part(policy.name, adds={"drawing": there + drawing})))

    def rl(self, scored: bool) -> Memory:
        """All models of an RL stage."""
        desk, sampler, algo = self.desk, self.desk.made.sampler, self.desk.made.algo
        nets = desk.cast(scored)
        frozen = [net for name, net in nets.items() if name in FROZEN]
        actors = [net for name, net in nets.items() if name not in FROZEN]
        group = algo.sampling().responses
        rows = desk.most(algo.update.batch // algo.update.minibatches, group)
        logits = desk.reply * (1 + algo.wants_entropy() + ("Q" in nets))
        draws = desk.draws(nets, 1, 1)
        found = self._memory(actors, frozen, draws, rows, logits, desk.reply, group)
        if isinstance(sampler, Vllm) and sampler.url is None:
            return Memory((*found.parts, Part("vLLM", sampler.memory * desk.gpu.memory)))
        return found

    def _memory(
        self,
        actors: Sequence[Net],
        frozen: Sequence[Net],
        draws: Sequence[Draw],
        rows: float,
        logits: float,
        read: float,
        group: int,
    ) -> Memory:
        """All parts; rows: of a micro-batch; logits, read: formed of each to learn and to score.

        group: rows that have their prompt in common.
        """
        held = (self._drawn(draw, frozen) for draw in draws)
        drawn = max(held, key=lambda found: sum(found.values()))
        total = sum(net.parameters for net in actors)
        parts = []
        for net in actors:
            adds: dict[Phase, float] = {"scoring": self._pass(net, read, group) + self._layers(net)}
            if net.name in drawn:
                adds["drawing"] = drawn[net.name]
            if net.learned:
                live = LIVE * net.parameters / total
                adds |= self._learning(net, rows, logits if net.has_head else 0, live, group)
            parts.append(self._learner(net, adds))
        if self.launch.zero == 3:
            whole = sum(_weights(net) for net in actors)
            on_host = self.launch.gather == "layers"
            parts.append(Part(COPIES, host_once=whole) if on_host else Part(COPIES, whole))
        parts += [self._frozen(net, read, drawn.get(net.name, 0.0), group) for net in frozen]
        return Memory(tuple(parts))

    def _frozen(self, net: Net, read: float, drawing: float, group: int) -> Part:
        """A model that only answers, where the launch puts it; drawing: what it takes while there is any."""
        launch = self.launch
        shared = self.desk.made.model.tuning.lora is not None and launch.zero < 3
        weights = 0.0 if shared and net.name == "reference" else _weights(net)
        adds: dict[Phase, float] = {"scoring": self._pass(net, read, group) + self._layers(net)}
        if drawing:
            adds["drawing"] = drawing
        if launch.frozen == "sharded" and net.name in JUDGES:
            return Part(net.name, weights / self.desk.processes, adds=adds)
        if launch.frozen == "host" and net.name in JUDGES:
            return Part(net.name, adds=adds, visits=weights, host=weights)
        return Part(net.name, weights, adds=adds)

    def _layers(self, net: Net) -> float:
        """What a pass has gathered at once of a model in shards, its largest layer and those ahead of it."""
        if not self.desk.in_shards(net):
            return 0.0
        largest = max(net.shape.layer, net.shape.head)
        return min(net.parameters, largest + AHEAD) * BYTES[net.precision]

    def _learner(self, net: Net, adds: Mapping[Phase, float]) -> Part:
        """A model of the learner: its weights and the optimiser's states, where the launch puts them."""
        zero, offload, n = self.launch.zero, self.launch.offload, self.desk.processes
        weights = _weights(net) / (n if zero == 3 else 1)
        states = net.learned * (ADAM + self._master(net)) / (n if zero else 1)
        if offload == "none":
            return Part(net.name, weights, states, adds)
        host = states + net.learned * GRADIENT / n
        if offload == "optimizer":
            return Part(net.name, weights, adds=adds, host=host)
        return Part(net.name, adds=adds, host=host + weights)

    def _learning(
        self, net: Net, rows: float, logits: float, live: float, group: int
    ) -> dict[Phase, float]:
        """What its backward pass over a micro-batch and its step add."""
        launch, number, zero = self.launch, BYTES[net.precision], self.launch.zero
        offloaded = launch.offload != "none"
        gradients = net.learned * number / (self.desk.processes if zero >= 2 else 1)
        bucket = min(net.learned, BUCKET) * number if zero else 0.0
        gathered = min(net.parameters, live) * number if zero == 3 else 0.0
        # Backwards through the logits first, then through one layer after another.
        tops = rows * logits * net.shape.vocab * LOGIT
        tokens, columns = self._fed(net, group)
        inside = rows * tokens * net.shape.flow * number
        kept = self._kept(net, rows * tokens, columns) + max(tops, inside)
        steps = net.learned * (SCRATCH + self._master(net)) / (self.desk.processes if zero else 1)
        return {
            "learning": (0.0 if offloaded else gradients) + bucket + gathered + kept,
            "stepping": 0.0 if offloaded else gradients + steps,
        }

    def _fed(self, net: Net, group: int) -> tuple[float, float]:
        """Tokens of a sequence that a row accounts for, and tokens of the whole one."""
        prompt, reply = self.desk.prompt, self.desk.reply
        each = 1
        if self.launch.attention != "flash_attention_2":
            each = packing.together(net.shape.width, int(prompt), int(reply), group)
        return prompt / each + reply, prompt + each * reply

    def _kept(self, net: Net, tokens: float, columns: float) -> float:
        """Activations that a micro-batch of so many tokens keeps, in sequences of so many columns."""
        one, number, launch = net.shape, BYTES[net.precision], self.launch
        layers = one.layers * net.depth
        layer = one.kept + one.scores(launch.attention, number) * columns
        each = one.width * layers + layer if launch.checkpointing else layer * layers
        return tokens * each * number

    def _pass(self, net: Net, out: float, group: int) -> float:
        """Bytes of a pass over a micro-batch that keeps nothing; out: tokens of each row with logits."""
        one, number, rows = net.shape, BYTES[net.precision], self.launch.micro_batch
        tokens, columns = self._fed(net, group)
        inside = (one.flow + one.scores(self.launch.attention, number) * columns) * number
        logits = out * one.vocab * READ[number] if net.has_head else 0.0
        return rows * max(tokens * inside, logits)

    def _drawn(self, draw: Draw, frozen: Sequence[Net] = ()) -> dict[str, float]:
        """Bytes by model while a process draws its responses, all at once.

        frozen: those that come from the host's memory if one of them is drawn from.

        First prompts are read, then their keys and values are copied for each response. A layer's are there
        twice where rows that have ended leave, or queries share them.
        """
        desk, n = self.desk, self.desk.processes
        rows, prompts = draw.rows / n, draw.prompts / n
        found = {}
        for net in draw.experts:
            one, number = net.shape, BYTES[net.precision]
            cache = one.layers * one.kv * desk.length * number
            again = max(one.kv, 2 * one.attention) * desk.length * number
            chance = one.vocab * (2 * number + 8)
            reading = prompts * (cache + desk.prompt * one.flow * number)
            filled = rows * (cache + again + chance)
            found[net.name] = max(reading, filled) + self._layers(net)
        if self.launch.frozen == "host" and found.keys() & JUDGES:
            for net in (net for net in frozen if net.name in JUDGES):
                found[net.name] = found.get(net.name, 0.0) + _weights(net)
        return found

    def _master(self, net: Net) -> int:
        """Bytes a parameter of the fp32 copy, where weights are in half precision or sharded."""
        return MASTER if BYTES[net.precision] < 4 or self.launch.zero else 0


def _weights(net: Net) -> float:
    return float(net.parameters * BYTES[net.precision])


@dataclass(frozen=True)
class Preset:
    """How the states of a learner are spread."""

    zero: int
    offload: Literal["none", "optimizer", "all"] = "none"
    frozen: Literal["whole", "host", "sharded"] = "whole"
    gather: Literal["whole", "layers"] = "whole"

    def under(self, made: Recipe, processes: int) -> Recipe:
        """The recipe with this preset, on so many processes of one host."""
        launch = replace(
            made.launch,
            kind="deepspeed", processes=processes, hostfile=None, include=None, exclude=None,
            **asdict(self),
        )  # fmt: skip
        return replace(made, launch=launch)

    def words(self, launch: Launch) -> str:
        """What is typed to have it, with the processes that the launch has."""
        n = hosts.workers(launch)
        if self.zero == 0 and n == 1:
            words = ["launch=inline"]
        else:
            processes = [f"launch.processes={n}"] if launch.hostfile is None else []
            words = ["launch=deepspeed", *processes, f"launch.zero={self.zero}"]
        for name in ("offload", "frozen", "gather"):
            if (value := getattr(self, name)) != getattr(launch, name):
                words.append(f"launch.{name}={value}")
        return " ".join(words)


LADDER = (
    Preset(0),
    Preset(2),
    Preset(2, frozen="host"),
    Preset(2, "optimizer", "host"),
    Preset(3, frozen="sharded"),
    Preset(3, "all", "sharded"),
    Preset(3, "all", "sharded", "layers"),
)
"""From what costs no time to what costs most."""


def fitting(
    stages: Sequence[tuple[str, Recipe, bool]], gpu: GPU, processes: int
) -> tuple[Preset, float] | None:
    """The first preset under which all stages fit, each given as to `of_stage`, and bytes at their fullest.

    None if there is none. Raises `shapes.Unknown`.
    """
    for preset in LADDER:
        under = [(stage, preset.under(made, processes), scored) for stage, made, scored in stages]
        if any(list(placement(made)) for stage, made, _ in under if stage == "rl"):
            continue
        peak = max(of_stage(*each).peak for each in under)
        if peak <= gpu.memory:
            return preset, peak
    return None


def enough(stages: Sequence[tuple[str, Recipe, bool]], gpu: GPU, processes: int) -> int | None:
    """So many processes, of `processes` and its doubles, on which a preset fits; None if none up to `MOST`.

    Whether the batches can be dealt out to them is not asked.
    """
    return next((n for n in _doubles(processes) if fitting(stages, gpu, n)), None)


def _doubles(number: int) -> Iterator[int]:
    while number <= MOST:
        yield number
        number *= 2
