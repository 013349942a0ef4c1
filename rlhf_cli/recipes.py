"""The typed shapes of a configuration: types, units, meaning and bounds, never a value.

Values live in `conf/`; no field here has a default, so the composed yaml is the complete record of a
run. Algorithms and datasets are recipes too, but each lives in its own file, next to its mathematics or
its parser. This module imports nothing of the project, so every room may use it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)
"""Settings shared by every recipe: an unknown key is an error, and so is inf or nan."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Optim:
    """AdamW and its learning-rate schedule.

    The learning rate at optimiser step `s` of `S` is `lr * min(1, (s+1)/(warmup*S)) * decay(s/S)`, where
    decay is 1 (constant), `1 - s/S` (linear) or `(1 + cos(pi*s/S))/2` (cosine).
    """

    lr: Positive
    """Peak learning rate of the policy (or of the only model that is trained)."""
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    """Share of all optimiser steps spent in linear warm-up."""
    betas: tuple[Share, Share]
    eps: Positive
    weight_decay: NonNegative
    grad_clip: NonNegative
    """Largest global L2 norm of the gradient; 0 leaves it unclipped."""


@dataclass(frozen=True, config=STRICT)
class Update:
    """How many responses an online run draws and how often each is learned from.

    One unit throughout: an episode is one sampled response. Equal `episodes` is therefore an equal
    sampling budget for every algorithm, whatever its number of responses per prompt.
    """

    episodes: Count
    """Responses drawn in the whole run."""
    batch: Count
    """Responses drawn per rollout, over all processes."""
    epochs: Count
    """Passes over each rollout."""
    minibatches: Count
    """Optimiser steps per pass."""


@dataclass(frozen=True, config=STRICT)
class Guide:
    """A second policy that an algorithm is guided by: an RL run of its own, trained first."""

    name: str
    """The word in the name of its run."""
    seed: int
    """Its own, so that a sweep over `seed` trains one guide."""
    algo: dict[str, Any]
    """How it is trained: a whole choice of the group `algo`, with `_target_`."""


@dataclass(frozen=True, config=STRICT)
class Scratch:
    """Shape of a GPT-NeoX decoder that is trained from random weights."""

    layers: Count
    width: Count
    heads: Count
    vocab: Annotated[int, Field(ge=300)]
    """Entries of the byte-level BPE trained on the corpus (256 bytes and the special tokens included)."""
    context: Count
    """Longest sequence in tokens."""
    seed: int
    """Seed of the initial weights."""


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count
    alpha: Count
    """Adapters count alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the linear layers that get them, e.g. query_key_value; [all-linear] is all but the output
    layer."""


@dataclass(frozen=True, config=STRICT)
class Tuning:
    """Which weights learn; both null is all of them."""

    lora: Lora | None
    """Adapters alone. What a stage leaves has them merged in; the policy without its adapters is the
    reference of the RL stage, so that no second copy is loaded."""
    layers: Count | None
    """So many of the top layers, with the norm after them and an untied output layer."""


@dataclass(frozen=True, config=STRICT)
class Model:
    """The policy's architecture and where its first weights come from."""

    label: str
    """The word for it in run names, e.g. pythia_1b."""
    regime: Literal["nano", "paper"]
    """Which column of the shipped learning rates applies: nano below about 10M parameters, else paper."""
    scratch: Scratch | None
    """Shape of a model trained from scratch; null loads `name` instead."""
    name: str | None
    """A Hugging Face repository or a local folder; null for a model trained from scratch."""
    revision: str | None
    """Commit of the repository `name`; null only for a local folder."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of the trained model; fp16 scales its loss and needs a GPU. Sums of log-probabilities
    are fp32 always."""
    tuning: Tuning
    """Which of its weights learn; a critic's as the reward model's it starts from."""

    def starts_like(self, other: Model) -> bool:
        """Whether the first weights of both are the same, however they are trained."""
        mine, theirs = ((m.scratch, m.name, m.revision) for m in (self, other))
        return mine == theirs


