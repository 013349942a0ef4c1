"""Who draws: the trained model, vLLM beside it, or a vLLM server; to their caller they are alike.

vLLM is played by `vllm_stub`, whose API is held against an installed vLLM where there is one.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_cli import recipes
from rlhf_cli.config import compose, recipe
from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.engine import vllm, vllm_worker
from rlhf_cli.engine.agreement import check_drawing
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.sampler import Draw, Expert, draw, uniforms
from rlhf_cli.engine.world import World
from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Actor, log_probs, next_logits
from rlhf_cli.models.load import new_policy
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.models.tuning import merged, tuned
from rlhf_cli.recipes import Lora, Model, Scratch, Tuning
from tests import vllm_stub
from tests.servers import Handler, absent, listening

PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 5, 7)]
WIDTH, LONGEST, ROOM = 10, 12, 22
CPU = World(0, 1, torch.device("cpu"))
CHOSEN = recipes.Vllm("vllm", None, 0.3, 1e-3)
SAMPLERS = ["native", "colocated", "served"]

Drawing = Callable[..., Draw]
"""Prompts, responses to each, uniforms and temperature to what a policy says."""


def policy_of(tokenizer: Any, seed: int) -> Any:
    """A model with opinions: an untrained one would find every token alike."""
    shape = Scratch(layers=2, width=32, heads=2, vocab=300, context=64, seed=seed)
    model = new_policy(
        Model("tiny", "nano", shape, None, None, "fp32", Tuning(None, None)), tokenizer
    )
    model.get_output_embeddings().weight.data *= 30
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat and the dog lay by the door"], 300, 64)


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    return policy_of(tokenizer, 3)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of the same shape and other weights, as the one a run starts from."""
    path = tmp_path_factory.mktemp("sft")
    policy_of(tokenizer, 4).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "installed" not in request.node.name:
        vllm_stub.install(monkeypatch)


@pytest.fixture
def colocated(folder: Path) -> vllm.Colocated:
    return vllm.Colocated(CHOSEN, CPU, folder, ROOM)


@contextmanager
def serving(folder: Path, tokenizer: Any, **changes: Any) -> Iterator[tuple[str, vllm_stub.Api]]:
    """A server of the policy in a folder: its address and what answers there."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    worker = vllm_stub.worker(str(folder), vllm_worker.Weights)
    api = vllm_stub.Api(worker, **{"encode": encode, "longest": ROOM, **changes})

    class Posted(Handler):
        def do_POST(self) -> None:
            self.send(*api.post(self.path, json.loads(self.body())), {})

    with listening(Posted) as address:
        yield address, api


@pytest.fixture
def server(folder: Path, tokenizer: Any) -> Iterator[tuple[vllm.Served, Any]]:
    """A sampler that asks a server, and the model there."""
    with serving(folder, tokenizer) as (url, api):
        yield vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM), api.worker.model_runner.model


@pytest.fixture(params=SAMPLERS)
def drawing(
    request: pytest.FixtureRequest, policy: Any, tokenizer: Any
) -> Iterator[tuple[str, Drawing]]:
    """A sampler's name, and how it draws from the policy."""
    pad = tokenizer.pad_token_id

    def drawn(by: Callable[..., Draw]) -> Drawing:
        def says(
            prompts: Any, responses: int, uniform: Tensor, temperature: float = 1.0, end: int = -1
        ) -> Draw:
            return by(prompts, responses, uniform, WIDTH, end, pad, temperature)

        return says

    if request.param == "native":
        yield request.param, drawn(partial(draw, [Expert(policy)]))
        return
    sampler = sampler_of(request, request.param)
    with sampler.holding(policy):
        yield request.param, drawn(sampler.draw)


def sampler_of(request: pytest.FixtureRequest, kind: str) -> Any:
    if kind == "colocated":
        return request.getfixturevalue("colocated")
    return request.getfixturevalue("server")[0]


def random(rows: int, columns: int = LONGEST, step: int = 0) -> Tensor:
    return uniforms(1, "train", step, range(rows), columns)


# --- the contract


