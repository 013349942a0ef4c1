"""Adapters, top layers, kernels and checkpointing: what learns, what is saved, what stays the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_cli.errors import UserError
from rlhf_cli.models.tuning import WithoutAdapters, adapters, merged, tuned
from rlhf_cli.recipes import Lora, Tuning
from rlhf_cli.store.metrics import read
from rlhf_cli.store.run import Run
from tests.test_chain import TINY, rlhf

WHOLE = Tuning(None, None)
ALL = Tuning(Lora(4, 8, ("all-linear",)), None)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
SHAPES: dict[str, PreTrainedConfig] = {
    "neox": GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=32),
    "llama": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    ),
}  # fmt: skip


def made(kind: str, head: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(1)
    config = SHAPES[kind]
    config.num_labels, config.pad_token_id = 1, 0
    model: PreTrainedModel = head.from_config(config).eval()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def learned(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """With every learning weight moved."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", SHAPES)
def test_fresh_adapters_change_nothing_and_are_all_that_learns(kind: str) -> None:
    model = made(kind)
    before = logits(model)
    tuned(model, ALL, "model", 3)
    assert type(model) is type(made(kind))
    assert torch.equal(logits(model), before)
    assert learned(model) and all("lora_" in name for name in learned(model))
    assert not any("embed" in name or "lm_head" in name for name in learned(model))


@pytest.mark.parametrize("kind", SHAPES)
def test_without_its_adapters_a_policy_is_its_own_reference(kind: str) -> None:
    model = made(kind)
    before = logits(model)
    stirred(tuned(model, ALL, "model", 3))
    moved = logits(model)
    assert not torch.allclose(moved, before, atol=1e-3)
    assert torch.equal(logits(WithoutAdapters(model)), before)
    assert torch.equal(logits(model), moved) and learned(model)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_merged_policy_is_a_plain_folder_that_computes_the_same(
    kind: str, tmp_path: Path
) -> None:
    model = stirred(tuned(made(kind), ALL, "model", 3))
    plain = merged(model)
    assert adapters(model) and not adapters(plain)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=0)
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval()), logits(model), atol=1e-5, rtol=0)
    bare = made(kind)
    assert merged(bare) is bare


def test_a_new_score_head_learns_whole_beside_the_adapters() -> None:
    model = tuned(made("neox", AutoModelForSequenceClassification), ALL, "reward.model", 3)
    assert {name for name in learned(model) if "lora_" not in name} == {"score.weight"}


def test_adapters_go_where_they_are_told_and_depend_on_the_seed_alone() -> None:
    some = Tuning(Lora(4, 8, ("query_key_value",)), None)
    one, same, other = (tuned(made("neox"), some, "model", seed) for seed in (3, 3, 4))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in learned(one)} == {
        "query_key_value"
    }
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    with pytest.raises(UserError, match=r"model\.tuning\.lora\.targets=\['nowhere'\].*choose from"):
        tuned(made("neox"), Tuning(Lora(4, 8, ("nowhere",)), None), "model", 3)


@pytest.mark.parametrize(
    ("kind", "stack", "above"),
    [
        ("neox", "gpt_neox.layers.2", {"final_layer_norm", "embed_out", "lm_head"}),
        ("gpt2", "transformer.h.2", {"ln_f"}),  # its output layer is its input layer
        ("llama", "model.layers.2", {"norm", "lm_head"}),
    ],
)
def test_the_top_layer_the_norm_and_an_output_layer_of_its_own_learn(
    kind: str, stack: str, above: set[str]
) -> None:
    names = learned(tuned(made(kind), Tuning(None, 1), "model", 3))
    assert any(name.startswith(stack) for name in names)
    rest = {name for name in names if not name.startswith(stack)}
    assert rest and all(set(name.split(".")) & above for name in rest)
    assert len(learned(tuned(made(kind), WHOLE, "model", 3))) > len(names)
    with pytest.raises(UserError, match=r"tuning\.layers=4 is more than the 3 layers"):
        tuned(made(kind), Tuning(None, 4), "model", 3)


# --- the chain

SMALL = [
    *TINY, "eval.points=1", "algo.update.episodes=64", "algo.update.batch=32", "track=off",
    "data.max_response_tokens=12",
]  # fmt: skip
LORA = "model.tuning.lora={rank: 4, alpha: 8, targets: [all-linear]}"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def final(folder: Path, stage: str) -> Path:
    (path,) = (p for p in (folder / "runs" / stage).iterdir() if Run(p).status() == "done")
    return Run(path).final


def test_a_chain_of_adapters_leaves_plain_models_and_starts_at_no_kl(tmp_path: Path) -> None:
    done = rlhf(tmp_path, "train", *SMALL, LORA, "algo=ppo")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    (path,) = (tmp_path / "runs" / "rl").iterdir()
    rows = read(Run(path).metrics_path)
    assert rows[0]["eval/kl"] == 0.0 and rows[-1]["eval/kl"] != 0.0
    for stage, kind in (("sft", AutoModelForCausalLM), ("rl", AutoModelForCausalLM),
                        ("reward", AutoModelForSequenceClassification)):  # fmt: skip
        folder = final(tmp_path, stage)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt_neox"
        _, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = weights(final(tmp_path, "sft")), weights(final(tmp_path, "rl"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not any("embed" in n or "norm" in n or "bias" in n for n in changed)


def test_top_layers_alone_move(tmp_path: Path) -> None:
    done = rlhf(tmp_path, "train", *SMALL, "model.scratch.layers=2", "model.tuning.layers=1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    before, after = weights(final(tmp_path, "sft")), weights(final(tmp_path, "rl"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    deepest = max(int(n.split("layers.")[1].split(".")[0]) for n in before if "layers." in n)
    assert changed and all(
        f"layers.{deepest}." in n or "final_layer_norm" in n or "embed_out" in n or "lm_head" in n
        for n in changed
    )


def test_how_a_model_is_computed_changes_neither_its_key_nor_more_than_rounding(
    tmp_path: Path,
) -> None:
    ends = []
    for words in ([], ["launch.checkpointing=true"], ["launch.attention=eager"]):
        folder = tmp_path / str(len(ends))
        folder.mkdir()
        done = rlhf(folder, "train", *SMALL, "stage=sft", *words)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        (path,) = (folder / "runs" / "sft").iterdir()
        ends.append((path.name, weights(Run(path).final)))
    (name, plain), (again, recomputed), (other, eager) = ends
    assert name == again == other
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(eager[key], plain[key], atol=2e-3, rtol=1e-2)  # Adam amplifies


def test_a_kernel_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = rlhf(tmp_path, "train", *SMALL, "stage=sft", "launch.attention=flash_attention_2")
    assert done.returncode == 2, done.stdout[-500:] + done.stderr
    assert "launch.attention=flash_attention_2" in done.stderr and "Traceback" not in done.stderr


def test_a_reward_model_trained_otherwise_still_starts_from_the_policy() -> None:
    from rlhf_cli.config import compose, recipe

    for words in (["reward.model.tuning.layers=1"], ["reward.model.precision=bf16"]):
        made = recipe(compose(words))
        assert made.reward.model != made.model and made.reward.model.starts_like(made.model)
    words = ["model@reward.model=nano", "reward.model.scratch.width=64"]
    other = recipe(compose(words))
    assert not other.reward.model.starts_like(other.model)
