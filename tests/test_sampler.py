"""What is drawn is what each response's own text, read at once and alone, says: no reader changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.engine import reader as reading
from rlhf_cli.engine.reader import INTERFACED, Reader, SharedReader, reader, split
from rlhf_cli.engine.sampler import Draw, Expert, draw, uniforms
from rlhf_cli.models.tuning import WithoutAdapters, tuned
from rlhf_cli.recipes import Lora, Tuning

PAD, NEVER, VOCAB = 0, -1, 50
LENGTHS = (3, 12, 1, 4, 11, 2)
GROUP, LONGEST, WIDTH = 3, 10, 13
OLDER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": OLDER,
    "gptj": OLDER | {"rotary_dim": 4},
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
}  # fmt: skip
COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": None,
}  # fmt: skip


def model(kind: str, seed: int = 0, attention: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """With opinions: an untrained model would find every token alike, wherever it stands."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": PAD}
    sizes = SIZES.get(kind, COMMON) | changes
    config = AutoConfig.for_model(kind, vocab_size=VOCAB, **ids, **sizes)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return made


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=numbers).tolist() for n in lengths]


def drawn(experts: Sequence[Expert], end: int = NEVER, heat: float = 1.0, **more: Any) -> Draw:
    uniform = uniforms(0, "test", 0, range(len(LENGTHS) * GROUP), LONGEST)
    return draw(experts, prompts(), GROUP, uniform, WIDTH, end, PAD, heat, **more)