def test_prompts_stand_in_their_order_with_the_responses_to_each_side_by_side(
    drawing: tuple[str, Drawing],
) -> None:
    drawn = drawing[1](PROMPTS, 2, random(8))
    assert drawn.tokens.shape == drawn.attention.shape == (8, WIDTH + LONGEST)
    assert drawn.mask.shape == (8, LONGEST)
    for row, prompt in enumerate(ids for ids in PROMPTS for _ in range(2)):
        real = drawn.attention[row, :WIDTH]
        assert drawn.tokens[row, :WIDTH][real].tolist() == prompt
        assert real.tolist() == [False] * (WIDTH - len(prompt)) + [True] * len(prompt)


def test_a_response_runs_to_its_end_token_which_it_keeps_or_to_its_last_column(
    drawing: tuple[str, Drawing], tokenizer: Any
) -> None:
    """The end token is one that about half of the responses would hold if none ended them."""
    endless = drawing[1](PROMPTS, 8, random(32)).tokens[:, WIDTH:]
    holding = {int(ids): int((endless == ids).any(1).sum()) for ids in endless.unique()}
    end = min(holding, key=lambda ids: abs(holding[ids] - 16))
    drawn = drawing[1](PROMPTS, 8, random(32), end=end)
    response = drawn.tokens[:, WIDTH:]
    assert torch.equal(drawn.attention[:, WIDTH:], drawn.mask.bool())
    finished = 0
    for ids, whole, mask in zip(response, endless, drawn.mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any() and length > 0
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert end not in ids[: length - 1]
        finished += length < LONGEST
        assert length == LONGEST or int(ids[length - 1]) == end
        assert torch.equal(ids[:length], whole[:length])
    assert 8 < finished < 24


def test_the_same_random_numbers_give_the_same_responses_and_others_give_others(
    drawing: tuple[str, Drawing],
) -> None:
    one, again, other = (drawing[1](PROMPTS, 2, random(8, step=step)) for step in (0, 0, 1))
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens[0], one.tokens[1])  # two responses to one prompt


def test_a_response_does_not_depend_on_what_else_is_asked_for(
    drawing: tuple[str, Drawing],
) -> None:
    whole = drawing[1](PROMPTS, 2, random(8))
    alone = drawing[1](PROMPTS[1:2], 2, random(8)[2:4])
    assert torch.equal(alone.tokens, whole.tokens[2:4])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_temperature_divides_the_logits(
    drawing: tuple[str, Drawing], policy: Any, temperature: float
) -> None:
    """The mean log-probability of what is drawn is minus the entropy, within 4 standard errors."""
    count = 400
    drawn = drawing[1](PROMPTS[:1], count, random(count, 1), temperature)
    ids = torch.tensor([[*PROMPTS[0], 0]])
    logits = next_logits(policy, ids, torch.ones_like(ids), 1)[0, 0].detach()
    logp = (logits / temperature).log_softmax(-1)
    chance = logp.exp()
    mean, spread = (chance * logp).sum(), (chance * logp**2).sum() - (chance * logp).sum() ** 2
    error = float((spread / count).sqrt())
    assert abs(float(logp[drawn.tokens[:, -1]].mean() - mean)) < 4 * error
    plain = logits.softmax(-1)
    assert abs(float((plain * logp).sum() - mean)) > 8 * error  # as it would be at temperature 1


def test_temperature_0_takes_the_likeliest_tokens(
    drawing: tuple[str, Drawing], policy: Any
) -> None:
    drawn = drawing[1](PROMPTS, 1, random(4), 0.0)
    with torch.no_grad():
        best = next_logits(policy, drawn.tokens, drawn.attention, LONGEST).argmax(-1)
    mask = drawn.mask.bool()
    assert torch.equal(best[mask], drawn.tokens[:, WIDTH:][mask])
    assert drawn.logp is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampler_says_how_likely_its_tokens_were(
    drawing: tuple[str, Drawing], policy: Any, temperature: float
) -> None:
    drawn = drawing[1](PROMPTS, 2, random(8), temperature)
    with torch.no_grad():
        ours = log_probs(policy, drawn.tokens, drawn.attention, LONGEST, temperature=temperature)
    mask = drawn.mask.bool()
    assert drawn.logp is not None
    torch.testing.assert_close(drawn.logp[mask], ours[mask], rtol=0, atol=1e-4)
    assert (drawn.logp[~mask] == torch.inf).all()