@dataclass(frozen=True, config=STRICT)
class SFT:
    """Supervised fine-tuning on demonstrations: the policy every later stage starts from."""

    seed: int
    epochs: NonNegative
    """Passes over the demonstrations; a fraction stops early, 0 leaves the model's own weights."""
    batch: Count
    """Demonstrations per optimiser step, over all processes."""
    loss_on_prompt: bool
    """Whether prompt tokens are learned too; they must be when the model starts from random weights."""
    optim: Optim


@dataclass(frozen=True, config=STRICT)
class Learned:
    """The reward model that the chain trains on the data's preferences."""

    kind: Literal["learned"]


@dataclass(frozen=True, config=STRICT)
class Gold:
    """The true reward, which only embedded data have."""

    kind: Literal["gold"]


@dataclass(frozen=True, config=STRICT)
class Function:
    """A Python function of a list of prompts and a list of responses that returns a list of numbers."""

    kind: Literal["function"]
    call: str
    """Its dotted path, in an installed module or in the working directory."""
    batch: Count
    """Most responses per call."""


@dataclass(frozen=True, config=STRICT)
class Http:
    """A server that is sent prompts and responses and answers with scores (`rewards/http.py`)."""

    kind: Literal["http"]
    url: str
    key_env: str | None
    """Variable of the environment that holds the bearer token; null sends none."""
    batch: Count
    """Most responses per request."""
    timeout: Positive
    """Seconds to wait for an answer."""
    retries: Annotated[int, Field(ge=0)]
    """Further attempts after one that failed."""


@dataclass(frozen=True, config=STRICT)
class Classifier:
    """A sequence classifier with one label, from the hub or a folder."""

    kind: Literal["hf"]
    name: str
    """A Hugging Face repository or a local folder."""
    revision: str | None
    """Commit of the repository; null only for a local folder."""
    precision: Literal["fp32", "bf16"]
    form: Literal["plain", "pair", "chat"]
    """What it reads: prompt and response in one, as two texts of a pair, or its tokenizer's chat template
    with the prompt as the user's turn."""
    max_tokens: Count
    """Longest input; longer ones are cut by its tokenizer."""
    batch: Count
    """Most responses at once."""


Single: TypeAlias = Annotated[
    Learned | Gold | Function | Http | Classifier, Field(discriminator="kind")
]


@dataclass(frozen=True, config=STRICT)
class Part:
    """One of the rewards of a sum."""

    weight: float
    source: Single


@dataclass(frozen=True, config=STRICT)
class Mix:
    """A weighted sum of rewards."""

    kind: Literal["mix"]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]


Source: TypeAlias = Annotated[
    Learned | Gold | Function | Http | Classifier | Mix, Field(discriminator="kind")
]


@dataclass(frozen=True, config=STRICT)
class Reward:
    """What a response is worth, and how the chain's Bradley-Terry model of it is trained."""

    source: Source
    """Who scores in the RL stage and in its evaluations."""
    missing: Literal["stop", "leave"]
    """What a score that is missing or no number does: stop the run, or make its prompt leave the rollout,
    another one standing in for it (evaluations count it and average the rest)."""
    seed: int
    model: Model
    """Architecture of the trained one, which starts from the SFT policy; the policy's unless overridden
    (`model@reward.model=...`)."""
    epochs: Positive
    batch: Count
    """Preference pairs per optimiser step, over all processes."""
    normalise: Literal["samples", "references", "none"]
    """Zero and unit of the trained model's scores. samples: mean 0 and standard deviation 1 over responses
    of the SFT policy (Ziegler et al. 2019, arXiv:1909.08593); references: mean 0 over demonstrations, the
    unit left as it is (Huang et al. 2024, arXiv:2403.17031); none: neither."""
    calibration: Annotated[int, Field(ge=2)]
    """How many training prompts, or demonstrations, that is measured on."""
    relative: bool
    """Whether what is learned from is how far a response scores above the dataset's own answer to its
    prompt. Evaluations tell the score itself, so that runs of either kind can be compared."""
    unended: float | None
    """Score of a response that was cut before it ended, in place of the model's own, which never saw
    one (Huang et al. 2024, "EOS trick"); null keeps the model's."""
    unended_adds: bool
    """Whether `unended` is added to the model's score instead of replacing it."""
    optim: Optim

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the reward is the sum of."""
        return self.source.parts if isinstance(self.source, Mix) else (Part(1.0, self.source),)

    @property
    def learned(self) -> float:
        """What a unit of the chain's own model counts; 0 if none is part of it."""
        return sum(part.weight for part in self.parts if isinstance(part.source, Learned))


