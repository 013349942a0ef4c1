"""As much of vLLM as this project uses, drawing with a small model on the CPU.

The names of classes, methods and parameters are those of vLLM 0.11; `test_samplers` holds them against the
installed package where there is one. Like vLLM it keeps what it has computed of prompts until told to forget
it, draws each request by its own seed, and cannot draw while it sleeps.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

KNOWN = {"GPTNeoXForCausalLM"}
Prefixes = dict[Any, Tensor]
"""Logits behind prompts that were seen before."""


@dataclass
class SamplingParams:
    """Those that are used."""

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: None
    outputs: list[CompletionOutput]
    finished: bool


class ModelRegistry:
    @staticmethod
    def get_supported_archs() -> set[str]:
        return KNOWN


def loaded(folder: str) -> Any:
    """A model with vLLM's way to take weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own = dict(model.named_parameters())
        names = set()
        for name, weight in weights:
            own[name].data.copy_(weight)
            names.add(name)
        return names

    model.load_weights = load_weights
    return model


@torch.no_grad()
def respond(
    model: Any, prompt: Sequence[int], how: SamplingParams, prefixes: Prefixes, key: Any
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities; `key` finds the prompt among the prefixes."""
    assert (how.top_p, how.min_p, how.repetition_penalty, how.ignore_eos) == (1.0, 0.0, 1.0, True)
    assert how.top_k in (0, -1) and how.logprobs == 0 and how.max_tokens and how.stop_token_ids
    generator = torch.Generator().manual_seed(how.seed)
    said: list[int] = []
    logps: list[float] = []
    while len(said) < how.max_tokens and (said[-1:] != how.stop_token_ids):
        if not said and key in prefixes:
            logits = prefixes[key]
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1]
            if not said:
                prefixes[key] = logits
        logp = (logits / (how.temperature or 1.0)).log_softmax(-1)
        picked = torch.multinomial(logp.exp(), 1, generator=generator)
        token = int(picked if how.temperature else logits.argmax())
        said.append(token)
        logps.append(float(logp[token]))
    return said, logps


class LLM:
    """An engine of this process."""

    begun: ClassVar[list[LLM]] = []
    """Every engine there is, for tests to look into."""

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        distributed_executor_backend: str | None = None,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        generation_config: str = "auto",
    ) -> None:
        if gpu_memory_utilization > 0.95:
            raise ValueError("Free memory on device (1.0/80.0 GiB) is less than desired.\nMore.")
        assert enable_sleep_mode and tensor_parallel_size == 1 and seed == 0 and dtype == "float32"
        assert logprobs_mode == "processed_logprobs" and generation_config == "vllm"
        assert distributed_executor_backend is None  # one process
        self.longest = max_model_len
        self.model = loaded(model)
        self.prefixes: Prefixes = {}
        self.asleep = False
        self.done: list[str] = []
        LLM.begun.append(self)

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert not self.asleep and not use_tqdm and len(prompts) == len(sampling_params)
        self.done.append("generate")
        return [
            self._output(str(number), prompt["prompt_token_ids"], how)
            for number, (prompt, how) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def _output(self, number: str, ids: list[int], how: SamplingParams) -> RequestOutput:
        said, logps = respond(self.model, ids, how, self.prefixes, tuple(ids))
        steps = [{token: Logprob(logp)} for token, logp in zip(said, logps, strict=True)]
        assert self.longest is None or len(ids) + len(said) <= self.longest
        reason = "stop" if said[-1:] == how.stop_token_ids else "length"
        output = CompletionOutput(0, "", said, sum(logps), steps, reason)
        return RequestOutput(number, None, ids, None, [output], True)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        assert not self.asleep
        self.done.append("apply_model")
        return [func(self.model)]

    def reset_prefix_cache(self) -> None:
        self.done.append("reset_prefix_cache")
        self.prefixes.clear()

    def sleep(self, level: int = 1) -> None:
        assert level == 1
        self.done.append("sleep")
        self.asleep = True
        self.prefixes.clear()

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert tags is None
        self.done.append("wake_up")
        self.asleep = False


class StatelessProcessGroup:
    """Members of one process, one thread each, who meet at a port."""

    rooms: ClassVar[defaultdict[int, dict[int, queue.Queue[Tensor]]]] = defaultdict(dict)
    meeting = threading.Condition()

    def __init__(self, rank: int, room: dict[int, queue.Queue[Tensor]]) -> None:
        self.rank, self.room = rank, room

    @staticmethod
    def create(host: str, port: int, rank: int, world_size: int) -> StatelessProcessGroup:
        assert host == "127.0.0.1"
        with StatelessProcessGroup.meeting:
            room = StatelessProcessGroup.rooms[port]
            room[rank] = queue.Queue()
            StatelessProcessGroup.meeting.notify_all()
            assert StatelessProcessGroup.meeting.wait_for(lambda: len(room) == world_size, 60)
        return StatelessProcessGroup(rank, room)


class PyNcclCommunicator:
    def __init__(self, group: StatelessProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device

    def broadcast(self, tensor: Tensor, src: int) -> None:
        if self.group.rank == src:
            for rank, box in self.group.room.items():
                if rank != src:
                    box.put(tensor.clone())
        else:
            tensor.copy_(self.group.room[self.group.rank].get(timeout=60))


@dataclass
class Worker:
    """The worker of a server, before it is given an extension."""

    model_runner: Any
    model_config: Any
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def worker(folder: str, extension: type) -> Any:
    """A worker as `--worker-extension-cls` makes it."""
    model = loaded(folder)
    made = type("Worker", (Worker, extension), {})
    return made(SimpleNamespace(model=model), SimpleNamespace(hf_config=model.config))


class Api:
    """The endpoints of a server in development mode that are used."""

    def __init__(self, worker: Any, encode: Callable[[str], list[int]], longest: int) -> None:
        self.worker, self.encode, self.longest = worker, encode, longest
        self.prefixes: Prefixes = {}

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer."""
        answers = {
            "/tokenize": self.tokenize,
            "/collective_rpc": self.collective_rpc,
            "/v1/completions": self.completions,
        }
        return answers[path](body)

    def tokenize(self, body: Any) -> tuple[int, Any]:
        assert body["add_special_tokens"] is False
        ids = self.encode(body["prompt"])
        return 200, {"count": len(ids), "max_model_len": self.longest, "tokens": ids}

    def collective_rpc(self, body: Any) -> tuple[int, Any]:
        assert all(isinstance(each, str) for each in body["args"])
        return 200, {"results": [getattr(self.worker, body["method"])(*body["args"])]}

    def completions(self, body: Any) -> tuple[int, Any]:
        names = SamplingParams.__dataclass_fields__
        how = SamplingParams(**{name: body[name] for name in names if name in body})
        assert body["return_token_ids"] is True
        key = (body["cache_salt"], *body["prompt"])
        model = self.worker.model_runner.model
        said, logps = respond(model, body["prompt"], how, self.prefixes, key)
        choice = {"index": 0, "text": "", "token_ids": said}
        return 200, {"choices": [{**choice, "logprobs": {"token_logprobs": logps}}]}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this imported where `vllm` is asked for."""
    here = sys.modules[__name__]
    top = [LLM, SamplingParams, ModelRegistry]
    communicators = "vllm.distributed.device_communicators"
    contents = {
        "vllm": top,
        "vllm.distributed": [],
        "vllm.distributed.utils": [StatelessProcessGroup],
        communicators: [],
        f"{communicators}.pynccl": [PyNcclCommunicator],
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = here.__spec__
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "begun", [])
