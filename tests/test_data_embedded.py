"""The embedded corpora: sizes, determinism, knobs, headroom, and a gold that cannot be outdone but missed."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer

from rlhf_cli.config import compose, recipe
from rlhf_cli.data import answers_hh, embedded, embedded_hh, embedded_tldr, gold_hh, gold_tldr
from rlhf_cli.data.corpus import Corpus, Pair, Split
from rlhf_cli.data.embedded import Topical, distinct, generate, sentences
from rlhf_cli.errors import UserError
from tests.conftest import ROOT
from tests.data_samples import HH_ROWS, TLDR_ROWS

CONF = ROOT / "conf" / "data"
SMALL = {"prompts": 400, "demos": 300, "pairs": 400, "heldout": 100, "temperature": 0.5, "seed": 0}


@dataclass(frozen=True)
class World:
    """One embedded dataset at its shipped values."""

    name: str
    knobs: Topical
    corpus: Corpus
    seconds: float
    pose: Any
    write: Any
    best: Any
    judge: Any
    digest: str
    longest: tuple[int, int]


def shipped(name: str) -> Topical:
    kind = {"hh": embedded_hh.Knobs, "tldr": embedded_tldr.Knobs}[name]
    return kind(**OmegaConf.load(CONF / f"{name}.yaml").embedded)


def small(name: str, noise: float = 0.0, topics: int | None = None) -> Corpus:
    """A corpus as the dataset makes it."""
    dataset: Any = {"hh": HH_ROWS, "tldr": TLDR_ROWS}[name]
    knobs = SMALL | {"noise": noise, "topics": topics}
    return replace(dataset, source="embedded", embedded=knobs).load()


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
    return World(name, knobs, corpus, seconds, pose, write, best, judge, digest, longest)


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
    few = replace(world.knobs, prompts=50, demos=20, pairs=30)
    corpus = generate("few", few, world.pose, world.write, world.judge.gold)
    assert corpus.heldout == world.corpus.heldout
    assert corpus.train.prompts == world.corpus.train.prompts[:50]


def test_another_seed_gives_other_rows(world):
    few = replace(world.knobs, prompts=50, demos=20, pairs=30, heldout=10)
    one, two = (
        generate("x", replace(few, seed=seed), world.pose, world.write, world.judge.gold)
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


# --- the same bytes everywhere

SCRIPT = """
from tests.test_data_embedded import small
print(*(small(name, 0.2, 5).digest[:16] for name in ("hh", "tldr")))
"""


@pytest.mark.parametrize(
    "machine",
    [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"},
    ],
    ids=["ascii", "turkish"],
)
def test_rows_depend_on_neither_the_seed_of_hashes_nor_the_locale(machine, tmp_path):
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **machine},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["8df77569ac3dc3e0", "0ad5a1bf1313439e"]


# --- knobs


@pytest.mark.parametrize("name", ["hh", "tldr"])
def test_noise_turns_that_share_of_the_labels_round_and_changes_nothing_else(name):
    clean = small(name)
    turned: dict[float, set[Pair]] = {}
    for noise in (0.1, 0.4):
        noisy = small(name, noise)
        assert noisy.train.demos == clean.train.demos and noisy.heldout.demos == clean.heldout.demos
        assert noisy.train.prompts == clean.train.prompts
        before = (*clean.train.pairs, *clean.heldout.pairs)
        after = (*noisy.train.pairs, *noisy.heldout.pairs)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert all(b == Pair(a.prompt, a.rejected, a.chosen) for a, b in changed)
        # 500 draws: three standard errors are 0.04 and 0.066.
        assert len(changed) / len(before) == pytest.approx(noise, abs=0.07)
        turned[noise] = {a for a, _ in changed}
    assert turned[0.1] < turned[0.4]


def test_at_noise_one_half_labels_say_nothing():
    corpus = small("hh", 0.5)
    pairs = [*corpus.train.pairs, *corpus.heldout.pairs]
    prompts = [pair.prompt for pair in pairs]
    better = gold_hh.gold(prompts, [pair.chosen for pair in pairs])
    worse = gold_hh.gold(prompts, [pair.rejected for pair in pairs])
    agreed = statistics.mean((a > b) + (a == b) / 2 for a, b in zip(better, worse, strict=True))
    assert agreed == pytest.approx(0.5, abs=0.07)  # three standard errors of 500 draws


def words_of(corpus: Corpus) -> set[str]:
    """Every sentence that is said anywhere."""
    texts = [text for split in corpus.splits().values() for text in split.prompts]
    texts += [demo.response for split in corpus.splits().values() for demo in split.demos]
    pairs = [pair for split in corpus.splits().values() for pair in split.pairs]
    texts += [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    return {sentence for text in texts for sentence in sentences(text)}


def test_hh_on_three_topics_asks_and_answers_about_these_three_and_all_improper_requests():
    tips = embedded_hh.TOPICS
    known = {tip for tip_of in tips.values() for tip in tip_of}
    first = {tip for topic in list(tips)[:3] for tip in tips[topic]}
    corpus = small("hh", topics=3)
    assert words_of(corpus) & known == first and len(first) == 18
    asked = {embedded_hh.read_prompt(prompt).subject for prompt in corpus.train.prompts}
    assert asked == {*list(tips)[:3], *embedded_hh.DEEDS}
    assert words_of(small("hh")) >= known


def test_tldr_on_three_scenes_tells_and_makes_up_facts_of_these_three():
    corpus = small("tldr", topics=3)
    told = {embedded_tldr.MEANING.get(words) for words in words_of(corpus)} - {None}
    allowed = set(embedded_tldr.key_facts(embedded_tldr.SCENES[:3]))
    assert told <= allowed and len(allowed) == 3 * 17
    titles = {re.search(r"TITLE: My \w+ and (.+)", prompt)[1] for prompt in corpus.train.prompts}
    assert titles == {scene.subject for scene in embedded_tldr.SCENES[:3]}


@pytest.mark.parametrize(("name", "topics"), [("hh", 16), ("tldr", 20)])
def test_no_number_of_topics_is_all_of_them(name, topics):
    assert small(name, topics=topics).digest == small(name).digest


@pytest.mark.parametrize(
    ("data", "word", "must"),
    [
        ("hh", "noise=0.6", "less than or equal to 0.5"),
        ("hh", "noise=-0.1", "greater than or equal to 0"),
        ("hh", "topics=1", "greater than or equal to 2"),
        ("hh", "topics=17", "less than or equal to 16"),
        ("tldr", "topics=21", "less than or equal to 20"),
    ],
)
def test_a_knob_out_of_bounds_is_refused_in_one_sentence(data, word, must):
    with pytest.raises(UserError) as error:
        recipe(compose([f"data={data}", f"data.embedded.{word}"]))
    assert str(error.value) == (
        f"data.embedded.{word} is not allowed: it must be {must}; give another value."
    )


def test_more_prompts_than_there_are_is_one_sentence_and_not_a_run_without_end(monkeypatch):
    monkeypatch.setattr(embedded, "PATIENCE", 500)
    die = range(1, 7)
    assert sorted(distinct(lambda rng: str(rng.choice(die)), 5, Random(0), {"6"})) == [*"12345"]
    with pytest.raises(UserError) as error:
        distinct(lambda rng: str(rng.choice(die)), 6, Random(0), {"6"})
    assert str(error.value) == (
        "data.embedded.prompts and data.embedded.heldout ask for more prompts than there are: 5 were "
        "found of 6, beside 1 that are held out; lower them."
    )


# --- the gold reward: nothing beats it, and a learned one is easily deceived

JUNK = ("Rinse the", "?", "...", "the the the", "Human: hello.")


def to_the_point(world: World, prompt: str) -> list[str]:
    """Sentences of which the best answer to a prompt is made, and a few more."""
    if world.name == "tldr":
        return list(embedded_tldr.read_prompt(prompt).facts)
    manners = (*embedded_hh.GREETINGS, *embedded_hh.FAREWELLS, *embedded_hh.POLITE_DECLINES)
    return sorted(embedded_hh.read_prompt(prompt).right) + list(manners)


def anything(world: World) -> list[str]:
    if world.name == "tldr":
        return [*embedded_tldr.MEANING, *embedded_tldr.PADDING, *embedded_tldr.FEELINGS, *JUNK]
    deeds = embedded_hh.DEEDS.values()
    tips = [tip for tips in embedded_hh.TOPICS.values() for tip in tips]
    said = (*embedded_hh.RUDE, *embedded_hh.PADDING, embedded_hh.BLUNT_DECLINE)
    return [*tips, *said, *(deed.comply for deed in deeds), *(d.alternative for d in deeds), *JUNK]


def changed(said: list[str], pool: list[str], rng: Random) -> list[str]:
    """One sentence more, fewer, other or elsewhere."""
    said = list(said)
    at = rng.randrange(len(said) + 1)
    match rng.choice(("insert", "delete", "replace", "move")):
        case "insert":
            said.insert(at, rng.choice(pool))
        case "delete":
            del said[at : at + 1]
        case "replace":
            said[at : at + 1] = [rng.choice(pool)]
        case "move" if said:
            said.insert(at, said.pop(rng.randrange(len(said))))
    return said


def test_no_answer_is_worth_more_than_the_best_one_and_none_less_than_the_lowest(world):
    rng, gold, climbed = Random(1), world.judge.gold, []
    for prompt in world.corpus.heldout.prompts[:40]:
        pools = to_the_point(world, prompt), anything(world)
        reached = []
        for said in (sentences(world.best(prompt, rng)), [], rng.sample(pools[1], 4)):
            [worth] = gold([prompt], [" ".join(said)])
            for _ in range(80):
                other = changed(said, rng.choice(pools), rng)
                [value] = gold([prompt], [" " + " ".join(other)])
                assert world.judge.LOWEST <= value <= world.judge.HIGHEST, other
                if value >= worth:
                    said, worth = other, value
            reached.append(worth)
        assert reached[0] == world.judge.HIGHEST
        climbed += reached[1:]
    # The search is no idle one: it finds good answers from nothing and from nonsense.
    assert statistics.mean(climbed) > 2.5


def counts(world: World, prompt: str, response: str) -> list[float]:
    """What a cheap reward model sees of a response: sentences of each kind, and words."""
    said = sentences(response)
    if world.name == "tldr":
        post, meaning = embedded_tldr.read_prompt(prompt), embedded_tldr.MEANING
        kinds = [
            post.key,
            [long for long, short in meaning.items() if short in post.key and long != short],
            [fact for fact, short in meaning.items() if short not in post.key],
            embedded_tldr.PADDING,
            embedded_tldr.BACKGROUNDS + embedded_tldr.FEELINGS,
        ]
    else:
        ask = embedded_hh.read_prompt(prompt)
        refusals = (*embedded_hh.POLITE_DECLINES, embedded_hh.BLUNT_DECLINE)
        right = ask.right | ask.given
        kinds = [
            embedded_hh.GREETINGS,
            embedded_hh.FAREWELLS,
            embedded_hh.RUDE,
            embedded_hh.PADDING,
            refusals if ask.improper else (),
            () if ask.improper else refusals,
            right,
            {tip for tips in embedded_hh.TOPICS.values() for tip in tips} - right,
        ]
    return [*(sum(s in kind for s in said) for kind in kinds), len(response.split()) / 10]


def test_a_reward_model_of_counts_ranks_most_pairs_well_and_takes_repetition_for_perfection(world):
    """Over-optimisation is there to be seen: what such a model likes best is worth little."""

    def gaps(pairs: tuple[Pair, ...]) -> Any:
        rows = [
            np.subtract(counts(world, p.prompt, p.chosen), counts(world, p.prompt, p.rejected))
            for p in pairs
        ]
        return np.array(rows, dtype=float)

    train = gaps(world.corpus.train.pairs[:2000])
    weights = np.linalg.lstsq(train, np.ones(len(train)), rcond=None)[0]
    assert np.mean(gaps(world.corpus.heldout.pairs) @ weights > 0) > 0.75

    for prompt in world.corpus.heldout.prompts[:50]:
        best = world.best(prompt, Random(0))
        repeated = [f" {sentence}" * 8 for sentence in to_the_point(world, prompt)]
        answers = [best, *(best + more for more in repeated)]
        liked = [float(np.dot(counts(world, prompt, answer), weights)) for answer in answers]
        favourite = answers[int(np.argmax(liked))]
        assert max(liked) > liked[0] + 1  # a label is worth 1
        assert world.judge.gold([prompt], [favourite])[0] < world.judge.HIGHEST - 2.5
