"""Policies and reward models as Hugging Face classes, from random weights, a hub or a folder.

A policy is an `AutoModelForCausalLM`, a reward model an `AutoModelForSequenceClassification` with one
label, so that any library can load what a stage leaves behind. Dropout is off everywhere: with it, the
probability ratio of the first update would not be 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.errors import UserError
from rlhf_cli.models.tokenizer import load_tokenizer
from rlhf_cli.recipes import Model, Scratch
from rlhf_cli.trust import refuse_code

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE_OFFSET, SCORE_SCALE = "rlhf_score_offset", "rlhf_score_scale"
"""Names under which a reward model's config.json keeps its calibration."""


def scratch_config(scratch: Scratch, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """A GPT-NeoX shape with the Pythia proportions: parallel residual, a quarter of rotary dimensions."""
    return GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=scratch.width,
        intermediate_size=4 * scratch.width,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        max_position_embeddings=scratch.context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def new_policy(
    model: Model, tokenizer: PreTrainedTokenizerBase, attention: str = "auto"
) -> PreTrainedModel:
    """The policy before SFT: random weights (seeded) or the pretrained checkpoint.

    attention: the kernel, as in `recipes.Launch`.
    """
    if model.scratch is None:
        return _pretrained_policy(model, tokenizer, attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.scratch.seed)
        config = scratch_config(model.scratch, tokenizer)
        with _kernel(attention) as kernel:
            policy = AutoModelForCausalLM.from_config(config, **kernel)
    return _prepared(policy.to(DTYPES[model.precision]), tokenizer)


def _pretrained_policy(
    model: Model, tokenizer: PreTrainedTokenizerBase, attention: str
) -> PreTrainedModel:
    """The checkpoint, refused if part of it is missing: that part would be random in silence."""
    assert model.name is not None
    policy, report = load(
        AutoModelForCausalLM,
        model.name,
        model.revision,
        model.precision,
        attention,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise UserError(
            f"model.name={model.name}: its weights lack {sorted(report['missing_keys'])[0]}; give a"
            " checkpoint of a causal language model that matches its config.json."
        )
    return _prepared(policy, tokenizer)


def load_policy(
    path: Path, precision: str, tokenizer: PreTrainedTokenizerBase, attention: str = "auto"
) -> PreTrainedModel:
    """The policy a stage left in its `final` folder."""
    return _prepared(load(AutoModelForCausalLM, path, None, precision, attention), tokenizer)


def zero_head(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy with an output layer of its own, all 0: a Q network that starts without opinion."""
    old = policy.get_output_embeddings()
    head = torch.nn.Linear(old.in_features, old.out_features, bias=False).to(old.weight)
    torch.nn.init.zeros_(head.weight)
    policy.config.tie_word_embeddings = False
    policy.set_output_embeddings(head)
    return policy


def new_reward_model(
    model: Model,
    sft: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    attention: str = "auto",
) -> PreTrainedModel:
    """A trunk with a fresh scalar head of standard deviation 1/sqrt(width + 1) (Huang et al. 2024).

    The trunk is that of the SFT policy in the folder `sft`; None starts from `model` itself, whose own
    tokenizer must then have every token of the policy's under the same id (else UserError).
    """
    kind = AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if sft is not None:
            reward = load(kind, sft, None, model.precision, attention, num_labels=1)
        elif model.scratch is not None:
            config = scratch_config(model.scratch, tokenizer)
            config.num_labels = 1
            with _kernel(attention) as kernel:
                reward = kind.from_config(config, **kernel).to(DTYPES[model.precision])
        else:
            assert model.name is not None
            own = load_tokenizer(model.name, model.revision).get_vocab()
            read = {
                token: i
                for token, i in tokenizer.get_vocab().items()
                if i != tokenizer.pad_token_id
            }
            if not read.items() <= own.items():  # padding is masked, whatever it is called
                raise UserError(
                    f"reward.model.name={model.name}: its tokenizer is not the policy's; "
                    "choose a reward model of the policy's family."
                )
            name, revision = model.name, model.revision
            reward = load(kind, name, revision, model.precision, attention, num_labels=1)
        weight = reward.score.weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape) / (weight.shape[1] + 1) ** 0.5)
    # A trunk that was a reward model before brings that one's calibration along.
    reward.config.update({SCORE_OFFSET: 0.0, SCORE_SCALE: 1.0})
    return _prepared(reward, tokenizer)


def load_reward_model(
    path: Path, precision: str, tokenizer: PreTrainedTokenizerBase, attention: str = "auto"
) -> PreTrainedModel:
    """A trained reward model; UserError if its score head is missing, which would mean random scores."""
    model, report = load(
        AutoModelForSequenceClassification,
        path,
        None,
        precision,
        attention,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise UserError(
            f"{path}: the reward model lacks {sorted(report['missing_keys'])[0]}; "
            "it would score at random, so train it again"
        )
    return _prepared(model, tokenizer)


def load(  # type: ignore[no-untyped-def]
    kind: type,
    name: str | Path,
    revision: str | None,
    precision: str,
    attention: str = "auto",
    **options: object,
):
    """`kind.from_pretrained` with our errors; remote code is never run."""
    try:
        with _kernel(attention) as kernel:
            return kind.from_pretrained(  # type: ignore[attr-defined]
                str(name),
                revision=revision or "main",
                dtype=DTYPES[precision],
                trust_remote_code=False,
                **options,
                **kernel,
            )
    except UnpicklingError as error:
        raise UserError(
            f"model.name={name}: its weights hold more than tensors, which may be code and is not read;"
            " give a folder with model.safetensors."
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        refuse_code(f"model.name={name}", error)
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"model.name={name}: its weights cannot be loaded ({first}); give a whole folder, or a"
            " repository that can be reached."
        ) from error


@contextmanager
def _kernel(attention: str) -> Iterator[dict[str, Any]]:
    """The option that asks for it, none where transformers is to choose; UserError if it is not there."""
    try:
        yield {} if attention == "auto" else {"attn_implementation": attention}
    except ImportError as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"launch.attention={attention} cannot be had here ({first}); install what it needs, or set"
            " launch.attention=auto."
        ) from error


def context_length(name: str | Path, revision: str | None) -> int | None:
    """Longest sequence the model was made for, in tokens; None if its config does not say."""
    config = AutoConfig.from_pretrained(
        str(name), revision=revision or "main", trust_remote_code=False
    )
    return getattr(config, "max_position_embeddings", None)


def _prepared(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Dropout off, padding known, embeddings large enough for every token id."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = tokenizer.eos_token_id
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    return model.eval()
