"""TRL's trainers on the same weights, rows and sizes, timed step by step by a callback of theirs.

What they do by default and we do not is switched off: gradient checkpointing, logging, saving, dropout.
What else they do is left as they ship it: DPO asks its reference at each step and precomputes nothing, and
SFT learns from completions alone where it is given prompts and completions.
"""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.turns import Turns

LONGEST = 128
"""Tokens of a row; none of the embedded data is longer, so nothing is cut."""


def online(
    turns: Turns,
    trainer: str,
    policy: str,
    reward: str,
    prompts: list[str],
    rows: int,
    each: int,
    reply: int,
) -> None:
    """One of the online trainers; rows: responses of a step, `each` to a prompt, of `reply` tokens."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    scorer = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    given: dict[str, Any] = {
        "model": _policy(policy), "reward_funcs": scorer,
        "train_dataset": Dataset.from_dict({"prompt": prompts}), "processing_class": tokenizer,
        "reward_processing_classes": tokenizer, "callbacks": [callback(turns)],
    }  # fmt: skip
    common: dict[str, Any] = {**arguments(), "temperature": 1.0, "beta": 0.1}
    if trainer == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        # It draws two responses to each of its rows.
        args = OnlineDPOConfig(
            **common, per_device_train_batch_size=rows // 2, max_new_tokens=reply
        )
        OnlineDPOTrainer(**given, ref_model=_policy(policy), args=args).train()
        return
    args = getattr(trl, f"{trainer.upper()}Config")(
        **common, per_device_train_batch_size=rows, num_generations=each,
        max_completion_length=reply,
    )  # fmt: skip
    getattr(trl, f"{trainer.upper()}Trainer")(**given, args=args).train()


def offline(
    turns: Turns, trainer: str, policy: str, data: dict[str, list[str]], batch: int
) -> None:
    """SFT, Reward or DPO on rows of a dataset, `batch` of them, or pairs, in a step."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if trainer == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            policy, num_labels=1, dtype=torch.float32
        )
    else:
        model = _policy(policy)
    beside = {"ref_model": _policy(policy)} if trainer == "DPO" else {}
    args = getattr(trl, f"{trainer}Config")(
        **arguments(), per_device_train_batch_size=batch, max_length=LONGEST
    )
    getattr(trl, f"{trainer}Trainer")(
        model=model, **beside, args=args, train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(policy), callbacks=[callback(turns)],
    ).train()  # fmt: skip


def _policy(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def arguments() -> dict[str, Any]:
    """What all trainers are told."""
    import torch

    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": 10**6, "report_to": "none", "bf16": False,
        "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False,
        "logging_strategy": "no", "save_strategy": "no", "learning_rate": 1e-4,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def callback(turns: Turns) -> Any:
    """What waits for a turn before each step of a trainer and ends it afterwards."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        """Waits for a turn before each step and tells what it took after it."""

        def on_train_begin(self, *given: Any, **more: Any) -> None:
            turns.loaded()

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            turns.begin()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            turns.end()

    return Gate()