@torch.no_grad()
def slowly(
    experts: Sequence[Expert], end: int = NEVER, heat: float = 1.0
) -> tuple[list[list[int]], list[list[float]]]:
    """Responses and their log-probabilities, each text read alone and from its start for every token."""
    uniform = uniforms(0, "test", 0, range(len(LENGTHS) * GROUP), LONGEST)
    texts, logps = [], []
    for row, numbers in enumerate(uniform):
        ids, said = list(prompts()[row // GROUP]), list[float]()
        start = len(ids)
        for number in numbers:
            logp = torch.zeros(VOCAB)
            for each in experts:
                text = torch.tensor([ids])
                logits = each.model(input_ids=text, use_cache=False).logits[0, -1]
                logp += each.weight * logits.log_softmax(-1)
            logp = (logp / (heat or 1.0)).log_softmax(-1)
            over = logp.exp().cumsum(-1) > number
            chosen = int(over.long().argmax() if heat else logp.argmax())
            ids.append(chosen)
            said.append(float(logp[chosen]))
            if chosen == end:
                break
        texts.append(ids[start:])
        logps.append(said)
    return texts, logps


def compare(found: Draw, texts: list[list[int]], logps: list[list[float]] | None) -> None:
    assert len(found.tokens) == len(texts)
    for row, text in enumerate(texts):
        count, rest = len(text), LONGEST - len(text)
        prompt = prompts()[row // GROUP]
        left = [PAD] * (WIDTH - len(prompt))
        assert found.tokens[row].tolist() == [*left, *prompt, *text, *[PAD] * rest]
        shown = [*[False] * len(left), *[True] * (len(prompt) + count), *[False] * rest]
        assert found.attention[row].tolist() == shown
        assert found.mask[row].tolist() == [*[1.0] * count, *[0.0] * rest]
        if logps is not None:
            assert found.logp is not None
            expected = torch.tensor(logps[row])
            torch.testing.assert_close(found.logp[row, :count], expected, rtol=0, atol=2e-5)
            assert (found.logp[row, count:] == torch.inf).all()


def common(experts: Sequence[Expert], heat: float = 1.0) -> int:
    """A token that ends some responses early and leaves others alone."""
    endless, _ = slowly(experts, heat=heat)
    counts = {token: sum(token in text for text in endless) for token in range(VOCAB)}
    return min(counts, key=lambda token: abs(counts[token] - 0.75 * len(endless)))


def kind_of_reader(policy: Any) -> type[Reader]:
    ids = torch.ones(2, 3, dtype=torch.long)
    return type(reader(policy, ids, ids.bool(), 0, 2, 4))


@pytest.fixture(params=["shared", "any"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Reader]:
    """Both readers, whatever the model would be read by."""
    if request.param == "any":
        monkeypatch.setattr(reading, "INTERFACED", frozenset())
        return Reader
    return SharedReader


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in sorted(INTERFACED) for attention in ("eager", "sdpa")],
)
def test_responses_are_those_of_texts_read_alone(
    kind: str, attention: str, either: type[Reader]
) -> None:
    policy = model(kind, attention=attention)
    assert kind_of_reader(policy) is either
    experts = [Expert(policy)]
    compare(drawn(experts), *slowly(experts))
    assert policy.config._attn_implementation == attention


def test_a_model_of_another_kind_is_read_by_its_own_kernel() -> None:
    policy = model("gptj", attention="eager")
    assert kind_of_reader(policy) is Reader
    compare(drawn([Expert(policy)]), *slowly([Expert(policy)]))


def test_a_model_that_sees_a_window_of_the_text_is_read_by_its_own_kernel() -> None:
    policy = model("mistral", sliding_window=5)
    assert kind_of_reader(policy) is Reader
    compare(drawn([Expert(policy)]), *slowly([Expert(policy)]))
    whole = drawn([Expert(model("mistral"))])
    assert not torch.equal(drawn([Expert(policy)]).tokens, whole.tokens)


@pytest.mark.parametrize("heat", [0.0, 0.6, 1.7])
def test_rows_that_end_early_leave_and_the_others_draw_on(
    either: type[Reader], heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = [Expert(model("llama"))]
    end = common(experts, heat)
    left: list[int] = []
    whole = either.select

    def select(self: Reader, rows: Tensor) -> None:
        left.append(len(rows))
        whole(self, rows)

    monkeypatch.setattr(either, "select", select)
    texts, logps = slowly(experts, end, heat)
    found = drawn(experts, end, heat)
    compare(found, texts, logps if heat else None)
    assert (found.logp is None) == (heat == 0)
    lengths = {len(text) for text in texts}
    assert len(lengths) > 1 and LONGEST in lengths
    assert left or heat > 1  # hot responses are too varied for a quarter of them to end in time


def test_a_product_of_two_models_is_drawn_from(either: type[Reader]) -> None:
    experts = [Expert(model("qwen2"), 0.7), Expert(model("gpt_neox", seed=1), 0.3)]
    end = common(experts)
    found = drawn(experts, end)
    compare(found, slowly(experts, end)[0], None)
    assert found.logp is None


def test_a_model_is_drawn_from_with_and_without_its_adapters(either: type[Reader]) -> None:
    policy = tuned(model("llama"), Tuning(Lora(4, 8, ("q_proj", "v_proj")), None), "model", 0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    both = [Expert(policy), Expert(WithoutAdapters(policy))]
    for experts in ([both[0]], [both[1]]):
        compare(drawn(experts), *slowly(experts))
    product = [Expert(policy, 0.5), Expert(both[1].model, 0.5)]
    compare(drawn(product), slowly(product)[0], None)


def test_who_draws_in_step_with_others_goes_on_until_all_have_ended(either: type[Reader]) -> None:
    """One pass reads all prompts there: others must not wait for one that is not made."""
    policy = model("llama")
    experts = [Expert(policy)]
    end = int(drawn(experts).tokens[0, WIDTH])
    asked: list[bool] = []
    calls: list[Any] = []
    policy.register_forward_hook(lambda *said: calls.append(said))

    def all_ended(here: bool) -> bool:
        asked.append(here)
        return False

    found = drawn(experts, end, all_ended=all_ended)
    assert len(asked) == LONGEST - 1 and len(calls) == LONGEST
    compare(found, *slowly(experts, end))


def test_an_error_leaves_the_model_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model("llama")

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SharedReader, "_spread", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        drawn([Expert(policy)])
    assert policy.config._attn_implementation == "sdpa"


def test_prompts_are_split_where_that_saves_a_quarter_of_the_columns() -> None:
    assert split([12, 11, 4, 3, 2, 1]) == 2  # 2 of 12 and 4 of 4 columns, where one block has 72
    assert split([10, 9, 8]) == 0  # 26 of 30 columns at best
    assert split([10, 1]) == 1
    assert split([10]) == split([7, 7]) == 0