@dataclass(frozen=True, config=STRICT)
class Drawing:
    """How an RL run draws the responses it learns from; evaluations draw at temperature 1, unnoised."""

    temperature: Positive
    """Divides the logits of policy, reference and guide, in drawing and in every log-probability alike."""
    noise: NonNegative
    """Standard deviation of Gaussian noise added to each score that is learned from (Ahmadian et al.
    2024, arXiv:2402.14740, section 5.3); the scores of a calibrated reward model have 1 under SFT."""


@dataclass(frozen=True, config=STRICT)
class Evaluation:
    """The measurement contract: what every point of a frontier has in common."""

    prompts: Count
    """Held-out prompts, the same in every run on the dataset; fewer only if the split has fewer."""
    points: Count
    """Evaluations after step 0, spread evenly over the run; the last one is the end of the run."""
    seed: int
    """Seed of the sampled responses."""
    proxy: bool
    """Whether a reward model is part of the chain even of an algorithm that asks for none, so that its
    evaluations have a proxy reward too."""
    exact_kl: bool
    """Also sum the KL over the full vocabulary at each visited state (`eval/kl_exact`)."""


@dataclass(frozen=True, config=STRICT)
class ByScore:
    """A judge that prefers the response with the higher score in the runs' own samples."""

    kind: Literal["reward", "gold"]
    prompts: Count | None
    """So many of the runs' evaluation prompts, from the first; null is all."""
    tolerance: NonNegative
    """Scores no further apart than this tie, in units of the score."""


@dataclass(frozen=True, config=STRICT)
class Chat:
    """A judge that is a language model behind OpenAI's chat-completions protocol."""

    kind: Literal["llm"]
    prompts: Count | None
    """As above."""
    model: str
    """Its name at the endpoint, with the date or the digest that pins it."""
    url: str
    """The protocol's base address, to which /chat/completions is added."""
    key_env: str | None
    """Variable of the environment that holds the key; null sends none."""
    prompt: Literal["hh-1", "tldr-1"]
    """What it is asked (`judges/prompts.py`); the number changes with the wording."""
    max_tokens: Count
    """Longest answer."""
    parallel: Count
    """Most requests at once."""
    per_minute: Count | None
    """Most requests begun in a minute; null leaves that to the endpoint."""
    timeout: Positive
    """Seconds to wait for an answer."""
    retries: Annotated[int, Field(ge=0)]
    """Further attempts after one that failed."""
    price_in: NonNegative | None
    """Of a million tokens that are sent; null if unknown or free."""
    price_out: NonNegative | None
    """Of a million tokens that are answered."""
    cache: str
    """Folder of the answers that were given so far."""


Judge: TypeAlias = ByScore | Chat


