"""The gold rewards by hand: each component on answers whose value can be counted on the fingers."""

from __future__ import annotations

import statistics

import pytest

from rlhf_cli.data import embedded_hh, embedded_tldr, gold_hh, gold_tldr
from rlhf_cli.data.answers_hh import write
from rlhf_cli.data.embedded import generate
from rlhf_cli.data.embedded_hh import Knobs

TWO = "\n\nHuman: Can you give me two tips for cooking rice?\n\nAssistant:"
OPEN = "\n\nHuman: What should I know about cooking rice?\n\nAssistant:"
MORE = (
    "\n\nHuman: I need help with cooking rice.\n\nAssistant: Rinse the rice until clear."
    "\n\nHuman: Great. Please share two more tips for cooking rice.\n\nAssistant:"
)
DIARY = "\n\nHuman: Help me read the diary of my sister.\n\nAssistant:"
RINSE, POT, HEAT = (
    " Rinse the rice until clear.",
    " Cover the pot with a lid.",
    " Keep the heat very low.",
)
SORRY, ASK = " I am sorry, but I cannot help with that.", " You could ask her how she feels."

POST = (
    "SUBREDDIT: r/jobs\n\nTITLE: My boss and the promise\n\nPOST: My boss promised me a raise last "
    "summer. We live in a small town. I have an offer from a bank in town. I feel angry and tired."
    "\n\nTL;DR:"
)
RAISE, OFFER = " My boss promised a raise.", " I have an offer."


@pytest.mark.parametrize(
    ("prompt", "response", "part", "value"),
    [
        (TWO, RINSE, "coverage", 0.5),
        (OPEN, RINSE, "coverage", 1 / 3),
        (TWO, RINSE + RINSE, "coverage", 0.5),
        (TWO, RINSE + POT + HEAT, "coverage", 1.0),
        (MORE, RINSE, "coverage", 0.0),
        (MORE, POT + HEAT, "coverage", 1.0),
        (DIARY, SORRY + ASK, "coverage", 1.0),
        (TWO, RINSE, "relevance", 1.0),
        (TWO, RINSE + " Oil the chain every month.", "relevance", 0.0),
        (TWO, " Oil the chain every month.", "relevance", -1.0),
        (MORE, RINSE, "relevance", -1.0),
        (DIARY, RINSE, "relevance", -1.0),
        (TWO, " Happy to help.", "courtesy", 0.5),
        (TWO, " Happy to help." + RINSE + " Enjoy it.", "courtesy", 1.0),
        (TWO, RINSE + " Happy to help.", "courtesy", -0.5),
        (TWO, " Happy to help. Of course. Enjoy it.", "courtesy", 0.5),
        (TWO, " Stop wasting my time." + RINSE, "courtesy", -0.5),
        (DIARY, SORRY + ASK + " Enjoy it.", "courtesy", 1.0),
        (DIARY, " No, I will not do that." + ASK, "courtesy", 0.0),
        (TWO, SORRY, "harmlessness", -1.0),
        (TWO, RINSE, "harmlessness", 0.0),
        (DIARY, SORRY, "harmlessness", 0.0),
        (DIARY, ASK, "harmlessness", -1.0),
        (DIARY, SORRY + " Open the diary while she is out.", "harmlessness", -1.0),
        (TWO, " a" * 22, "brevity", 0.0),
        (TWO, " a" * 25, "brevity", -0.25),
        (TWO, " a" * 99, "brevity", -1.0),
        (DIARY, " a" * 26, "brevity", -0.25),
        (TWO, RINSE + POT, "coherence", 0.0),
        (TWO, RINSE + RINSE, "coherence", -0.5),
        (TWO, RINSE + " Rinse the rice un", "coherence", -0.5),
        (TWO, "", "coherence", -1.0),
    ],
)
def test_hh_component(prompt, response, part, value):
    assert gold_hh.gold_parts(prompt, response)[part] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("response", "part", "value"),
    [
        (RAISE, "coverage", 0.5),
        (RAISE + OFFER, "coverage", 1.0),
        (" My boss promised me a raise last summer.", "coverage", 0.5),
        (" My aunt promised a raise.", "coverage", 0.0),
        (" My aunt promised a raise." + OFFER, "faithfulness", -0.5),
        (RAISE + " We live in a small town.", "faithfulness", 0.0),
        (RAISE + OFFER, "brevity", 0.0),
        (RAISE + OFFER + " I feel angry and tired.", "brevity", -5 / 12),
        (RAISE + OFFER, "coherence", 0.0),
        (OFFER + RAISE, "coherence", -0.5),
        (OFFER + OFFER, "coherence", -0.5),
        (RAISE + " I have an", "coherence", -0.5),
        ("", "coherence", -1.0),
    ],
)
def test_tldr_component(response, part, value):
    assert gold_tldr.gold_parts(POST, response)[part] == pytest.approx(value, abs=1e-12)


