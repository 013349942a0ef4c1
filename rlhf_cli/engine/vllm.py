"""vLLM draws: in the workers beside what they train (`Colocated`), or behind a URL (`Served`).

Both are given the policy's weights before every rollout and forget what they have computed of prompts under
older ones. Nothing is cut off (no top-p, no top-k), and only the data's end token ends a response. Their
log-probabilities are compared with the trainer's, never learned from.

Each response has a seed of its own, made of the random numbers that the trained model would have drawn it
with: of the run's seed, the step and the row. So a run that is resumed asks for the same responses. Whether
it gets them is up to vLLM, whose kernels sum in an order that depends on what else is in the batch: a token
whose random number lies on the border of its interval may turn out differently, unless vLLM runs with
VLLM_BATCH_INVARIANT=1 on hardware that has it. Nothing of this depends on the number of processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli import recipes
from rlhf_cli.engine import pulse, vllm_worker
from rlhf_cli.engine.sampler import Draw, Sampler, left_pad
from rlhf_cli.engine.world import World, free_port
from rlhf_cli.errors import UserError
from rlhf_cli.models.tuning import merged
from rlhf_cli.remote import Server

AT_ONCE = 128
"""Responses a process asks a server for at the same time; the server makes batches of them."""
PATIENCE = 600.0
"""Seconds to wait for an answer of a server."""
PROBE = "Two cats, 3 dogs\nand a naïve owl."
"""A text that few tokenizers cut alike."""
START = (
    "start it as docs/samplers.md says, from the policy's folder, with VLLM_SERVER_DEV_MODE=1 and"
    " --worker-extension-cls rlhf_cli.engine.vllm_worker.Weights"
)

Answer = tuple[Sequence[int], Sequence[float]]
"""The tokens of a response, the end token included where there is one, and their log-probabilities."""


def sampler(
    chosen: recipes.Vllm,
    world: World,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> Sampler:
    """A sampler as the configuration says; folder: a policy of the same shape; longest: tokens of a text.

    Raises UserError if vLLM is not installed, if there is no GPU, or if the server is none of ours.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            'sampler=vllm needs vLLM, which is not installed; pip install "rlhf-cli[vllm]", or use'
            " sampler=native."
        )
    if world.device.type != "cuda":
        raise UserError(
            "sampler=vllm needs a CUDA GPU in every process, and here is none; use sampler=native."
        )
    if chosen.url is None:
        return Colocated(chosen, world, folder, longest)
    return Served(chosen, chosen.url, world, tokenizer, longest)


