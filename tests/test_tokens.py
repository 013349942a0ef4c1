"""Text to ids: one start token, one end token, prompts that fit, and a cache that is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_cli.config import compose, recipe
from rlhf_cli.data import tokens
from rlhf_cli.data.tokens import Encoded, Encoder, encoded, uses_bos
from rlhf_cli.errors import UserError
from rlhf_cli.models.load import new_policy, new_reward_model
from rlhf_cli.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_cli.recipes import Model

TEXTS = ["the cat sat on the mat", "and the dog lay by the door", "the end of the line is here"]
ROWS = [(f"{a}:", f" {b}", f" {c}") for a in TEXTS for b in TEXTS for c in TEXTS]


def uncut(_: str) -> None:
    return None


def without_first_word(text: str) -> str | None:
    return text.partition(" ")[2] or None


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 320, 64)


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A tokenizer that opens every text with a start token, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    made: Any = train_tokenizer(TEXTS, 320, 64)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.save_pretrained(folder := tmp_path_factory.mktemp("opening"))
    return load_tokenizer(folder)


def test_a_prompt_has_one_start_token_or_none(plain: Any, opening: Any) -> None:
    assert uses_bos(opening) and not uses_bos(plain)
    ids = Encoder(opening, 64, 64, uncut).prompt(TEXTS[0])
    assert ids == opening(TEXTS[0])["input_ids"] and ids.count(opening.bos_token_id) == 1
    assert Encoder(plain, 64, 64, uncut).prompt(TEXTS[0]) == plain(TEXTS[0])["input_ids"]


def test_a_rendering_that_opens_with_the_start_token_gets_no_second_one(opening: Any) -> None:
    encoder = Encoder(opening, 64, 64, uncut)
    assert encoder.prompt(f"<s>{TEXTS[0]}") == encoder.prompt(TEXTS[0])


def test_a_response_has_the_end_token_and_no_start_token_unless_it_is_cut(opening: Any) -> None:
    whole = Encoder(opening, 64, 64, uncut).response(TEXTS[1])
    assert whole[-1] == opening.eos_token_id and opening.bos_token_id not in whole
    for longest in (1, 5, len(whole) - 1):
        cut = Encoder(opening, 64, longest, uncut).response(TEXTS[1])
        assert cut == whole[:longest] and opening.eos_token_id not in cut
    assert Encoder(opening, 64, len(whole), uncut).response(TEXTS[1]) == whole


def test_a_long_prompt_takes_the_first_shorter_version_that_fits(opening: Any) -> None:
    encoder = Encoder(opening, 64, 64, without_first_word)
    for longest in range(2, len(encoder.prompt(TEXTS[1])) + 1):
        ids = Encoder(opening, longest, 64, without_first_word).prompt(TEXTS[1])
        fitting, text = None, TEXTS[1]
        while fitting is None and text:
            candidate = opening(text)["input_ids"]
            fitting = candidate if len(candidate) <= longest else None
            text = without_first_word(text) or ""
        assert len(ids) <= longest and ids[0] == opening.bos_token_id
        assert fitting is None or ids == fitting


def test_of_999_shorter_versions_a_dozen_are_encoded(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def counted(self: Encoder, texts: list[str]) -> list[list[int]]:
        tried.extend(texts)
        return [plain(text)["input_ids"] for text in texts]

    monkeypatch.setattr(Encoder, "_ids", counted)
    ids = Encoder(plain, 30, 64, without_first_word).prompt(" ".join(["cat"] * 1000))
    one, each = len(plain("cat")["input_ids"]), len(plain(" cat")["input_ids"])
    longest = " ".join(["cat"] * (1 + (30 - one) // each))
    assert ids == plain(longest)["input_ids"]
    assert len(tried) <= 12  # the whole, 10 halvings of fewer than 2**10, and the one that is taken


def test_what_no_version_makes_fit_loses_its_beginning(plain: Any, opening: Any) -> None:
    ids = plain(TEXTS[0])["input_ids"]
    assert Encoder(plain, 3, 64, uncut).prompt(TEXTS[0]) == ids[-3:]
    started = opening(TEXTS[0])["input_ids"]
    got = Encoder(opening, 3, 64, uncut).prompt(TEXTS[0])
    assert got == [started[0], *started[-2:]]
    assert Encoder(opening, 1, 64, uncut).prompt(TEXTS[0]) == [started[0]]


def test_many_are_encoded_as_one_by_one(opening: Any) -> None:
    encoder = Encoder(opening, 6, 5, without_first_word)
    assert encoder.prompts(TEXTS) == [encoder.prompt(text) for text in TEXTS]
    assert encoder.responses(TEXTS) == [encoder.response(text) for text in TEXTS]
    assert encoder.prompts([]) == [] and encoder.responses([]) == []


def test_a_tokenizer_without_an_end_token_is_refused(plain: Any, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("eos_token") == plain.eos_token
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value) == (
        f"model.name={tmp_path}: its tokenizer has no end token, so a policy could never stop; set"
        " eos_token in its tokenizer_config.json."
    )


def pretrained(tokenizer: Any, place: Path) -> Model:
    """A model of 1 layer with this tokenizer, to be loaded by its folder."""
    made = recipe(compose(["model.scratch.layers=1", "model.scratch.width=16"])).model
    new_policy(made, tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return replace(made, scratch=None, name=str(place))


def test_a_reward_model_must_read_every_token_of_the_policy_as_the_policy_does(
    plain: Any, tmp_path: Path
) -> None:
    other: Any = train_tokenizer([text.upper() for text in TEXTS], 320, 64)
    # Neither has seen such words: the ids of single letters are all that a glance would compare.
    assert other("Human: 7")["input_ids"] == plain("Human: 7")["input_ids"]
    place = tmp_path / "other"
    with pytest.raises(UserError) as error:
        new_reward_model(pretrained(other, place), None, plain, 1)
    assert str(error.value) == (
        f"reward.model.name={place}: its tokenizer is not the policy's; choose a reward model of the"
        " policy's family."
    )


def test_a_reward_model_may_know_more_tokens_and_another_padding(
    plain: Any, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path / "plain")
    richer: Any = load_tokenizer(tmp_path / "plain")
    richer.add_special_tokens({"pad_token": "<pad>"})
    made = new_reward_model(pretrained(richer, tmp_path / "richer"), None, plain, 1)
    assert made.get_input_embeddings().num_embeddings == len(richer) == len(plain) + 1


# --- the cache


def silent(done: int, total: int) -> None:
    """Nobody watches."""


def direct(encoder: Encoder) -> list[tuple[list[int], ...]]:
    return [(encoder.prompt(p), encoder.response(a), encoder.response(b)) for p, a, b in ROWS]


def test_rows_come_back_as_they_were_encoded_and_are_encoded_once(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "AT_ONCE", 4)
    encoder, told = Encoder(plain, 5, 6, uncut), list[tuple[int, int]]()
    got = encoded(encoder, ROWS, tmp_path, lambda *how_far: told.append(how_far))
    assert list(got) == direct(encoder) and len(got) == 27
    assert got[-1] == direct(encoder)[-1] and got[3:5] == direct(encoder)[3:5]
    assert told == [(4, 27), (8, 27), (12, 27), (16, 27), (20, 27), (24, 27), (27, 27)]
    again = encoded(encoder, ROWS, tmp_path, lambda *how_far: told.append(how_far))
    assert list(again) == list(got) and len(told) == 7
    with pytest.raises(IndexError):
        got[27]


def test_other_rows_limits_ways_to_shorten_and_tokenizers_are_other_caches(
    plain: Any, opening: Any, tmp_path: Path
) -> None:
    kinds = [
        (Encoder(plain, 5, 6, uncut), ROWS),
        (Encoder(plain, 5, 6, uncut), ROWS[:-1]),
        (Encoder(plain, 5, 6, uncut), [(a, b + c, "") for a, b, c in ROWS]),
        (Encoder(plain, 4, 6, uncut), ROWS),
        (Encoder(plain, 5, 7, uncut), ROWS),
        (Encoder(plain, 5, 6, without_first_word), ROWS),
        (Encoder(opening, 5, 6, uncut), ROWS),
    ]
    for encoder, rows in kinds:
        encoded(encoder, rows, tmp_path, silent)
    assert len([f for f in (tmp_path / "tokens").iterdir() if f.is_dir()]) == len(kinds)


def test_no_rows_are_rows_too(plain: Any, tmp_path: Path) -> None:
    assert list(encoded(Encoder(plain, 5, 6, uncut), [], tmp_path, silent)) == []


def test_a_torn_cache_is_never_read(plain: Any, tmp_path: Path) -> None:
    encoder = Encoder(plain, 5, 6, uncut)

    def torn(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(encoder, ROWS, tmp_path, torn)
    assert list(encoded(encoder, ROWS, tmp_path, silent)) == direct(encoder)
    (folder,) = (f for f in (tmp_path / "tokens").iterdir() if f.is_dir())
    shutil.rmtree(folder)
    folder.with_suffix(".part").mkdir()
    (folder.with_suffix(".part") / "ids.npy").write_bytes(b"half")
    assert list(encoded(encoder, ROWS, tmp_path, silent)) == direct(encoder)


def _encode_beside(cache: Path, folder: Path, out: Any) -> None:
    encoder, told = Encoder(load_tokenizer(folder), 5, 6, uncut), list[int]()
    got = encoded(encoder, ROWS * 200, cache, lambda done, _: told.append(done))
    out.put((len(got), got[-1], bool(told)))


def test_of_processes_that_come_at_once_one_encodes_and_the_others_wait(
    plain: Any, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path / "plain")
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    folder = tmp_path / "cache"
    both = [
        context.Process(target=_encode_beside, args=(folder, tmp_path / "plain", out))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    said = [out.get(timeout=120) for _ in both]
    for each in both:
        each.join()
    assert said[0][:2] == said[1][:2] and said[0][0] == len(ROWS) * 200
    assert sorted(wrote for *_, wrote in said) == [False, True]


def test_an_open_cache_holds_no_rows_in_memory(plain: Any, tmp_path: Path) -> None:
    import numpy as np

    encoder = Encoder(plain, 5, 6, uncut)
    encoded(encoder, ROWS, tmp_path, silent)
    (folder,) = (f for f in (tmp_path / "tokens").iterdir() if f.is_dir())
    assert isinstance(Encoded(folder)._ids, np.memmap)