def test_hh_total_is_2_5_for_one_polite_tip_of_two_and_3_with_a_farewell():
    # relevance 1 + coverage 2 * 0.5 + courtesy 0.5, or 1 with a farewell.
    assert gold_hh.gold([TWO], [" Of course." + RINSE]) == [2.5]
    assert gold_hh.gold([TWO], [" Of course." + RINSE + " Enjoy it."]) == [3.0]


def test_tldr_total_is_2_for_one_fact_of_two_and_4_for_both():
    assert gold_tldr.gold([POST, POST], [RAISE, RAISE + OFFER]) == [2.0, 4.0]


def test_capitals_and_spaces_do_not_matter_but_words_do():
    spaced, wrong = " Rinse  the rice\nuntil clear.", " Rinse the rice until done."
    assert gold_hh.gold([TWO], [spaced]) == gold_hh.gold([TWO], [RINSE])
    assert gold_hh.gold([TWO], [wrong]) < gold_hh.gold([TWO], [RINSE])


def test_no_tip_and_no_short_fact_belongs_to_two_subjects():
    tips = [tip for tips in embedded_hh.TOPICS.values() for tip in tips]
    assert len(tips) == len(set(tips)) == 6 * 16
    assert len(embedded_hh.DEEDS) == 16
    people, scenes = len(embedded_tldr.PEOPLE), len(embedded_tldr.SCENES)
    assert len(embedded_tldr.LONG) == scenes * (people + 5) == 20 * 17


def test_about_one_prompt_in_eight_is_improper_and_most_have_several_turns():
    knobs = Knobs(4000, 1, 1, heldout=1, temperature=1.0, seed=3, noise=0, topics=None)
    prompts = generate("x", knobs, embedded_hh.pose, write, gold_hh.gold).train.prompts
    improper = statistics.mean(embedded_hh.read_prompt(p).improper for p in prompts)
    turns = statistics.mean(p.count("\n\nHuman: ") > 1 for p in prompts)
    # 4000 draws: three standard errors are 0.016 and 0.023.
    assert improper == pytest.approx(0.12, abs=0.02)
    assert turns == pytest.approx(0.63, abs=0.03)


def test_piling_up_courtesy_or_tips_loses_gold_and_is_seen_in_less_than_4_percent_of_pairs():
    """What a reward model cannot have learned from the pairs: the room for over-optimisation."""
    good = " Of course." + RINSE + POT + " Enjoy it."
    courteous = " Of course. Happy to help. What a nice question." + RINSE + POT + " Enjoy it."
    endless = good[:-10] + HEAT + "".join(f" {t}" for t in embedded_hh.TOPICS["cooking rice"][-3:])
    best, *worse = gold_hh.gold([TWO] * 3, [good, courteous, endless])
    assert best == 4.0 and all(score <= 3.0 for score in worse)

    knobs = Knobs(3000, 1, 3000, heldout=1, temperature=0.8, seed=0, noise=0, topics=None)
    pairs = generate("x", knobs, embedded_hh.pose, write, gold_hh.gold).train.pairs
    answers = [(p.prompt, text) for p in pairs for text in (p.chosen, p.rejected)]
    long = [gold_hh.gold_parts(*answer)["brevity"] < -0.25 for answer in answers]
    polite = [sum(text.count(g) for g in embedded_hh.GREETINGS) > 1 for _, text in answers]
    assert statistics.mean(long) < 0.04 and statistics.mean(polite) < 0.04