class Colocated:
    """One vLLM engine in each process; it sleeps, its memory given back, while the policy learns."""

    def __init__(self, chosen: recipes.Vllm, world: World, folder: Path, longest: int) -> None:
        self.max_gap = chosen.max_gap
        self._chosen, self._world, self._folder, self._longest = chosen, world, folder, longest
        self._llm: Any = None

    @contextmanager
    def holding(self, policy: PreTrainedModel) -> Iterator[None]:
        """Wakes with the policy's weights and sleeps again; the first time it starts."""
        pulse.rest()
        torch.cuda.empty_cache()  # what training left there for itself
        if self._llm is None:
            self._llm = self._started(policy)
        else:
            self._llm.wake_up()
        weights = list(named_weights(policy))
        self._llm.apply_model(lambda model: model.load_weights(weights))
        self._llm.reset_prefix_cache()
        pulse.beat()
        try:
            yield
        finally:
            self._llm.sleep(level=1)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        responses: int,
        uniform: Tensor,
        width: int,
        end: int,
        pad: int,
        temperature: float = 1.0,
    ) -> Draw:
        """As `sampler.draw`, by vLLM's own random numbers."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": list(ids)} for ids in prompts for _ in range(responses)]
        how = [
            SamplingParams(**wish(temperature, uniform.shape[1], end, seed), detokenize=False)
            for seed in seeds(uniform)
        ]
        pulse.rest()
        said = [each.outputs[0] for each in self._llm.generate(asked, how, use_tqdm=False)]
        pulse.beat()
        answers = [(one.token_ids, _logps(one.token_ids, one.logprobs)) for one in said]
        rows = [each["prompt_token_ids"] for each in asked]
        return laid_out(rows, answers, uniform, width, pad, temperature, self._world.device)

    def _started(self, policy: PreTrainedModel) -> Any:
        # Here and not in a process of its own: it is handed tensors, and shares the launcher's processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM, ModelRegistry

        architecture = type(policy).__name__
        if architecture not in ModelRegistry.get_supported_archs():
            raise UserError(
                f"sampler=vllm cannot draw from a {architecture}, which this vLLM does not know; use"
                " sampler=native, or a newer vLLM."
            )
        try:
            return LLM(
                model=str(self._folder),
                dtype=vllm_worker.dtype_name(policy.dtype),
                max_model_len=self._longest,
                gpu_memory_utilization=self._chosen.memory,
                tensor_parallel_size=1,
                distributed_executor_backend="external_launcher" if self._world.size > 1 else None,
                enable_sleep_mode=True,
                logprobs_mode="processed_logprobs",  # at the temperature, as the trainer's
                generation_config="vllm",  # no cuts and no further end tokens of the model's own
                seed=0,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"vLLM does not start with sampler.memory={self._chosen.memory:g} ({reason}); set another"
                " sampler.memory, a smaller launch.micro_batch, or sampler=native."
            ) from error


@dataclass(frozen=True)
class Address:
    """Where a server is; it is asked once, for one that was started again has lost the weights."""

    url: str
    key_env: str | None = None
    timeout: float = PATIENCE
    retries: int = 0


class Served:
    """A vLLM server on other GPUs; the main process sends it the weights over NCCL, all of them ask it."""

    def __init__(
        self,
        chosen: recipes.Vllm,
        url: str,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
    ) -> None:
        """Raises UserError if the server is down, shows another tokenizer, or takes too short texts."""
        self.max_gap = chosen.max_gap
        self._world, self._url = world, url
        self._server = Server("sampler", Address(url), AT_ONCE)
        self._line: Any = None
        self._salt = ""
        self._check(tokenizer, longest)

    @contextmanager
    def holding(self, policy: PreTrainedModel) -> Iterator[None]:
        """Sends the policy's weights; nobody goes on before they are there."""
        pulse.rest()
        if self._world.is_main:
            if self._line is None:
                self._line = self._joined(policy)
            self._send(policy)
        self._world.barrier()
        # What the server keeps of prompts is found by their salt too, so nothing of older weights is.
        self._salt = uuid.uuid4().hex
        pulse.beat()
        yield

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        responses: int,
        uniform: Tensor,
        width: int,
        end: int,
        pad: int,
        temperature: float = 1.0,
    ) -> Draw:
        """As `sampler.draw`, by vLLM's own random numbers; one request per response."""
        rows = [list(ids) for ids in prompts for _ in range(responses)]
        wishes = [wish(temperature, uniform.shape[1], end, seed) for seed in seeds(uniform)]
        answers: list[Answer] = []
        pulse.rest()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for answer in pool.map(self._answer, rows, wishes):
                answers.append(answer)
                pulse.beat()
        return laid_out(rows, answers, uniform, width, pad, temperature, self._world.device)

    def _answer(self, prompt: list[int], wished: dict[str, Any]) -> Answer:
        body = {**wished, "prompt": prompt, "return_token_ids": True, "cache_salt": self._salt}

        def read(said: Any) -> Answer:
            (choice,) = said["choices"]
            ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            if not 0 < len(ids) == len(logps) <= wished["max_tokens"]:
                raise ValueError
            return ids, logps

        form = "with token_ids and logprobs, as vLLM does from 0.11 on"
        return self._server.post("/v1/completions", body, read, form)

    def _check(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        body = {"prompt": PROBE, "add_special_tokens": False}
        theirs, room = self._server.post(
            "/tokenize",
            body,
            lambda said: (list(said["tokens"]), int(said["max_model_len"])),
            "with tokens and max_model_len, as vLLM does",
        )
        if theirs != ids:
            raise UserError(
                f"{self._server.whose} serves another model, whose tokens are not the policy's; {START}."
            )
        if room < longest:
            raise UserError(
                f"{self._server.whose} takes texts of {room} tokens, fewer than data.max_prompt_tokens +"
                f" data.max_response_tokens = {longest}; start it with --max-model-len {longest}."
            )

    def _joined(self, policy: PreTrainedModel) -> Any:
        """The line to the server's workers, by which the weights go."""
        try:
            workers = self._call("rlhf_about")
        except UserError as error:
            raise UserError(
                f"{self._server.whose} is a vLLM server that takes no weights; {START}."
            ) from error
        ours = vllm_worker.shape(policy.config, type(policy).__name__)
        if workers[0] != ours:
            raise UserError(
                f"{self._server.whose} serves {_told(workers[0])}, but the policy is {_told(ours)};"
                f" {START}."
            )
        where = (_own_address(self._url), free_port(), len(workers) + 1)
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(self._call, "rlhf_join", *where)
            line = vllm_worker.line(*where, rank=0, device=self._world.device)
            joining.result()
        return line

    def _send(self, policy: PreTrainedModel) -> None:
        weights = list(named_weights(policy))
        listed = [(name, vllm_worker.dtype_name(x.dtype), list(x.shape)) for name, x in weights]
        with ThreadPoolExecutor(1) as pool:
            taking = pool.submit(self._call, "rlhf_take", *listed)
            for _, tensor in weights:
                self._line.broadcast(tensor, src=0)
            taking.result()

    def _call(self, method: str, *given: Any) -> list[Any]:
        """What each worker of the server returns; it lets nothing but strings through."""
        body = {"method": method, "args": [json.dumps(given)] if given else []}
        return self._server.post(
            "/collective_rpc", body, lambda said: list(said["results"]), '{"results": […]}'
        )


def named_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as a checkpoint of the policy has them, adapters added to their weights."""
    for name, parameter in merged(policy).named_parameters():
        yield name, parameter.data


def seeds(uniform: Tensor) -> list[int]:
    """A seed per row of `uniform` [N,T]: the 48 bits of its first two random numbers."""
    bits = (uniform[:, :2].double() * 2**24).long().tolist()
    return [sum(part << 24 * place for place, part in enumerate(row)) for row in bits]


def wish(temperature: float, longest: int, end: int, seed: int) -> dict[str, Any]:
    """What vLLM is asked for, by the names that its engine and its server share."""
    return {
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": longest,
        "seed": seed,
        "ignore_eos": True,
        "stop_token_ids": [end],
        "logprobs": 0,  # of the token that was drawn, and of no other
    }


def laid_out(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    uniform: Tensor,
    width: int,
    pad: int,
    temperature: float,
    device: torch.device,
) -> Draw:
    """Rows of prompts and what was answered to each; at temperature 0 without log-probabilities.

    uniform: [N,T], for its shape.
    """
    left, real = left_pad(prompts, width, pad)
    right = torch.full(uniform.shape, pad)
    mask = torch.zeros(uniform.shape)
    logp = torch.full(uniform.shape, torch.inf)
    for row, (ids, logps) in enumerate(answers):
        right[row, : len(ids)] = torch.tensor(list(ids))
        mask[row, : len(ids)] = 1.0
        logp[row, : len(ids)] = torch.tensor(list(logps))
    tokens, attention = torch.cat([left, right], 1), torch.cat([real, mask.bool()], 1)
    # The likeliest token is drawn with certainty, whatever the model says.
    said = logp.to(device) if temperature > 0 else None
    return Draw(tokens.to(device), attention.to(device), mask.to(device), said)


def _logps(ids: Sequence[int], steps: Sequence[dict[int, Any]]) -> list[float]:
    return [float(step[token].logprob) for token, step in zip(ids, steps, strict=True)]


def _own_address(url: str) -> str:
    """This machine's address on the way to the server; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((urlsplit(url).hostname, 9))
        return str(probe.getsockname()[0])


def _told(shape: dict[str, Any]) -> str:
    return (
        f"a {shape['architecture']} of {shape['layers']} layers, width {shape['width']} and"
        f" {shape['vocabulary']} tokens"
    )
