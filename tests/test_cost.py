"""A plan's cost against hand calculations, against what torch counts, and against common sense."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from rlhf_cli import cost, shapes
from rlhf_cli.config import compose, recipe
from rlhf_cli.cost import BUSY, LAUNCH, STREAM, Cost, of_stage
from rlhf_cli.devices import GPUS
from rlhf_cli.models.load import scratch_config
from rlhf_cli.plan import describe, plan
from rlhf_cli.shapes import PUBLISHED, Shape, Unknown, neox, read, shape

SMALL = ["model=pythia_70m", "data.max_prompt_tokens=6", "data.max_response_tokens=4"]
BUDGET = ["algo.update={episodes: 256, batch: 128, epochs: 3, minibatches: 4}"]
MEASURED = ["eval.prompts=10", "eval.points=40"]

A100 = GPUS["a100-80"]
"""What times are stated for unless launch.gpu says otherwise."""

# Pythia 70M: 6 layers of width 512, vocabulary 50,304.
LAYER = 12 * 512**2 + 13 * 512
HEAD = 50304 * 512
WHOLE = 6 * LAYER + 2 * HEAD + 2 * 512
SCORER = 6 * LAYER + HEAD + 2 * 512 + 512
POLICY_PASS = 2 * (6 * LAYER * 10 + HEAD * 4) + 4 * 6 * 512 * 10**2
SCORER_PASS = 2 * 6 * LAYER * 10 + 4 * 6 * 512 * 10**2
"""FLOP of a pass over a prompt of 6 tokens and a response of 4, logits at the latter."""


def costs(stage: str, *words: str, scored: bool = True) -> Cost:
    found = of_stage(stage, recipe(compose([*SMALL, *words])), scored)
    assert found is not None
    return found


def flop(of: Cost, activity: str) -> float:
    return sum(work.flop for work in of.works if work.activity == activity)


# --- shapes


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 96},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 96, "rotary_dim": 8},
    **{
        family: {
            "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "tie_word_embeddings": family == "llama",
        }
        for family in ("llama", "mistral", "qwen2", "qwen3")
    },
}  # fmt: skip
OFF = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout"), 0.0)


def config(family: str, **more: Any) -> PreTrainedConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(family, vocab_size=300, **ids, **FAMILIES[family], **OFF, **more)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_family_that_can_be_read_is_held_against_torch() -> None:
    assert FAMILIES.keys() == shapes.FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_json_says_how_many_parameters_torch_counts(family: str, tmp_path: Path) -> None:
    made = config(family, num_labels=1)
    made.save_pretrained(tmp_path)
    found = read(tmp_path / "config.json", "it")
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(made)
        scorer = AutoModelForSequenceClassification.from_config(made)
    assert (found.parameters, found.scorer) == (count(policy), count(scorer))
    matrices = [m for n, m in policy.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    inner = [m for m in matrices if 300 not in m.weight.shape]
    assert found.layers * found.edges == sum(sum(m.weight.shape) for m in inner)


def kept(family: str, layers: int, number: torch.dtype, kernel: str, length: int) -> int:
    """Bytes that a forward pass over two rows keeps for the backward pass, weights aside."""
    made = config(family)
    made.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(made, attn_implementation=kernel).to(number)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.ones(2, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, attention_mask=tokens, use_cache=False, logits_to_keep=1)
    return sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in weights)


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_about_what_is_said(family: str, number: torch.dtype, tmp_path: Path) -> None:
    config(family).save_pretrained(tmp_path)
    found, length = read(tmp_path / "config.json", "it"), 32
    kernel = "eager" if found.eager else "sdpa"
    per_layer = kept(family, 2, number, kernel, length) - kept(family, 1, number, kernel, length)
    numbers = per_layer / number.itemsize / (2 * length)
    said = found.kept + found.scores("auto", number.itemsize) * length
    # Said for bf16; fp32 needs fewer copies, most of all where norms are computed in fp32 anyway.
    assert 0.75 < numbers / said < 1.1


def at_once(family: str, length: int) -> int:
    """Most bytes that there are at one time in a pass of the trunk over eight rows without gradients."""
    made = config(family)
    kernel = "eager" if family == "gptj" else "sdpa"
    model = AutoModelForCausalLM.from_config(made, attn_implementation=kernel).base_model.eval()
    tokens = torch.ones(8, length, dtype=torch.long)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(input_ids=tokens, attention_mask=tokens, use_cache=False)
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_without_gradients_has_about_as_much_at_once_as_is_said(
    family: str, tmp_path: Path
) -> None:
    config(family).save_pretrained(tmp_path)
    found, length = read(tmp_path / "config.json", "it"), 32
    said = 8 * length * 4 * (found.flow + found.scores("auto", 4) * length)
    assert 0.85 < at_once(family, length) / said < 1.1


def test_matrices_of_scores_are_kept_by_eager_kernels_alone() -> None:
    plain, eager = neox(6, 512, 8, 100), shapes.gptj(6, 512, 8, 100)
    assert [plain.scores(k, 2) for k in ("auto", "sdpa", "eager")] == [0, 0, 3 * 8]
    assert [eager.scores(k, 2) for k in ("auto", "flash_attention_2")] == [3 * 8, 0]
    assert plain.scores("eager", 4) == 8


def test_nano_has_the_parameters_that_torch_counts() -> None:
    made = recipe(compose([])).model

    class Tokens:
        pad_token_id = eos_token_id = 0

        def __len__(self) -> int:
            assert made.scratch is not None
            return made.scratch.vocab

    assert made.scratch is not None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(scratch_config(made.scratch, Tokens()))
    # 2 x 2048 x 128 embeddings, 4 x (12 x 128^2 + 13 x 128) layers, 2 x 128 of the last norm
    assert shape(made, "model").parameters == count(whole) == 524_288 + 793_088 + 256


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Biderman et al. 2023, table 1: all of them, and all but the embeddings
        ("pythia-70m", (70_426_624, 18_915_328)),
        ("pythia-160m", (162_322_944, 85_056_000)),
        ("pythia-410m", (405_334_016, 302_311_424)),
        ("pythia-1b", (1_011_781_632, 805_736_448)),
        ("pythia-1.4b", (1_414_647_808, 1_208_602_624)),
        ("pythia-2.8b", (2_775_208_960, 2_517_652_480)),
        ("pythia-6.9b", (6_857_302_016, 6_444_163_072)),
        ("pythia-12b", (11_846_072_320, 11_327_027_200)),
    ],
)
def test_pythias_have_the_published_numbers(name: str, parameters: tuple[int, int]) -> None:
    found = PUBLISHED[f"EleutherAI/{name}"]
    embeddings = found.vocab * found.width + found.head
    assert (found.parameters, found.parameters - embeddings) == parameters


WEIGHTS = {
    # What the weights on the hub add up to
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


def test_the_others_have_as_many_as_their_weights() -> None:
    assert {name: PUBLISHED[name].parameters for name in WEIGHTS} == WEIGHTS
    assert all(name in WEIGHTS or "pythia" in name for name in PUBLISHED)


def test_the_table_has_every_shipped_model_and_three_larger_ones(root: Path) -> None:
    files = set((root / "conf/model").glob("[!_]*.yaml"))
    shipped = {yaml.safe_load(file.read_text())["name"] for file in files}
    larger = {f"meta-llama/Llama-2-{size}b-hf" for size in (13, 70)} | {
        "codellama/CodeLlama-34b-hf"
    }
    assert (shipped - {None, "???"}) | larger == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"model_type": "bloom"}', "it is a bloom, none of gpt_neox, gpt2, gptj, llama"),
        ('{"model_type": "gpt2"}', "the config.json of it states no shape"),
        ('{"model_type": ["llama"]}', "the config.json of it states no shape"),
        ("{}", "the config.json of it states no shape"),
        ("[]", "the config.json of it states no shape"),
        ("{", "the config.json of it states no shape"),
    ],
)
def test_what_cannot_be_read_is_unknown(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(Unknown) as caught:
        read(file, "it")
    assert str(caught.value).startswith(says)


# --- one pass


def test_a_pass_is_worth_what_it_is_by_hand() -> None:
    # A layer of width 4: 12 x 16 + 13 x 4 = 244 parameters; an output layer of 10 x 4 = 40.
    net = cost.Net("policy", neox(2, 4, 2, 10), "bf16", learned=2 * 244 + 2 * 40 + 8)
    assert net.parameters == 576
    # 3 rows of 5 tokens: 2 x (2 x 244 x 5 + 40 x 2) of matrices, 4 x 2 x 4 x 25 of attention
    assert net.forward(3, 5, 2) == 3 * (5040 + 800)
    assert net.backward(100) == 200


def test_a_model_with_one_score_has_no_output_layer() -> None:
    net = cost.Net("critic", neox(2, 4, 2, 10), "bf16", has_head=False)
    assert net.parameters == 576 - 40 + 4
    assert net.forward(3, 5, 2) == 3 * (4880 + 800)


# --- one stage


def test_the_sft_of_a_known_set_by_hand() -> None:
    # 43,835 rows of 10 tokens, logits at each; 40 evaluations on 10 of them
    one = 2 * (6 * LAYER + HEAD) * 10 + 4 * 6 * 512 * 10**2
    found = costs("sft", *MEASURED)
    assert flop(found, "learning") == pytest.approx(3 * one * 43_835)
    assert flop(found, "scoring") == pytest.approx(one * 40 * 10)
    assert (found.learned, found.drawn, found.rows) == (438_350, 0, None)
    assert found.gpu_hours == pytest.approx(found.flop / (312e12 * BUSY) / 3600)


def test_the_reward_model_of_a_known_set_by_hand() -> None:
    found = costs("reward", *MEASURED)
    assert flop(found, "learning") == pytest.approx(3 * SCORER_PASS * 2 * 43_835)
    assert flop(found, "scoring") == pytest.approx(SCORER_PASS * (2 * 40 * 10 + 256))
    assert found.drawn == 256 * 4


def test_p3o_by_hand() -> None:
    # 2 rollouts of 128 responses, learned from 3 times; 3 evaluations on 10 prompts
    found = costs("rl", "algo=p3o_v2", *BUDGET, *MEASURED)
    assert flop(found, "learning") == 3 * POLICY_PASS * 256 * 3
    assert flop(found, "scoring") == pytest.approx((2 * POLICY_PASS + SCORER_PASS) * (256 + 30))
    assert (found.learned, found.drawn) == (256 * 3 * 10, (256 + 30) * 4)
    # per response 4 steps at 8 tokens on average; per pair one pass over a prompt of 6 tokens
    step = 2 * (6 * LAYER + HEAD) + 4 * 6 * 512 * 8
    prompt = 2 * (6 * LAYER * 6 + HEAD) + 4 * 6 * 512 * 6**2
    assert flop(found, "drawing") == pytest.approx((256 + 30) * 4 * step + (128 + 30) * prompt)


def test_ppo_adds_a_critic_to_everything() -> None:
    p3o, ppo = (costs("rl", f"algo={a}", *BUDGET, *MEASURED) for a in ("p3o_v2", "ppo"))
    assert flop(ppo, "learning") - flop(p3o, "learning") == pytest.approx(3 * SCORER_PASS * 256 * 3)
    assert flop(ppo, "scoring") - flop(p3o, "scoring") == pytest.approx(SCORER_PASS * (256 + 30))


def test_dpo_draws_for_its_evaluations_alone_and_asks_no_reward_while_it_learns() -> None:
    found = costs("rl", "algo=dpo", *BUDGET, *MEASURED)
    assert found.drawn == 3 * 10 * 4
    expected = 2 * POLICY_PASS * (256 + 30) + SCORER_PASS * 30
    assert flop(found, "scoring") == pytest.approx(expected)


def test_etpo_asks_for_soft_values_and_for_the_reference_again() -> None:
    found = costs("rl", "algo=etpo", *BUDGET, *MEASURED)
    # policy and reference once; policy, reference and the slow copy for soft values; 3 losses
    passes = 2 * (256 + 30) + 3 * 256 + 3 * 256
    assert flop(found, "scoring") == pytest.approx(POLICY_PASS * passes + SCORER_PASS * (256 + 30))
    assert flop(found, "learning") == pytest.approx(2 * 3 * POLICY_PASS * 256 * 3)


def test_checkpointing_and_tuning_change_the_arithmetic_of_learning() -> None:
    whole, again, top, lora = (
        flop(costs("sft", *words), "learning")
        for words in (
            [],
            ["launch.checkpointing=true"],
            ["model.tuning.layers=2"],
            ["model.tuning.lora={rank: 1, alpha: 1, targets: [all-linear]}"],
        )
    )
    assert again / whole == pytest.approx(4 / 3)
    # Forward everywhere; back through two of six layers, and the weights that learn in them.
    assert top / whole == pytest.approx((1 + 2 / 6 + (2 * LAYER + HEAD) / WHOLE) / 3)
    assert lora / whole == pytest.approx(2 / 3, rel=1e-2)


# --- the time of drawing


def drawing(*words: str) -> float:
    """Seconds of one GPU per step of drawing 64 responses of 100 tokens to prompts already read."""
    made = recipe(compose(["data.max_response_tokens=100", *words]))
    desk = cost.Desk.longest(made)
    (work,) = desk.draw(cost.Draw([desk.net("policy", made.model)], 64, 0))
    return work.seconds / 100


def test_a_step_of_drawing_is_bound_by_launches_bytes_or_arithmetic() -> None:
    model, prompt = "model=pythia_12b", "data.max_prompt_tokens"
    matrices = 36 * (12 * 5120**2 + 13 * 5120) + 50688 * 5120
    assert drawing(model, f"{prompt}=50") == pytest.approx(36 * LAUNCH)
    # Keys and values of 64 rows of 2,000 tokens on average
    states = 64 * 2000 * 36 * 2 * 5120
    read = 2 * (matrices + states) / (A100.bandwidth * STREAM)
    assert drawing(model, f"{prompt}=1950") == pytest.approx(read)
    sums = 64 * (2 * matrices + 4 * 36 * 5120 * 100) / (A100.single * BUSY)
    assert drawing(model, f"{prompt}=50", "model.precision=fp32") == pytest.approx(sums)


def test_processes_share_rows_but_not_launches() -> None:
    words = ["model=pythia_70m", "data.max_prompt_tokens=50"]
    assert drawing(*words) == pytest.approx(6 * LAUNCH)
    assert drawing(*words, "launch=deepspeed") == pytest.approx(2 * 6 * LAUNCH)


# --- common sense


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("model=pythia_160m", "model=pythia_410m"),
        ("data.max_prompt_tokens=99", "data.max_prompt_tokens=900"),
        ("data.max_response_tokens=99", "data.max_response_tokens=900"),
        ("eval.prompts=10", "eval.prompts=2000"),
        ("algo=rloo", "algo=vanilla_pg"),
    ],
)
@pytest.mark.parametrize("of", ["flop", "gpu_hours"])
def test_more_of_anything_costs_more(less: str, more: str, of: str) -> None:
    small, large = (getattr(costs("rl", word), of) for word in (less, more))
    assert small < large


# --- talk between processes


def talked(*words: str) -> float:
    """Seconds of the clock that an SFT of 128 rows talks."""
    made = recipe(compose([*SMALL, *words, "sft.batch=128"]))
    desk = cost.Desk.longest(made)
    works = desk.talk([desk.net("policy", made.model, learns=True)], 1, 128, 3)
    return sum(work.seconds for work in works) / desk.processes


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["launch.zero=0"], 2),
        (["launch.zero=1"], 2),
        # 128 rows of two processes in micro-batches of 8: gradients of each, and the weights once
        (["launch.zero=2"], 8 + 1),
        (["launch.zero=2", "launch.micro_batch=64"], 1 + 1),
        # weights forward and backward and gradients of each, and three whole copies
        (["launch.zero=3"], 3 * 8 + 3),
    ],
)
def test_processes_tell_each_other_gradients_and_weights(words: list[str], numbers: int) -> None:
    # Half of it stays where it is; an A100 sends 300 GB a second, of which 70% are reached.
    expected = numbers * 2 * WHOLE / 2 / (300e9 * 0.7)
    assert talked("launch=deepspeed", *words) == pytest.approx(expected)


def test_one_process_talks_to_nobody() -> None:
    assert talked() == 0


def test_between_hosts_the_network_of_all_their_gpus_is_the_limit(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=2\ntwo slots=2\n")
    words = ["launch=deepspeed", "launch.zero=0", f"launch.hostfile={hosts}"]
    # Four processes, three quarters of it to be sent; two adapters of 25 GB a second on each host.
    expected = 2 * 2 * WHOLE * 3 / 4 / (2 * 25e9 * 0.7)
    assert talked(*words) == pytest.approx(expected)


# --- what is said


def drawn(*words: str) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(describe(plan(compose(words))))
    return capture.get()


def test_nobody_needs_a_gpu_for_nano() -> None:
    assert of_stage("rl", recipe(compose([])), True) is None
    text = drawn()
    assert "GPU" not in text and "GB" not in text and text.count("MB per process") == 3


def test_a_plan_says_what_its_stages_cost_in_80_columns() -> None:
    text = drawn("model=pythia_1b", "algo=ppo")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for what in "GB per process", "million tokens", "PFLOP", "GPU-hours  ":
        assert text.count(what) == 3
    made = recipe(compose(["model=pythia_1b", "algo=ppo"]))
    stages = [of_stage(stage, made, True) for stage in ("sft", "reward", "rl")]
    hours = sum(each.gpu_hours for each in stages if each)
    assert f"cost of what is not done: {hours:.3g} GPU-hours." in " ".join(text.split())
    assert text.count("A100-80GB") == 3 and "launch.zero" not in text


def test_hours_are_those_of_the_gpu_that_is_named() -> None:
    made = [
        recipe(compose(["model=pythia_1b", f"launch.gpu={gpu}"])) for gpu in ("h100", "rtx4090")
    ]
    works = [of_stage("sft", each, True).works[0] for each in made]  # type: ignore[union-attr]
    assert works[0].flop == works[1].flop
    assert works[0].seconds * 989 == pytest.approx(works[1].seconds * 165.2)


def test_a_guide_has_a_block_of_its_own() -> None:
    assert "dpo on hh\n" in drawn("model=pythia_70m", "algo=rto")


def test_a_model_that_is_not_here_is_unknown_and_a_local_one_is_read(shared_data: Path) -> None:
    words = ["model=custom", "model.name=nobody/nothing", "model.revision=0123456"]
    text = " ".join(drawn(*words).split())
    assert text.count("cost unknown no config.json of model.name=nobody/nothing is here yet") == 3
    assert "GPU-hours" not in text
    short = ["model=custom", "data.max_prompt_tokens=96"]  # it reads 512 tokens
    local = shape(
        recipe(compose([*short, f"model.name={shared_data}/models/stories260K-hf"])).model,
        "model",
    )
    # 512 x 64 tied embeddings; 5 layers of 2 x 64^2 + 64 x 64 + 3 x 64 x 172 + 2 x 64; the last norm
    assert local.parameters == 32_768 + 5 * 45_440 + 64
    assert isinstance(local, Shape)


def test_rows_that_nobody_has_counted_cost_so_much_for_every_ten_thousand(tmp_path: Path) -> None:
    rows = [f'{{"prompt": "p{i}", "chosen": "yes {i}", "rejected": "no"}}' for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = ["data=custom", f"data.path={tmp_path / 'rows.jsonl'}", "data.template=transcript"]
    made = recipe(compose(["model=pythia_160m", *data]))
    found = of_stage("sft", made, True)
    assert found is not None and found.rows == 10_000
    text = " ".join(drawn("model=pythia_160m", *data).split())
    assert text.count("for every 10,000 rows") == 4 and "cost of what is not done" not in text