# --- weights


def test_every_seed_is_its_rows_own_and_no_matter_of_who_draws_it() -> None:
    whole = vllm.seeds(random(64))
    assert len(set(whole)) == 64 and max(whole) < 2**48
    assert vllm.seeds(random(64)[16:20]) == whole[16:20]
    assert vllm.seeds(torch.tensor([[0.5, 0.25]])) == [2**23 + 2**22 * 2**24]


def same_weights(model: Any, policy: Any) -> bool:
    theirs, ours = dict(model.named_parameters()), dict(merged(policy).named_parameters())
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", SAMPLERS[1:])
def test_what_draws_has_exactly_the_trainers_weights(
    request: pytest.FixtureRequest, tokenizer: Any, kind: str, lora: bool
) -> None:
    policy = policy_of(tokenizer, 5)
    if lora:
        tuned(policy, Tuning(Lora(4, 8, ("query_key_value",)), None), "model", 0)
    sampler = sampler_of(request, kind)
    for _ in range(2):  # the first load, and one after an update
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01
        with sampler.holding(policy):
            if kind == "colocated":
                model = vllm_stub.LLM.begun[0].model
            else:
                model = request.getfixturevalue("server")[1]
            assert same_weights(model, policy)
            assert not same_weights(model, policy_of(tokenizer, 5))


@pytest.mark.parametrize("kind", SAMPLERS[1:])
def test_nothing_is_kept_of_prompts_under_older_weights(
    request: pytest.FixtureRequest, policy: Any, tokenizer: Any, kind: str
) -> None:
    sampler = sampler_of(request, kind)
    ask = (PROMPTS, 1, random(4, 1), WIDTH, tokenizer.eos_token_id, tokenizer.pad_token_id, 0.0)
    newer = policy_of(tokenizer, 6)
    first = []
    for model in (policy, newer):
        with sampler.holding(model):
            first.append(sampler.draw(*ask).tokens[:, -1])
        assert torch.equal(first[-1], draw([Expert(model)], *ask).tokens[:, -1])
    assert not torch.equal(*first)


