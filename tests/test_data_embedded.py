"""The embedded corpora: sizes, determinism, headroom, preferences that follow the gold."""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer

from rlhf_cli.data import answers_hh, embedded_hh, embedded_tldr, gold_hh, gold_tldr
from rlhf_cli.data.corpus import Corpus, Split
from rlhf_cli.data.embedded import Embedded, generate

CONF = Path(__file__).parent.parent / "conf" / "data"


@dataclass(frozen=True)
class World:
    """One embedded dataset at its shipped values."""

    knobs: Embedded
    corpus: Corpus
    seconds: float
    pose: Any
    write: Any
    best: Any
    judge: Any
    digest: str
    longest: tuple[int, int]


def shipped(name: str) -> Embedded:
    return Embedded(**OmegaConf.load(CONF / f"{name}.yaml").embedded)


def build(name: str) -> World:
    pose, write, best, judge, digest, longest = {
        "hh": (
            embedded_hh.pose,
            answers_hh.write,
            answers_hh.best,
            gold_hh,
            "abb00853",
            (96, 48),
        ),
        "tldr": (
            embedded_tldr.pose,
            embedded_tldr.write,
            embedded_tldr.best,
            gold_tldr,
            "99e639c9",
            (112, 32),
        ),
    }[name]
    knobs = shipped(name)
    start = time.process_time()
    corpus = generate(name, knobs, pose, write, judge.gold)
    seconds = time.process_time() - start
    return World(knobs, corpus, seconds, pose, write, best, judge, digest, longest)


@pytest.fixture(scope="module", params=["hh", "tldr"])
def world(request: pytest.FixtureRequest) -> World:
    return build(request.param)


def all_prompts(split: Split) -> set[str]:
    rows = (*split.demos, *split.pairs)
    return set(split.prompts) | {row.prompt for row in rows}


def demo_gold(world: World) -> list[float]:
    demos = world.corpus.train.demos
    return world.judge.gold([d.prompt for d in demos], [d.response for d in demos])


def test_there_are_11000_distinct_prompts_and_600_held_out_ones_made_in_2_seconds(world):
    assert len(world.corpus.train.prompts) == len(set(world.corpus.train.prompts)) == 11000
    assert len(world.corpus.heldout.prompts) == len(set(world.corpus.heldout.prompts)) == 600
    assert (len(world.corpus.train.demos), len(world.corpus.train.pairs)) == (7000, 6000)
    assert world.seconds < 2.0


def test_no_prompt_of_the_held_out_split_occurs_in_training(world):
    assert all_prompts(world.corpus.train).isdisjoint(all_prompts(world.corpus.heldout))


def test_the_shipped_corpus_is_the_same_bytes_everywhere(world):
    # Other rows under the same knobs need a new REVISION: it is what a run's key sees of them.
    assert world.corpus.digest[:8] == world.digest


def test_held_out_rows_depend_on_neither_the_number_of_prompts_nor_of_demos(world):
    small = replace(world.knobs, prompts=50, demos=20, pairs=30)
    corpus = generate("small", small, world.pose, world.write, world.judge.gold)
    assert corpus.heldout == world.corpus.heldout
    assert corpus.train.prompts == world.corpus.train.prompts[:50]


def test_another_seed_gives_other_rows(world):
    small = Embedded(prompts=50, demos=20, pairs=30, heldout=10, temperature=1.0, seed=1)
    one, two = (
        generate("x", replace(small, seed=seed), world.pose, world.write, world.judge.gold)
        for seed in (1, 2)
    )
    assert one.digest != two.digest
    assert len(set(one.train.prompts) & set(two.train.prompts)) < 5


def test_every_transcript_fits_the_shipped_lengths_under_a_bpe_of_2048(world):
    demos, pairs = world.corpus.train.demos, world.corpus.train.pairs
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([d.prompt + d.response for d in demos], 2048, show_progress=False)
    tokens = [len(e.ids) for e in bpe.encode_batch(list(world.corpus.train.prompts))]
    answers = [d.response for d in demos] + [p.chosen for p in pairs] + [p.rejected for p in pairs]
    longest_prompt, longest_response = world.longest
    assert max(tokens) <= longest_prompt
    # One place is the end token's.
    assert max(len(e.ids) for e in bpe.encode_batch(answers)) <= longest_response - 1


def test_the_language_has_fewer_than_900_words(world):
    text = " ".join(d.prompt + d.response for d in world.corpus.train.demos).lower()
    assert len(set(re.findall(r"[a-z]+", text))) < 900


def test_the_best_answer_has_gold_exactly_4_on_all_600_held_out_prompts(world):
    rng = Random(0)
    prompts = world.corpus.heldout.prompts
    scores = world.judge.gold(prompts, [world.best(p, rng) for p in prompts])
    assert scores == [world.judge.HIGHEST] * 600 == [4.0] * 600


def test_demonstrations_lie_in_the_middle_with_headroom_of_2_points_both_ways(world):
    scores = demo_gold(world)
    low, high = min(scores), max(scores)
    assert low < -3 and high == world.judge.HIGHEST
    assert low + 2 < statistics.mean(scores) < high - 2
    assert statistics.pstdev(scores) > 1.0
    assert low >= world.judge.LOWEST


def test_components_add_up_to_gold_and_stay_in_their_range(world):
    scores = demo_gold(world)
    for demo, score in zip(world.corpus.train.demos[:500], scores[:500], strict=True):
        parts = world.judge.gold_parts(demo.prompt, demo.response)
        assert set(parts) == set(world.judge.WEIGHTS)
        assert all(-1 <= part <= 1 for part in parts.values())
        # Four to six terms of size at most 4: rounding stays far below 1e-9.
        assert score == pytest.approx(
            sum(world.judge.WEIGHTS[k] * v for k, v in parts.items()), abs=1e-9
        )


def test_who_knows_the_gold_agrees_with_80_to_95_percent_of_the_labels(world):
    pairs = world.corpus.train.pairs
    prompts = [p.prompt for p in pairs]
    chosen = world.judge.gold(prompts, [p.chosen for p in pairs])
    rejected = world.judge.gold(prompts, [p.rejected for p in pairs])
    gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
    expected = statistics.mean(1 / (1 + math.exp(-abs(g) / world.knobs.temperature)) for g in gaps)
    agreed = statistics.mean(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gaps)
    assert 0.80 < expected < 0.95
    # 6000 draws: three standard errors of a share near 0.82 are 0.015.
    assert agreed == pytest.approx(expected, abs=0.015)


def test_the_two_answers_of_a_pair_differ(world):
    assert all(p.chosen != p.rejected for p in world.corpus.train.pairs)


def test_gold_takes_any_text_and_rewards_none_of_it(world):
    prompts = world.corpus.heldout.prompts
    for text in ("", " ", "...", "?!", "the the the", "\n\nHuman: hello", "\x00é漢", "a." * 500):
        scores = world.judge.gold(prompts, [text] * len(prompts))
        assert all(world.judge.LOWEST <= score <= 0 for score in scores), text


def test_gold_of_a_foreign_prompt_is_an_error_not_a_number(world):
    with pytest.raises(ValueError, match="not a prompt of the embedded corpus"):
        world.judge.gold(["\n\nHuman: Who won?\n\nAssistant:"], [" Nobody."])


def test_transcripts_join_without_a_seam(world):
    for pair in world.corpus.train.pairs[:200]:
        assert pair.prompt[-1] == ":"
        assert all(text[0] == " " and text[1] != " " for text in (pair.chosen, pair.rejected))