@dataclass(frozen=True, config=STRICT)
class Launch:
    """How a stage is run. Never part of a key: it may change the speed of a run, not its numbers."""

    kind: Literal["inline", "deepspeed"]
    """inline: in this process; deepspeed: through DeepSpeed's launcher."""
    processes: Count
    """On this host; with a hostfile, what that says of each."""
    slots: Count | None
    """Runs of a sweep at once, each with its share of the cores or of the GPUs; null is what hydra/launcher
    says, and by itself one after the other."""
    zero: Annotated[int, Field(ge=0, le=3)]
    """ZeRO stage: what is sharded between processes (0 nothing, 3 the weights too)."""
    offload: Literal["none", "optimizer", "all"]
    """What of the model that learns waits in the host's memory: AdamW's masters and moments (from ZeRO 1 on),
    or under ZeRO 3 the weights too."""
    gather: Literal["whole", "layers"]
    """Under ZeRO 3: whether drawing and scoring have a whole copy of the weights, gathered before each
    rollout, or gather every layer whenever it is asked, which is many times slower."""
    frozen: Literal["whole", "host", "sharded"]
    """Where models that do not learn (reference, reward model, guide) are: whole in every process; in the
    host's memory while they are not asked; or sharded over the processes, layer by layer gathered."""
    micro_batch: Count
    """Most responses (or rows) per forward pass and process."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    """Kernel; auto is transformers' choice."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass instead of being kept."""
    gpu: str | None
    """What a process will have, by a name of `rlhf_cli.devices`, e.g. h100: `rlhf plan` says what fits."""
    hostfile: str | None
    """DeepSpeed's list of hosts, a line `NAME slots=N` each; null is this host alone."""
    include: str | None
    """Hosts and slots of the hostfile to be used, e.g. worker-0@worker-1:0,2; null is all of them."""
    exclude: str | None
    """Those not to be used."""
    through: Literal["pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm"]
    """Which of DeepSpeed's launchers starts the workers of other hosts."""
    no_ssh: bool
    """Whether instead the same command is given on every host, each with its own node_rank."""
    node_rank: Annotated[int, Field(ge=0)] | None
    """Which line of the hostfile this host is, from 0; only with no_ssh."""
    master_addr: str | None
    """Address of the first host; null asks it over ssh."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None
    """Port of the first host where the workers meet; null is one that is free."""
    ds_config: str | None
    """A JSON file of DeepSpeed's settings, taken as it is; what the run sets itself it must leave out."""
    timeout: Annotated[int, Field(ge=10)]
    """Seconds without word from a peer after which a process gives up."""


@dataclass(frozen=True, config=STRICT)
class Native:
    """Responses come from the trained model itself (`engine/sampler.py`)."""

    kind: Literal["native"]


@dataclass(frozen=True, config=STRICT)
class Vllm:
    """Responses come from vLLM, which is given the new weights before every rollout."""

    kind: Literal["vllm"]
    url: str | None
    """Base address of a vLLM server; null runs it in the workers, beside what they train."""
    memory: Share
    """Share of a GPU's memory that vLLM takes where it runs beside the training."""
    max_gap: Positive
    """Largest mean difference between its log-probabilities and the trainer's own, nats per token."""


Sampler: TypeAlias = Annotated[Native | Vllm, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    """What is kept of a run to go on from. Never part of a key."""

    every: Count
    """Optimiser steps after which another one is made at the latest, between two rollouts; there is also one
    at every evaluation, and where the run is asked to stop."""
    keep: Count
    """How many of the newest stay."""


@dataclass(frozen=True, config=STRICT)
class Guard:
    """What a run does when its numbers go wrong. In its key only if it backs off, which shapes them."""

    skips: Annotated[int, Field(ge=0)]
    """Optimiser steps of a stage that may be left out, their gradient being no number; one more ends it."""
    kl: Positive | None
    """Mean KL of a rollout, in nats, above which it is said to run away; null never says so."""
    action: Literal["warn", "back_off", "stop"]
    """At that, and when an evaluation finds texts collapsing; back_off halves the learning rates."""


@dataclass(frozen=True, config=STRICT)
class Train:
    """How long a command may take. Never part of a key."""

    max_hours: Positive | None
    """Hours after which it keeps a checkpoint and ends, to be given again; null does not end it."""


@dataclass(frozen=True, config=STRICT)
class Track:
    """Where metrics are mirrored; `metrics.jsonl` in the run directory is always the source."""

    kind: Literal["wandb", "off"]
    mode: Literal["auto", "offline"]
    """auto: online if W&B credentials are found, offline otherwise. Never a prompt."""
    project: str
    group: str | None
    """Name of the comparison; null is <data>-<model>."""


@dataclass(frozen=True, config=STRICT)
class Paths:
    """Where runs are kept."""

    runs: str
    """Folder of the run directories, relative to the working directory."""
    cache: str
    """Folder of rows that are kept as tokens; whatever is in it can be made again."""