def test_an_engine_beside_the_trainer_sleeps_while_it_learns(
    colocated: vllm.Colocated, policy: Any, tokenizer: Any
) -> None:
    ask = (PROMPTS, 1, random(4), WIDTH, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for _ in range(2):
        with colocated.holding(policy):
            colocated.draw(*ask)
    (engine,) = vllm_stub.LLM.begun
    once = ["apply_model", "reset_prefix_cache", "generate", "sleep"]
    assert engine.done == [*once, "wake_up", *once]


# --- in a rollout


@pytest.fixture
def collector(tokenizer: Any, colocated: vllm.Colocated) -> Collector:
    judges = Judges(policy_of(tokenizer, 4), None)
    return Collector(CPU, tokenizer, judges, 8, LONGEST, 1, sampler=colocated)


ASKED = [Asked(ids) for ids in PROMPTS]


def test_a_rollout_is_learned_from_by_the_trainers_log_probabilities_and_tells_the_gap(
    collector: Collector, policy: Any
) -> None:
    rollout, told = collector.collect(Actor(policy), ASKED, Sampling(policy=2), "train", 0)
    assert 0 <= told["sampler/gap"] < 1e-4
    tokens, attention = rollout.tokens.flatten(0, 1), rollout.attention.flatten(0, 1)
    ours = log_probs(policy, tokens, attention, LONGEST).detach()
    mask = rollout.mask.flatten(0, 1)
    torch.testing.assert_close(rollout.logp_old.flatten(0, 1), ours * mask)
    alone = replace(collector, sampler=None)
    _, untold = alone.collect(Actor(policy), ASKED, Sampling(policy=2), "train", 0)
    assert set(told) - set(untold) == {"sampler/gap"}


def test_the_reference_answers_as_it_does_beside_any_sampler(
    collector: Collector, policy: Any
) -> None:
    asked = Sampling(policy=1, ref=1, mixture=1, mixture_ref=0.5)
    theirs, ours = (
        each.collect(Actor(policy), ASKED, asked, "train", 0)[0].tokens
        for each in (collector, replace(collector, sampler=None))
    )
    assert torch.equal(theirs[:, 1:], ours[:, 1:])
    assert not torch.equal(theirs[:, 0], ours[:, 0])  # vLLM has random numbers of its own


def test_a_sampler_without_the_trainers_weights_ends_the_run(
    collector: Collector, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_stub.LLM, "apply_model", lambda *_: None)
    with pytest.raises(UserError) as refused:
        collector.collect(Actor(policy), ASKED, Sampling(policy=2), "train", 0)
    says = (
        r"sampler\.max_gap=0\.001, but the sampler's log-probabilities are (\S+) nats per token away from"
        r" the trainer's: it has other weights, or computes otherwise; draw with sampler=native, or set a"
        r" larger sampler\.max_gap if rounding explains so much\."
    )
    found = re.fullmatch(says, str(refused.value))
    assert found and float(found[1]) > 0.1


def test_log_probabilities_that_are_no_numbers_end_the_run(
    collector: Collector, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        vllm_stub.Logprob, "__init__", lambda self, _: setattr(self, "logprob", torch.nan)
    )
    with pytest.raises(UserError, match="are nan nats per token away"):
        collector.collect(Actor(policy), ASKED, Sampling(policy=2), "train", 0)


def test_the_check_before_the_first_step_takes_a_sampler_with_random_numbers_of_its_own(
    collector: Collector, policy: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_drawing(collector, Actor(policy), ASKED)
    monkeypatch.setattr(vllm_stub.LLM, "apply_model", lambda *_: None)
    with pytest.raises(UserError, match=r"sampler\.max_gap"):
        check_drawing(collector, Actor(policy_of(tokenizer, 7)), ASKED)


# --- what is refused


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as refused:
        act()
    return str(refused.value)


def test_without_vllm_or_a_gpu_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: Any
) -> None:
    def choose() -> Any:
        return vllm.sampler(CHOSEN, CPU, folder, tokenizer, ROOM)

    assert refusal(choose) == (
        "sampler=vllm needs a CUDA GPU in every process, and here is none; use sampler=native."
    )
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert refusal(choose) == (
        'sampler=vllm needs vLLM, which is not installed; pip install "rlhf-cli[vllm]", or use'
        " sampler=native."
    )


def test_an_architecture_that_vllm_does_not_know_is_refused(
    colocated: vllm.Colocated, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_stub, "KNOWN", {"LlamaForCausalLM"})
    assert refusal(lambda: colocated.holding(policy).__enter__()) == (
        "sampler=vllm cannot draw from a GPTNeoXForCausalLM, which this vLLM does not know; use"
        " sampler=native, or a newer vLLM."
    )


def test_an_engine_that_does_not_start_says_why(folder: Path, policy: Any) -> None:
    greedy = vllm.Colocated(replace(CHOSEN, memory=0.99), CPU, folder, ROOM)
    assert refusal(lambda: greedy.holding(policy).__enter__()) == (
        "vLLM does not start with sampler.memory=0.99 (Free memory on device (1.0/80.0 GiB) is less than"
        " desired.); set another sampler.memory, a smaller launch.micro_batch, or sampler=native."
    )


def test_several_turns_are_refused_before_anything_is_loaded() -> None:
    assert refusal(lambda: recipe(compose(["data=guess", "sampler=vllm"]))) == (
        "sampler=vllm draws one response to a prompt, but data=guess-embedded is played in several turns; use"
        " sampler=native."
    )


def test_a_server_that_is_down_is_one_sentence(tokenizer: Any) -> None:
    with absent() as url:
        said = refusal(lambda: vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM))
    assert re.fullmatch(
        rf"sampler\.url={url} did not answer in 1 attempts of 600 s \(ConnectError: .+\); see to the server"
        r" and give the same command again, which goes on from what is done\.",
        said,
    )


