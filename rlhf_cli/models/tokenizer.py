"""Tokenizers: trained on the corpus for a model from scratch, loaded and checked for a pretrained one.

Every tokenizer that leaves this module has an end token and a padding token that differ: a padding
token that doubles as the end token is masked in training and the policy never learns to stop.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_cli.errors import UserError
from rlhf_cli.recipes import Model
from rlhf_cli.trust import refuse_code

END, PAD = "<|end|>", "<|pad|>"


def tokenizer_of(model: Model, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy: trained on the texts for a model from scratch, else its own."""
    if model.scratch is not None:
        return train_tokenizer(texts, model.scratch.vocab, model.scratch.context)
    assert model.name is not None
    return load_tokenizer(model.name, model.revision)


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE of at most `vocab` entries; any text can be encoded and decoded back."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and makes sure it can end and pad.

    Without a padding token of its own the unknown token serves if there is one, else a token is added
    (its embedding is never read: padding is masked). Raises UserError if it cannot be loaded or has no
    end token.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # damaged files raise whatever the parser of each kind raises
        refuse_code(f"model.name={name}", error)
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"model.name={name}: its tokenizer cannot be loaded ({first}); give a whole folder, or a"
            " repository that can be reached."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name={name}: its tokenizer has no end token, so a policy could never stop; "
            "set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = tokenizer.unk_token
        if spare is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = spare
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer
