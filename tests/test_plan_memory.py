"""What a stage holds: against hand calculations, against DeepSpeed's own arithmetic, and as it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from rich.console import Console

from rlhf_cli import memory
from rlhf_cli.config import compose, recipe
from rlhf_cli.devices import GPUS
from rlhf_cli.errors import UserError
from rlhf_cli.memory import LADDER, Memory, Part, Preset, enough, fitting
from rlhf_cli.plan import describe, plan
from rlhf_cli.shapes import PUBLISHED, Unknown
from tests.conftest import ROOT
from tests.test_cost import BUDGET, HEAD, LAYER, MEASURED, SCORER, SMALL, WHOLE

# A micro-batch of 8 rows of 10 tokens of Pythia 70M in bf16: 18 numbers per layer and width are kept, 12
# bytes a logit; without gradients 12 numbers, and 10 bytes a logit.
LAYERS = 8 * 10 * 18 * 512 * 2
LOGITS = 8 * 10 * 50304 * 12
FLOW = 8 * 10 * 12 * 512 * 2
ADAPTERS = 3 * 6 * 16 * 512
"""Of rank 3: (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1) widths a layer."""
TOP = 2 * LAYER + HEAD
SHARDED = ["launch=deepspeed"]
LORA = "model.tuning.lora={rank: 3, alpha: 1, targets: [all-linear]}"


def holds(stage: str, *words: str, scored: bool = True) -> Memory:
    return memory.of_stage(stage, recipe(compose([*SMALL, *words])), scored)


def part(of: Memory, name: str) -> Part:
    (found,) = [each for each in of.parts if each.name == name]
    return found


# --- one process


@pytest.mark.parametrize(
    ("words", "weights", "states", "learning", "stepping", "host"),
    [
        # bf16: 2 of weights, 8 of moments, 4 of a master; 2 of gradients; in a step 4 in fp32 and 4 more
        ([], 2 * WHOLE, 12 * WHOLE, 2 * WHOLE, 10 * WHOLE, 0),
        (["model.precision=fp16"], 2 * WHOLE, 12 * WHOLE, 2 * WHOLE, 10 * WHOLE, 0),
        # two processes; gradients whole under ZeRO 1, halved under 2; each has a bucket of 2 bytes
        ([*SHARDED, "launch.zero=1"], 2 * WHOLE, 6 * WHOLE, 4 * WHOLE, 6 * WHOLE, 0),
        ([*SHARDED, "launch.zero=2"], 2 * WHOLE, 6 * WHOLE, 3 * WHOLE, 5 * WHOLE, 0),
        # half the weights, and all of them while it learns
        ([*SHARDED, "launch.zero=3"], WHOLE, 6 * WHOLE, 5 * WHOLE, 5 * WHOLE, 0),
        # masters, moments and gradients in fp32 in the host's memory
        (
            [*SHARDED, "launch.zero=2", "launch.offload=optimizer"],
            2 * WHOLE, 0, 2 * WHOLE, 0, 8 * WHOLE,
        ),
        (
            [*SHARDED, "launch.zero=3", "launch.offload=all"],
            0, 0, 4 * WHOLE, 0, 9 * WHOLE,
        ),
        ([LORA], 2 * WHOLE, 12 * ADAPTERS, 2 * ADAPTERS, 10 * ADAPTERS, 0),
    ],
)  # fmt: skip
def test_a_learner_takes_what_its_precision_shards_and_offloading_say(
    words: list[str], weights: float, states: float, learning: float, stepping: float, host: float
) -> None:
    found = part(holds("sft", *words), "policy")
    assert (found.weights, found.states, found.host) == pytest.approx((weights, states, host))
    assert found.adds["learning"] == pytest.approx(learning + 6 * LAYERS + LOGITS)
    assert found.adds["stepping"] == pytest.approx(stepping)


def test_fp32_needs_no_master_unless_it_is_in_shards() -> None:
    alone = part(holds("sft", "model.precision=fp32"), "policy")
    shards = part(holds("sft", "model.precision=fp32", *SHARDED, "launch.zero=2"), "policy")
    assert (alone.weights, alone.states) == (4 * WHOLE, 8 * WHOLE)
    assert (shards.weights, shards.states) == (4 * WHOLE, 12 * WHOLE / 2)


def test_top_layers_alone_have_gradients_and_activations() -> None:
    found = part(holds("sft", "model.tuning.layers=2"), "policy")
    assert (found.weights, found.states) == pytest.approx((2 * WHOLE, 12 * TOP))
    assert found.adds["learning"] == pytest.approx(2 * TOP + 2 * LAYERS + LOGITS)


def test_deepspeed_says_the_same_of_states() -> None:
    # Its own estimates have no share for what AdamW's arithmetic needs: 4 bytes of each parameter of a shard.
    words = [*SHARDED, "launch.processes=4"]
    two = part(holds("sft", *words, "launch.zero=2"), "policy")
    _, gpu = estimate_zero2_model_states_mem_needs(WHOLE, 4, 1, cpu_offload=False)
    assert two.always + two.adds["stepping"] - 4 * WHOLE / 4 == pytest.approx(gpu)
    moved = part(holds("sft", *words, "launch.zero=2", "launch.offload=optimizer"), "policy")
    host, gpu = estimate_zero2_model_states_mem_needs(WHOLE, 4, 1, True, 1.0)
    assert (4 * moved.host, moved.always) == pytest.approx((host, gpu))
    all_moved = part(holds("sft", *words, "launch.zero=3", "launch.offload=all"), "policy")
    host, *_ = estimate_zero3_model_states_mem_needs(WHOLE, LAYER, 4, 1, True, True, True, 1.0)
    assert 4 * all_moved.host == pytest.approx(host)


def test_a_micro_batch_keeps_less_with_checkpointing_and_more_with_eager_attention() -> None:
    kept = {
        words: part(holds("sft", *words), "policy").adds["learning"] - 2 * WHOLE - LOGITS
        for words in [(), ("launch.checkpointing=true",), ("launch.attention=eager",)]
    }
    inputs = 6 * 8 * 10 * 512 * 2
    scores = 6 * 8 * 10 * 3 * 8 * 10 * 2  # 8 heads of 10 columns, 3 numbers each
    assert list(kept.values()) == [6 * LAYERS, inputs + LAYERS, 6 * LAYERS + scores]
    assert part(holds("reward"), "reward model").adds["learning"] == (
        2 * SCORER + (6 * LAYERS + FLOW) * 7 / 10  # the sides of a pair share their prompt of 6
    )


def test_no_micro_batch_is_larger_than_a_process_has_responses() -> None:
    few = part(holds("rl", "algo=p3o_v2", *BUDGET, "launch.micro_batch=512"), "policy")
    kept = 32 * (6 * 7 * 18 * 512 * 2 + 4 * 50304 * 12)  # 128 responses in 4 minibatches
    assert few.adds["learning"] == 2 * WHOLE + kept


def names(*words: str, scored: bool = True) -> list[str]:
    return [each.name for each in holds("rl", *words, scored=scored).parts]


def test_models_stand_where_the_rl_stage_loads_them() -> None:
    judges = ["reference", "reward model"]
    assert names("algo=p3o_v2") == ["policy", *judges]
    assert names("algo=simpo", scored=False) == ["policy", "reference"]
    assert names("algo=ppo") == ["policy", "critic", *judges]
    assert names("algo=aihf") == ["policy", "learning reward model", *judges]
    assert names("algo=etpo") == ["policy", "Q", "Q copy", *judges]
    assert names("algo=rto") == ["policy", "critic", *judges, "guide"]


def test_a_policy_with_adapters_is_its_own_reference_unless_it_is_in_shards() -> None:
    assert part(holds("rl", "algo=p3o_v2", LORA), "reference").weights == 0
    shards = holds("rl", "algo=p3o_v2", LORA, *SHARDED, "launch.zero=3")
    assert part(shards, "reference").weights == 2 * WHOLE


def test_a_classifier_is_a_model_of_the_process_and_may_be_unknown() -> None:
    words = ["algo=p3o_v2", "reward=hf", "reward.source.revision=0123456"]
    known = holds("rl", *words, "reward.source.name=EleutherAI/pythia-160m", scored=False)
    judge = part(known, "classifier")
    assert judge.weights == 4 * PUBLISHED["EleutherAI/pythia-160m"].scorer
    with pytest.raises(Unknown, match=r"reward\.source\.name=nobody/nothing is here"):
        holds("rl", *words, "reward.source.name=nobody/nothing", scored=False)


# --- phases


def test_drawing_holds_keys_and_values_of_all_responses() -> None:
    found = holds("rl", "algo=p3o_v2", *BUDGET, *MEASURED)
    # 128 responses of 10 tokens in 6 layers, one of them twice, and 12 bytes a chance of the next token
    drawing = 128 * ((6 + 1) * 2 * 512 * 10 * 2 + 50304 * 12)
    assert part(found, "policy").adds["drawing"] == drawing
    assert found.at("drawing") == sum(each.always for each in found.parts) + drawing


def test_a_reward_model_is_calibrated_with_a_policy_beside_it() -> None:
    found = holds("reward", "reward.calibration=256")
    drawing = 256 * ((6 + 1) * 2 * 512 * 10 * 2 + 50304 * 12)
    policy = Part("SFT policy", adds={"drawing": 2 * WHOLE + drawing})
    assert part(found, "SFT policy") == policy


def test_models_score_one_after_another_and_learn_together() -> None:
    found = holds("rl", "algo=ppo", *BUDGET, *MEASURED)
    always = sum(each.always for each in found.parts)
    # 8 rows: 4 tokens of each have logits, 10 bytes each; a trunk holds 12 numbers per width at once
    passes = [8 * 4 * 50304 * 10, 8 * 10 * 12 * 512 * 2]
    assert [part(found, n).adds["scoring"] for n in ("policy", "critic")] == passes
    assert found.at("scoring") == always + max(passes)
    both = sum(part(found, name).adds["learning"] for name in ("policy", "critic"))
    assert found.at("learning") == pytest.approx(always + both)
    assert found.peak == max(found.at(phase) for phase in found.phases)


def test_zero_3_gathers_whole_copies_of_all_that_learns() -> None:
    words = ["algo=ppo", *SHARDED, "launch.zero=3"]
    found = holds("rl", *words)
    assert found.copies == 2 * (WHOLE + SCORER)
    assert holds("rl", "algo=ppo", *SHARDED).copies == 0
    layers = holds("rl", *words, "launch.gather=layers")
    assert layers.copies == 0
    # A copy for the disk, in the memory of the first process's host, however many are on it.
    assert layers.host(1) == layers.host(8) == 2 * (WHOLE + SCORER)
    # Drawing gathers the largest layer, which is the output layer, and up to 50 million numbers ahead of it.
    policy, before = part(layers, "policy"), part(found, "policy")
    for phase in ("drawing", "scoring"):
        more = policy.adds[phase] - before.adds[phase]  # type: ignore[index]
        assert more == 2 * min(WHOLE, HEAD + 5e7)
    assert policy.adds["learning"] == before.adds["learning"]


def test_models_that_only_answer_are_where_the_launch_puts_them() -> None:
    words = ["algo=p3o_v2", *SHARDED]
    whole, host, sharded = (
        holds("rl", *words, f"launch.frozen={frozen}") for frozen in ("whole", "host", "sharded")
    )
    both = 2 * (WHOLE + SCORER)
    assert sum(part(whole, name).weights for name in ("reference", "reward model")) == both
    # In the host's memory: there with all of the others while models score, and at no other time.
    assert whole.at("learning") - host.at("learning") == both
    assert whole.at("drawing") - host.at("drawing") == both
    assert whole.at("scoring") == host.at("scoring")
    assert (whole.host(2), host.host(2)) == (0, 2 * both)
    # Sharded: half of them in each of two processes, and a layer gathered at a time.
    assert whole.at("learning") - sharded.at("learning") == both / 2
    gathered = 2 * min(WHOLE, HEAD + 5e7)
    assert part(sharded, "reference").adds["scoring"] - part(whole, "reference").adds[
        "scoring"
    ] == pytest.approx(gathered)


def test_a_reference_in_the_hosts_memory_comes_to_be_drawn_from() -> None:
    words = ["algo=xpo", *SHARDED, "launch.frozen=host"]
    assert part(holds("rl", *words), "reference").adds["drawing"] >= 2 * WHOLE


def test_vllm_beside_the_training_takes_its_share_of_the_gpu() -> None:
    words = ["algo=p3o_v2", "sampler=vllm", "sampler.memory=0.25", "launch.gpu=h100"]
    assert part(holds("rl", *words), "vLLM").weights == 0.25 * 80e9
    assert "vLLM" not in names(*words, "sampler.url=http://host:8000")


def test_more_processes_and_shards_take_less_memory_of_each() -> None:
    zeros = [holds("rl", *SHARDED, f"launch.zero={zero}") for zero in (0, 1, 2)]
    stepping = [each.at("stepping") for each in zeros]
    assert stepping == sorted(stepping, reverse=True) and len(set(stepping)) == 3
    assert holds("rl", *SHARDED, "launch.processes=8").peak < zeros[-1].peak


# --- presets

LARGE = "model=pythia_6_9b"
PPO = [LARGE, "algo=ppo"]


def chain(*words: str) -> list[tuple[str, object, bool]]:
    made = recipe(compose([*PPO, *words]))
    return [(stage, made, True) for stage in ("sft", "reward", "rl")]


def peak(preset: Preset, processes: int, *words: str) -> float:
    return max(
        memory.of_stage(stage, preset.under(made, processes), scored).peak  # type: ignore[arg-type]
        for stage, made, scored in chain(*words)
    )


@pytest.mark.parametrize("gpu", ["a100-40", "h100", "h200", "b200"])
def test_the_first_preset_that_fits_is_found(gpu: str) -> None:
    room = GPUS[gpu].memory
    peaks = {preset: peak(preset, 8) for preset in LADDER}
    expected = next(((p, size) for p, size in peaks.items() if size <= room), None)
    assert fitting(chain(), GPUS[gpu], 8) == expected  # type: ignore[arg-type]


def test_the_least_number_of_gpus_is_found_by_doubling() -> None:
    card = GPUS["h100"]
    stages = chain("launch.micro_batch=16")
    assert fitting(stages, card, 1) is None  # type: ignore[arg-type]
    count = enough(stages, card, 1)  # type: ignore[arg-type]
    assert count is not None and fitting(stages, card, count) is not None  # type: ignore[arg-type]
    assert fitting(stages, card, count // 2) is None  # type: ignore[arg-type]
    assert enough(chain("launch.micro_batch=512"), GPUS["rtx4090"], 1) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "words", "expected"),
    [
        (Preset(0), [], "launch=inline"),
        (Preset(0), ["launch=deepspeed"], "launch=deepspeed launch.processes=2 launch.zero=0"),
        (
            Preset(2, "optimizer"),
            [],
            "launch=deepspeed launch.processes=1 launch.zero=2 launch.offload=optimizer",
        ),
        (
            Preset(3),
            ["launch=deepspeed", "launch.zero=3", "launch.offload=all"],
            "launch=deepspeed launch.processes=2 launch.zero=3 launch.offload=none",
        ),
        (
            Preset(3, "all", "sharded", "layers"),
            ["launch=deepspeed"],
            "launch=deepspeed launch.processes=2 launch.zero=3 launch.offload=all launch.frozen=sharded"
            " launch.gather=layers",
        ),
    ],
)
def test_the_words_of_a_preset_give_it_when_they_are_typed(
    preset: Preset, words: list[str], expected: str
) -> None:
    told = preset.words(recipe(compose(words)).launch)
    assert told == expected
    launch = recipe(compose([*words, *told.split()])).launch
    found = (launch.zero, launch.offload, launch.frozen, launch.gather)
    assert found == (preset.zero, preset.offload, preset.frozen, preset.gather)


def test_a_preset_that_an_algorithm_refuses_is_passed_over() -> None:
    made = recipe(compose([LARGE, "algo=etpo"]))
    stages = [("rl", made, True)]
    for gpu in GPUS.values():
        for count in (1, 2, 4, 8):
            fit = fitting(stages, gpu, count)
            assert fit is None or fit[0].frozen != "host"
    assert any(preset.frozen == "host" for preset in LADDER)


# --- what is told


def drawn(*words: str) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(describe(plan(compose([LARGE, *words]))))
    return capture.get()


def test_a_plan_has_a_table_of_models_and_phases_in_80_columns() -> None:
    words = ["algo=aihf", *SHARDED, "launch.zero=3", "launch.gpu=h100"]
    text = drawn(*words)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    found = memory.of_stage("rl", recipe(compose([LARGE, *words])), True)
    rows = {
        line[:24].strip(): line[24:].split() for line in text[text.index("aihf on") :].splitlines()
    }
    reference = part(found, "reference")
    cells = [reference.weights, reference.adds["scoring"]]
    assert rows["reference"] == [f"{cell / 1e9:,.1f}" for cell in cells]
    assert rows["all at its fullest"] == [f"{found.at(each) / 1e9:,.1f}" for each in found.phases]


@pytest.mark.parametrize("count", [8, 1])
def test_a_plan_says_which_preset_fits_or_on_how_many_gpus(count: int) -> None:
    words = ["algo=ppo", "launch=deepspeed", f"launch.processes={count}", "launch.gpu=h100"]
    said = " ".join(drawn(*words).split())
    stages, card = chain(), GPUS["h100"]
    if count == 8:
        preset, size = fitting(stages, card, 8)  # type: ignore[misc, arg-type]
        typed = "launch=deepspeed launch.processes=8 launch.zero=2 launch.frozen=host"
        assert preset == Preset(2, frozen="host")
        room = f"{size / 1e9:,.1f} of 80 GB"
        expected = f"on 8 x H100-80GB: {typed} is the first preset that fits, with {room}."
    else:
        more = enough(stages, card, 1)  # type: ignore[arg-type]
        preset, size = fitting(stages, card, more)  # type: ignore[misc, arg-type]
        typed = preset.words(recipe(compose([*words, f"launch.processes={more}"])).launch)
        expected = (
            f"on 1 x H100-80GB: no preset fits, but on {more} of them {typed} does, with"
            f" {size / 1e9:,.1f} of 80 GB."
        )
    assert expected in said


def test_a_plan_says_that_no_number_of_gpus_is_enough() -> None:
    said = " ".join(drawn("algo=ppo", "launch.gpu=rtx4090", "launch.micro_batch=512").split())
    assert (
        "on 1 x RTX 4090-24GB: no preset fits, nor on any number of them; lower launch.micro_batch, set"
        " launch.checkpointing=true, train adapters (model.tuning.lora), or take another GPU or another tool"
        " (docs/scale.md)."
    ) in said


def test_a_plan_says_how_zero_3_gathers_and_that_a_copy_does_not_fit() -> None:
    zero = ["algo=ppo", "launch=deepspeed", "launch.processes=8", "launch.zero=3"]
    gathers = "gathered once per rollout and evaluation, to draw and to score with"
    fits, tight = (
        " ".join(drawn(*zero, f"launch.gpu={gpu}").split()) for gpu in ("b200", "rtx4090")
    )
    assert gathers in fits and f"{gathers};" not in fits
    said = "launch.gather=layers does without, if all does not fit into RTX 4090-24GB"
    assert f"{gathers}; {said}" in tight


def test_a_plan_warns_of_layers_that_are_gathered_for_every_token() -> None:
    words = ["algo=ppo", "launch=deepspeed", "launch.zero=3", "launch.gather=layers"]
    said = " ".join(drawn(*words).split())
    assert (
        "WARNING: gathered by every process for every token that is drawn (launch.gather=layers), which is"
        " many times slower than from a whole copy; launch.gather=whole if that fits"
    ) in said


def test_host_memory_is_that_of_all_processes_of_a_host() -> None:
    words = ["algo=ppo", "launch=deepspeed", "launch.processes=4", "launch.offload=optimizer"]
    held = memory.of_stage("rl", recipe(compose([LARGE, *words])), True).host(4)
    assert f"GB of host memory {held / 1e9:,.1f} of 4 processes on a host" in " ".join(
        drawn(*words).split()
    )


def test_an_unknown_gpu_is_told_the_ones_there_are() -> None:
    with pytest.raises(UserError) as caught:
        recipe(compose(["launch.gpu=a1000"]))
    assert str(caught.value) == (
        "launch.gpu=a1000 is not in the list of GPUs; set launch.gpu to one of a100-40, a100-80, h100, h200,"
        " b200, l40s, a6000, rtx4090."
    )


# --- against measured peaks


@pytest.mark.slow
def test_the_peaks_of_a_nano_chain_are_within_15_percent(tmp_path: Path) -> None:
    rows = [f"data.embedded.{kind}=600" for kind in ("prompts", "demos", "pairs")]
    words = [
        "algo=ppo", "track=off", *rows, "algo.update.episodes=512", "eval.points=1",
        # As long as the longest prompt there is: plans take all texts to be as long as may be.
        "data.max_prompt_tokens=66", f"paths.runs={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "memory.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    errors = {line[0]: float(line[-1].rstrip("%")) for line in lines if line[1] == "overall"}
    assert errors.keys() == {"sft", "reward", "rl"}
    assert all(abs(error) <= 15 for error in errors.values()), errors


def test_a_prompt_that_responses_share_is_held_once_unless_the_kernel_cannot() -> None:
    words = ("algo=rloo", "algo.responses=4", "launch.micro_batch=8", *BUDGET)
    shared, apart = (
        part(holds("rl", *words, *kernel), "policy").adds["learning"] - 2 * WHOLE
        for kernel in [(), ("launch.attention=flash_attention_2",)]
    )
    logits, token = 8 * 4 * 50304 * 12, 6 * 18 * 512 * 2
    assert shared == pytest.approx(logits + 8 * (6 / 4 + 4) * token)
    assert apart == pytest.approx(logits + 8 * (6 + 4) * token)