def test_a_server_of_another_tokenizer_or_of_short_texts_is_refused(
    folder: Path, tokenizer: Any
) -> None:
    with serving(folder, tokenizer, encode=lambda text: [1, 2]) as (url, _):
        assert refusal(lambda: vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM)) == (
            f"sampler.url={url} serves another model, whose tokens are not the policy's; {vllm.START}."
        )
    with serving(folder, tokenizer, longest=21) as (url, _):
        assert refusal(lambda: vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM)) == (
            f"sampler.url={url} takes texts of 21 tokens, fewer than data.max_prompt_tokens +"
            " data.max_response_tokens = 22; start it with --max-model-len 22."
        )


def test_a_server_of_another_shape_or_that_takes_no_weights_is_refused(
    folder: Path, tokenizer: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, tokenizer) as (url, api):
        sampler = vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM)
        count = len(tokenizer)
        api.worker.model_config.hf_config.num_hidden_layers = 3
        assert refusal(lambda: sampler.holding(policy).__enter__()) == (
            f"sampler.url={url} serves a GPTNeoXForCausalLM of 3 layers, width 32 and {count} tokens, but"
            f" the policy is a GPTNeoXForCausalLM of 2 layers, width 32 and {count} tokens; {vllm.START}."
        )
        monkeypatch.setattr(api, "collective_rpc", lambda _: (404, {"detail": "Not Found"}))
        assert refusal(lambda: sampler.holding(policy).__enter__()) == (
            f"sampler.url={url} is a vLLM server that takes no weights; {vllm.START}."
        )


def test_a_server_too_old_to_say_its_tokens_is_refused(
    folder: Path, tokenizer: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"choices": [{"text": " a", "logprobs": {"token_logprobs": [-1.0]}}]}
    ask = (PROMPTS, 1, random(4), WIDTH, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with serving(folder, tokenizer) as (url, api):
        sampler = vllm.Served(CHOSEN, url, CPU, tokenizer, ROOM)
        monkeypatch.setattr(api, "completions", lambda _: (200, old))
        assert refusal(lambda: sampler.draw(*ask)) == (
            f"sampler.url={url} must answer with token_ids and logprobs, as vLLM does from 0.11 on, but"
            """ answered '{"choices": [{"text": " a", "logprobs": {"token_logprobs": [-1.0]}}]}'."""
        )


# --- vLLM itself


def names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "kwargs"}


def test_the_stub_has_no_name_that_an_installed_vllm_has_not() -> None:
    real = pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.engine.arg_utils import EngineArgs
    from vllm.outputs import CompletionOutput, RequestOutput

    engine = names(real.LLM.__init__) | {each.name for each in fields(EngineArgs)}
    assert names(vllm_stub.LLM.__init__) <= engine
    for method in ("generate", "apply_model", "reset_prefix_cache", "sleep", "wake_up"):
        assert names(getattr(vllm_stub.LLM, method)) <= names(getattr(real.LLM, method))
    pairs = [
        (vllm_stub.SamplingParams, real.SamplingParams),
        (vllm_stub.CompletionOutput, CompletionOutput),
        (vllm_stub.RequestOutput, RequestOutput),
        (vllm_stub.StatelessProcessGroup.create, StatelessProcessGroup.create),
        (vllm_stub.PyNcclCommunicator, PyNcclCommunicator),
        (vllm_stub.PyNcclCommunicator.broadcast, PyNcclCommunicator.broadcast),
    ]
    for ours, theirs in pairs:
        assert names(ours) <= names(theirs)
    assert callable(real.ModelRegistry.get_supported_archs)


def test_an_installed_vllm_knows_every_word_of_a_request() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    try:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    except ImportError:
        from vllm.entrypoints.openai.protocol import CompletionRequest
    asked = {*vllm.wish(1.0, 8, 0, 1), "prompt", "return_token_ids", "cache_salt"}
    assert asked <= set(CompletionRequest.model_fields)
