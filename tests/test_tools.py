"""`rlhf credit` and `rlhf sample`: the mathematics on a tree, the search by exhaustion, the words on runs."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from rlhf_cli import config
from rlhf_cli.cli import main
from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.data.corpus import Corpus
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.rollout import Asked, Collector, Judges
from rlhf_cli.engine.sampler import Expert, draw, uniforms
from rlhf_cli.engine.world import start
from rlhf_cli.errors import UserError
from rlhf_cli.figures import credit as figure
from rlhf_cli.figures.credit import Answer, Heatmap
from rlhf_cli.models.heads import Actor, Scorer
from rlhf_cli.models.load import new_policy, new_reward_model
from rlhf_cli.models.tokenizer import load_tokenizer, train_tokenizer
from rlhf_cli.store.run import Run
from rlhf_cli.tools import terminal
from rlhf_cli.tools.checkpoints import trained
from rlhf_cli.tools.credit import product, token_credit
from rlhf_cli.tools.decode import Decoder, Decoding, beam, corpus_of, log_law
from rlhf_cli.tools.explain import pieces, question, score
from tests.algos.toys import TREE, close, tensor

# --- the mathematics, on the tree of two tokens

V_ROOT, V_LEFT, V_RIGHT = 1.521601, 0.849853, 1.894613
"""Soft values of the tree's states."""
ALL = torch.ones(4, 2)


def optimum() -> Tensor:
    """[S,V] log pi* by backward induction."""
    ref, beta, reward = TREE.ref, TREE.beta, TREE.score.view(2, 2)
    last = ref[1:] + reward / beta
    first = ref[0] + torch.logsumexp(last, -1)
    return torch.cat([first.unsqueeze(0), last]).log_softmax(-1)


def test_credit_on_the_tree_is_the_change_of_the_soft_value() -> None:
    credit = token_credit(TREE.logp(optimum()), TREE.logp(TREE.ref), ALL, TREE.beta)
    close(credit[[0, 2], 0], [-0.671748, 0.373013])
    close(credit[[0, 2], 0], [V_LEFT - V_ROOT, V_RIGHT - V_ROOT], 1.1e-6)  # of rounded literals
    close(credit[:, 1], [0.150147, -0.849853, -1.394613, 0.105387])
    close(credit.sum(-1), TREE.score - V_ROOT)


def test_under_the_reference_mean_credit_is_minus_beta_kl() -> None:
    credit = token_credit(TREE.logp(optimum()), TREE.logp(TREE.ref), ALL, TREE.beta)
    chance, best = TREE.probability(TREE.ref), TREE.probability(optimum())
    close((chance * credit.sum(-1)).sum(), -0.421601)
    close(-TREE.beta * (chance * (chance / best).log()).sum(), -0.421601)


def test_search_by_likelihood_is_search_guided_by_value() -> None:
    """beta log pi_ref + V*(s') exceeds beta log pi* by V*(s_0), whichever token is looked at."""
    guided = TREE.beta * TREE.ref[0].log_softmax(-1) + tensor([V_LEFT, V_RIGHT])
    close(guided - TREE.beta * optimum()[0], [V_ROOT, V_ROOT], 1.1e-6)  # of rounded literals


def test_credit_is_0_off_the_mask_whatever_stands_there() -> None:
    logp = tensor([[-1.0, -math.inf]])
    mask = torch.tensor([[1.0, 0.0]])
    close(token_credit(logp, tensor([[-3.0, -math.inf]]), mask, 0.5), [[1.0, 0.0]], 0)


def test_a_product_is_normalised_and_has_the_weights_as_powers() -> None:
    base, tuned, plain = (tensor(p).log() for p in ([0.5, 0.5], [0.8, 0.2], [0.4, 0.6]))
    left, right = 0.5 * (0.8 / 0.4) ** 2, 0.5 * (0.2 / 0.6) ** 2
    close(product([base, tuned, plain], [1, 2, -2]).exp()[0], left / (left + right), 1e-12)
    ref = TREE.ref.log_softmax(-1)
    close(product([ref, optimum(), ref], [1, 1, -1]), optimum(), 1e-12)


# --- the same through models: tables as transformers

ROOT, END, PAD = 2, 3, 4


def table_model(logits: Tensor) -> PreTrainedModel:
    """A model whose next-token logits after token i are row i, whatever came before."""
    size = len(logits)
    shape = GPTNeoXConfig(
        vocab_size=size,
        hidden_size=4 * size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = GPTNeoXForCausalLM(shape).eval()
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            for silent in (layer.attention.dense, layer.mlp.dense_4h_to_h):
                silent.weight.zero_()
                silent.bias.zero_()
        embedding = model.gpt_neox.embed_in.weight
        embedding.copy_(torch.eye(size, 4 * size))
        states = model.gpt_neox.final_layer_norm(embedding)
        head = (torch.linalg.pinv(states) @ logits.float()).T
        model.get_output_embeddings().weight.copy_(head)
    return model


def tree_model(table: Tensor) -> PreTrainedModel:
    """The tree's states are its last tokens; nothing else is ever said."""
    logits = torch.full((5, 5), -30.0)
    logits[ROOT, :2], logits[0, :2], logits[1, :2] = table.log_softmax(-1).float()
    return table_model(logits)


def test_models_give_the_trees_credit() -> None:
    policy, ref = tree_model(optimum()), tree_model(TREE.ref)
    for response, expected in (([0, 1], [-0.671748, -0.849853]), ([1, 1], [0.373013, 0.105387])):
        logs = [score(model, [ROOT], response) for model in (policy, ref)]
        close(token_credit(*logs, torch.ones(2), TREE.beta), expected, 5e-6)  # fp32 logits


def test_a_proxy_turns_the_trees_reference_into_its_optimum() -> None:
    policy, ref = tree_model(optimum()), tree_model(TREE.ref)
    experts = [Expert(ref), Expert(policy, 0.5), Expert(ref, -0.5)]
    half = (0.5 * (TREE.ref.log_softmax(-1) + optimum())).log_softmax(-1)
    logp = log_law(experts, [ROOT], [1, 0])
    close(logp, [float(half[0, 1]), float(half[2, 0])], 5e-6)  # fp32 logits


def test_a_response_is_scored_at_the_temperature_it_is_asked_at() -> None:
    hot = (TREE.ref.log_softmax(-1) / 2).log_softmax(-1)
    close(score(tree_model(TREE.ref), [ROOT], [1, 0], 2.0), [hot[0, 1], hot[2, 0]], 5e-6)


# --- the search

Next = Callable[[tuple[int, ...]], Tensor]
"""Log-probabilities of the token that follows a response so far."""


def searched(follows: Next, width: int, longest: int) -> tuple[float, tuple[int, ...]]:
    """Beam search as the docstring of `beam` has it, in lists: log-probability and response."""
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    aside: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, longest + 1):
        grown = [
            (logp + float(step), (*said, token))
            for logp, said in alive
            for token, step in enumerate(follows(said))
        ]
        grown.sort(reverse=True)
        over = [each for each in grown if each[1][-1] == END or length == longest]
        aside += [each for each in over if each in grown[:width]]
        alive = [each for each in grown if each not in over][:width]
    return max(aside)


def every_response(follows: Next, longest: int) -> list[tuple[float, tuple[int, ...]]]:
    """All responses that end or are cut, with their log-probabilities."""
    found = []
    words = [token for token in range(5) if token != END]
    for length in range(1, longest + 1):
        lasts = range(5) if length == longest else [END]
        for said in itertools.product(*[words] * (length - 1), lasts):
            steps = (float(follows(said[:t])[said[t]]) for t in range(length))
            found.append((math.fsum(steps), said))
    return found


def random_model(seed: int) -> tuple[PreTrainedModel, Next]:
    """A transformer of five tokens that attends, and its distributions by what was said."""
    torch.manual_seed(seed)
    shape = GPTNeoXConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = GPTNeoXForCausalLM(shape).eval()
    known: dict[tuple[int, ...], Tensor] = {}

    def follows(said: tuple[int, ...]) -> Tensor:
        if said not in known:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[0, 1, ROOT, *said]])).logits[0, -1]
            known[said] = logits.double().log_softmax(-1)
        return known[said]

    return model, follows


LONGEST = 4


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_that_loses_nothing_finds_the_likeliest_response(seed: int) -> None:
    model, follows = random_model(seed)
    responses = every_response(follows, LONGEST)
    close(math.fsum(math.exp(logp) for logp, _ in responses), 1.0, 1e-9)
    found = beam(model, [0, 1, ROOT], 5**3, LONGEST, END, PAD)
    assert tuple(found) == max(responses)[1]


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_of_any_width_is_the_search_it_says_it_is(seed: int) -> None:
    model, follows = random_model(seed)
    for width in (1, 2, 3, 5):
        found = beam(model, [0, 1, ROOT], width, LONGEST, END, PAD)
        assert tuple(found) == searched(follows, width, LONGEST)[1]


def test_a_beam_of_one_is_greedy_decoding() -> None:
    for seed in range(6):
        model, _ = random_model(seed)
        drawn = draw(
            [Expert(model)], [[0, 1, ROOT]], 1, torch.zeros(1, LONGEST), 3, END, PAD, temperature=0
        )
        greedy = drawn.tokens[0, 3:][drawn.mask[0].bool()].tolist()
        assert beam(model, [0, 1, ROOT], 1, LONGEST, END, PAD) == greedy


def test_a_second_beam_finds_what_greed_misses() -> None:
    model = tree_model(tensor([[0.6, 0.4], [0.5, 0.49], [0.1, 0.9]]).log())
    assert beam(model, [ROOT], 1, 2, END, PAD) == [0, 0]  # .30
    assert beam(model, [ROOT], 2, 2, END, PAD) == [1, 1]  # .36
    assert beam(tree_model(optimum()), [ROOT], 2, 2, END, PAD) == [1, 1]


def test_a_short_likely_response_beats_a_long_one_of_better_average() -> None:
    """By the average token, log .3 for an end at once would lose to log .7 for six others."""
    logits = torch.full((5, 5), -30.0)
    for token in (ROOT, 0):
        logits[token, 0], logits[token, END] = math.log(0.7), math.log(0.3)
    assert beam(table_model(logits), [ROOT], 3, 6, END, PAD) == [END]  # .3 against .7^6 = .118


def test_what_a_checkpoint_recommends_for_chatting_changes_no_search() -> None:
    model, follows = random_model(3)
    expected = searched(follows, 3, LONGEST)[1]
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.min_length = 9
    assert tuple(beam(model, [0, 1, ROOT], 3, LONGEST, END, PAD)) == expected


# --- words

TURN = "\n\nHuman: What is 2 + 2?\n\nAssistant:"


def test_a_transcript_is_cut_at_its_last_turn() -> None:
    earlier = "\n\nHuman: Hi.\n\nAssistant: Hello."
    asked = question(f"{earlier}{TURN} Four.", None, f"{earlier}{TURN} Five.")
    assert asked.prompt == earlier + TURN
    assert asked.answers == {"text": " Four.", "other": " Five."}
    post = "POST: I wrote TL;DR: once.\n\nTL;DR:"
    assert question(f"{post} wrote", None, None).prompt == post
    assert question(f"{TURN} the TL;DR: four", None, None).prompt == TURN


def test_an_answer_gets_the_space_that_answers_begin_with() -> None:
    asked = question("Four.", TURN, "\nFive.")
    assert asked.answers == {"text": " Four.", "other": "\nFive."}
    assert question(f"{TURN} Four.", None, "Five.").answers["other"] == " Five."


@pytest.mark.parametrize(
    ("text", "prompt", "other", "says"),
    [
        ("", None, None, "--text is empty"),
        (" \n", TURN, None, "--text is empty"),
        ("Four.", None, None, "give what it answers with --prompt"),
        ("Four.", " ", None, "--prompt is empty"),
        ("Four.", TURN, "", "--other is empty"),
        (TURN, None, None, "--text ends where its answer should begin"),
        (f"{TURN} Four.", None, TURN, "--other ends where"),
        (f"{TURN} Four.", None, "\n\nHuman: Hi.\n\nAssistant: Ho.", "answers another prompt"),
    ],
)
def test_words_that_ask_nothing_are_refused(
    text: str, prompt: str | None, other: str | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        question(text, prompt, other)


def test_pieces_make_up_the_text_and_no_token_is_silent() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300, 64)
    text = " the cat 漢 sat\n\tat $5"
    ids = tokenizer(text)["input_ids"]
    cut = pieces(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(cut) == len(ids) + 1 and all(cut)
    assert "".join(cut).replace("\N{REPLACEMENT CHARACTER}", "") == text + tokenizer.eos_token
    broken = tokenizer("漢")["input_ids"][:2]
    after = pieces(tokenizer, [*broken, *tokenizer("a")["input_ids"]])
    assert after[-1] == "a"


# --- pictures


def heatmap(*answers: Sequence[float], tokens: Sequence[str] = ("a", " b", "c")) -> Heatmap:
    names = ("text", "other")
    made = (
        Answer(name, tuple(tokens), tuple(credit))
        for name, credit in zip(names, answers, strict=False)
    )
    return Heatmap({"pi": "one", "pi_ref": "<other>"}, "Ask & see", 0.5, tuple(made))


def test_sums_say_what_they_are_relative_to_and_their_difference_is_relative_to_nothing() -> None:
    assert list(heatmap([0.5, -0.25, 0.5], [0.5, -1.25, 0.5]).sums()) == [
        "sum of text: +0.75, relative to V(s_0)",
        "sum of other: -0.25, relative to V(s_0)",
        "text - other: +1.00, whatever V(s_0) is",
    ]


def test_small_credit_gets_the_decimals_to_be_seen() -> None:
    assert heatmap([0.5, 0.0, 0.0]).number(0.25) == "+0.25"
    assert heatmap([0.0123, 0.0, 0.0]).number(0.0123) == "+0.012"
    assert heatmap([0.0, 0.0, 0.0]).limit == 1.0


def test_answers_share_one_scale() -> None:
    assert heatmap([0.5, -0.1, 0.0], [0.2, -1.5, 0.0]).limit == 1.5


def test_tints_are_white_at_0_and_full_at_the_limit_and_differ_by_sign() -> None:
    assert figure.tint(0.0, 2.0) == "#ffffff"
    assert figure.tint(2.0, 2.0) == figure.tint(5.0, 2.0) != figure.tint(-2.0, 2.0)


def test_the_page_escapes_what_it_is_given_and_needs_nothing_else() -> None:
    page = figure.page(heatmap([1.0, 0.0, -1.0], tokens=("<script>", "&\n", "\x1b[31m")))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "&lt;other&gt;" in page and "Ask &amp; see" in page
    assert "\x1b" not in page and "\u241b[31m" in page
    assert "src=" not in page and "<link" not in page and "@import" not in page
    assert page.count('title="+1.00"') == 1 and "relative to V(s_0)" in page
    assert "$" not in page


def test_the_same_heatmap_gives_the_same_bytes_and_dollars_open_no_formula(tmp_path: Path) -> None:
    drawn = heatmap([1.0, 0.0, -1.0], [0.5, 0.1, -0.3], tokens=("$\\frac$", "$ y^", "漢" * 60))
    first, second = (figure.write(drawn, tmp_path / name / "it") for name in ("one", "two"))
    assert set(first) == {"png", "html"}
    for kind, path in first.items():
        assert path.read_bytes() == second[kind].read_bytes()
        assert path.stat().st_size > 1000
    assert heatmap([1.0, 0.0, 0.0]).key() != heatmap([1.0, 0.0, 0.1]).key()


def test_on_a_terminal_each_token_stands_on_its_colour() -> None:
    drawn = heatmap([1.0, 0.0, -1.0], [0.5, 0.0, -0.5])
    page = io.StringIO()
    console = Console(
        file=page, force_terminal=True, color_system="truecolor", width=100, _environ={}
    )
    console.print(terminal.heatmap(drawn, 100, colour=True))
    said = page.getvalue()

    def on(token: str, value: float) -> str:
        return f"48;2;{';'.join(str(part) for part in bytes.fromhex(figure.tint(value, 1.0)[1:]))}m{token}"

    for token, value in (("a", 1.0), (" b", 0.0), ("c", -1.0), ("a", 0.5), ("c", -0.5)):
        assert on(token, value) in said
    assert "+0.50" not in said and "-1.00" in said  # numbers on the scale alone


@pytest.mark.parametrize("columns", [5, 12, 46])
def test_lines_hold_every_cell_in_order_and_are_no_longer_than_they_may(columns: int) -> None:
    widths = [3, 9, 1, 1, 30, 2, 4]
    rows = figure.lines(widths, columns)
    assert [i for row in rows for i in row] == list(range(7))
    for row, following in itertools.pairwise(rows):
        assert len(row) == 1 or sum(widths[i] for i in row) <= columns
        assert sum(widths[i] for i in row) + widths[following[0]] > columns


# --- the verbs, on a chain of untrained models

WORDS = [
    "algo=dpo_online", "model.scratch.layers=1", "model.scratch.width=32", "model.scratch.heads=2",
    "model.scratch.vocab=400", "model.scratch.context=256", "data.embedded.prompts=24",
    "data.embedded.demos=24", "data.embedded.pairs=12", "data.embedded.heldout=6",
    "data.max_prompt_tokens=160", "data.max_response_tokens=12", "track=off",
]  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """Folders and what lies in them."""

    runs: Path
    corpus: Corpus
    policy: PreTrainedModel
    ref: PreTrainedModel


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """An SFT policy, a reward model, an RL policy of other weights, an unfinished one, a stranger."""
    runs = tmp_path_factory.mktemp("tools") / "runs"
    node = config.compose(WORDS)
    made = config.recipe(node)
    corpus = made.data.load()
    rows = [demo.prompt + demo.response for demo in corpus.train.demos]
    tokenizer = train_tokenizer(rows, made.model.scratch.vocab, 256)
    parents = {"sft": "sft/tiny-s1-5555555555", "reward": "reward/tiny-s1-7777777777"}

    def save(path: str, model: PreTrainedModel, **manifest: object) -> Run:
        run = Run(runs / path)
        stage = path.partition("/")[0]
        run.begin(config.freeze(node), {"stage": stage, "key": run.key, **manifest})
        model.save_pretrained(run.final)
        tokenizer.save_pretrained(run.final)
        return run

    def policy(seed: int) -> PreTrainedModel:
        scratch = replace(made.model.scratch, seed=seed)
        model = new_policy(replace(made.model, scratch=scratch), tokenizer)
        with (
            torch.no_grad()
        ):  # untrained models are all but uniform: nothing to search or to credit
            model.get_output_embeddings().weight.mul_(20)
        return model

    ref, tuned = policy(1), policy(2)
    sft = save(parents["sft"], ref, parent_runs={})
    sft.finish()
    reward = new_reward_model(made.model, sft.final, tokenizer, 3)
    save(parents["reward"], reward, parent_runs={"sft": parents["sft"]}).finish()
    save("rl/mine-s1-aaaaaaaaaa", tuned, parent_runs=parents, beta=0.2).finish()
    save("rl/gone-s1-bbbbbbbbbb", tuned, parent_runs=parents, beta=0.2).fail("stopped")
    stranger = train_tokenizer(["qqq www eee"] * 3, 300, 256)
    new_policy(made.model, stranger).save_pretrained(runs / "stranger")
    stranger.save_pretrained(runs / "stranger")
    return Chain(runs, corpus, tuned, ref)


Rlhf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rlhf(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Rlhf:
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_RUNS", str(chain.runs))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(words)
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


def test_credit_of_a_run_is_its_betas_worth_of_log_ratio(rlhf: Rlhf, chain: Chain) -> None:
    prompt = chain.corpus.heldout.prompts[0]
    code, out, err = rlhf("credit", "aaaa", "--text", f"{prompt} Rest well.", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    (answer,) = said["answers"]
    rows = answer["tokens"]
    assert "".join(row["text"] for row in rows) == " Rest well.<|end|>"
    assert said["beta"] == 0.2 and said["pi_ref"] == "sft/tiny-s1-5555555555"
    assert said["sums"] == "relative to V(s_0)"
    for row in rows:
        assert row["credit"] == pytest.approx(0.2 * (row["logp"] - row["logp_ref"]), abs=1e-12)
    ids = [row["id"] for row in rows]
    tokenizer = load_tokenizer(trained(chain.runs, "5555").folder)
    given = Encoder(tokenizer, 160, 48, lambda _: None).prompt(prompt)
    for column, model in (("logp", chain.policy), ("logp_ref", chain.ref)):
        expected = log_law([Expert(model)], given, ids).tolist()
        assert [row[column] for row in rows] == pytest.approx(expected, abs=1e-5)  # fp32
    assert answer["sum"] == pytest.approx(sum(row["credit"] for row in rows), abs=1e-12)
    assert Path(said["figures"]["png"]).parent == Path("figures")


def test_two_answers_stand_side_by_side_with_numbers_where_there_is_no_colour(
    rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ["credit", "aaaa", "--prompt", TURN, "--text", "Four.", "--other", "Nine."]
    code, out, _ = rlhf(*words, "--out", "here")
    assert code == 0 and "\x1b" not in out
    heads = [line.split() for line in out.splitlines() if line.startswith("text  ")]
    assert heads == [["text", "other"]]
    assert out.count("relative to V(s_0)") == 2 and "text - other: " in out
    assert out.count("<|end|>") == 2 and "beta    0.2 (its own)" in out
    assert len(list(Path("here").iterdir())) == 2
    monkeypatch.setenv("COLUMNS", "60")
    narrow = rlhf(*words)[1].splitlines()
    assert "other" in [line.strip() for line in narrow]
    assert max(map(len, (line.rstrip() for line in narrow if "figures/" not in line))) <= 75


def test_text_may_come_from_stdin_and_beta_and_reference_may_be_given(
    rlhf: Rlhf, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TURN} Four.\n"))
    code, out, _ = rlhf("credit", "aaaa", "--text", "-", "--beta", "3", "--ref", "aaaa", "--json")
    said = json.loads(out)
    assert code == 0 and said["beta"] == 3
    assert [row["credit"] for row in said["answers"][0]["tokens"]][-1] == 0
    assert said["answers"][0]["tokens"][-2]["text"] == "."
    folder = str(trained(chain.runs, "5555").folder)
    by_folder, by_parent = (
        json.loads(rlhf("credit", "aaaa", "--text", f"{TURN} Four.", *more, "--json")[1])
        for more in (["--ref", folder], [])
    )
    assert by_folder["pi_ref"] == folder
    assert by_folder["answers"] == by_parent["answers"]


def test_an_sft_run_against_another_policy_has_credit_in_nats(rlhf: Rlhf) -> None:
    words = ["credit", "5555", "--prompt", TURN, "--text", "Four.", "--ref", "aaaa"]
    code, out, _ = rlhf(*words)
    assert code == 0 and "beta    1 (it has none: nats)" in out


def test_sampling_by_default_gives_the_responses_that_evaluations_measure(chain: Chain) -> None:
    policy = trained(chain.runs, "aaaa")
    corpus, made = corpus_of(policy), policy.recipe
    prompts = list(corpus.heldout.prompts[:3])
    decoder = Decoder.of(policy, corpus)
    rows = decoder.decode(prompts, Decoding.of("sample", None, None, None, proxy=False))
    tokenizer = decoder.tokenizer
    assert decoder.reward is not None
    collector = Collector(
        start(60),
        tokenizer,
        Judges(chain.ref, Scorer(decoder.reward.model.model)),
        micro_batch=8,
        max_response_tokens=made.data.max_response_tokens,
        seed=made.eval.seed,
        unended=made.reward.unended,
        unended_adds=made.reward.unended_adds,
    )
    asked = [Asked(ids) for ids in Encoder.of(tokenizer, made.data).prompts(prompts)]
    rollout, _ = collector.collect(Actor(chain.policy), asked, Sampling(policy=1), "eval", 0)
    assert rollout.logp_ref is not None and rollout.score is not None
    assert [row.response for row in rows] == collector.texts(rollout)
    assert [row.tokens for row in rows] == rollout.mask[:, 0].sum(-1).tolist()
    kl = (rollout.logp_old - rollout.logp_ref)[:, 0].sum(-1).tolist()
    assert [row.kl for row in rows] == pytest.approx(kl, abs=1e-4)  # fp32 sums of twelve tokens
    assert [row.score for row in rows] == pytest.approx(rollout.score[:, 0].tolist(), abs=1e-5)
    assert corpus.gold is not None
    assert [row.gold for row in rows] == corpus.gold(prompts, [row.response for row in rows])


def test_fewer_random_numbers_are_the_first_of_more() -> None:
    long, short = (uniforms(1, "eval", 0, range(5), count) for count in (14, 12))
    assert torch.equal(long[:, :12], short)


def test_the_wider_beam_is_the_likelier_and_greedy_the_beam_of_one(rlhf: Rlhf) -> None:
    def decoded(*words: str) -> list[dict[str, object]]:
        code, out, err = rlhf("sample", "aaaa", "--prompts", "2", *words, "--json")
        assert (code, err) == (0, "")
        rows: list[dict[str, object]] = json.loads(out)
        return rows

    greedy, one, wide = (
        decoded("--decode", *words) for words in (["greedy"], ["beam", "--width", "1"], ["beam"])
    )
    assert one == greedy
    likelier = [float(w["logp"]) - float(g["logp"]) for w, g in zip(wide, greedy, strict=True)]  # type: ignore[arg-type]
    assert min(likelier) >= -1e-5 and max(likelier) > 0.01  # equal where greed found the best
    assert decoded("--seed", "5") != decoded("--seed", "6")
    assert decoded("--temperature", "0.01") == greedy


def test_a_proxy_against_its_own_base_is_the_proxy_itself(rlhf: Rlhf) -> None:
    """pi_sft (pi / pi_sft)^1 = pi; and with weight 0 nothing but the base is left."""
    own = json.loads(rlhf("sample", "aaaa", "--json")[1])
    base = json.loads(rlhf("sample", "5555", "--json")[1])
    by_proxy, by_nothing = (
        json.loads(rlhf("sample", "5555", "--proxy", "aaaa", *more, "--json")[1])
        for more in ([], ["--proxy-weight", "0"])
    )
    for name in ("logp", "kl", "score"):
        expected = [row[name] for row in own]
        assert [row[name] for row in by_proxy] == pytest.approx(expected, abs=1e-4)  # fp32 sums
    assert [row["response"] for row in by_proxy] == [row["response"] for row in own]
    assert [row["response"] for row in by_nothing] == [row["response"] for row in base]
    assert [row["kl"] for row in by_nothing] == pytest.approx([0.0] * 4, abs=1e-4)  # fp32 sums
    assert [row["score"] for row in base] == [None] * 4


def test_a_page_of_responses_shows_prompts_numbers_and_means(rlhf: Rlhf, chain: Chain) -> None:
    code, out, err = rlhf("sample", "aaaa", "--prompts", "3")
    assert (code, err) == (0, "")
    for prompt in chain.corpus.heldout.prompts[:3]:
        assert prompt.strip().splitlines()[-3] in out
    assert out.count("log pi/sft") == 4 and "mean of 3: log pi -" in out
    code, out, _ = rlhf("sample", "aaaa", "--prompt", TURN)
    assert code == 0 and "gold" not in out and "reward" in out  # not a prompt of the corpus
    assert "next: rlhf credit aaaaaaaaaa" in out


SAMPLE, CREDIT = ["sample", "aaaa"], ["credit", "aaaa", "--prompt", TURN, "--text", "Four."]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sample", "nope"], "is called 'nope'"),
        (["sample", "7777"], "is a reward model, not a policy"),
        (["sample", "bbbb"], "is failed, not done"),
        ([*SAMPLE, "--decode", "beam", "--width", "0"], "--width"),
        ([*SAMPLE, "--width", "3"], "--width=3 has no effect with --decode=sample"),
        ([*SAMPLE, "--decode", "greedy", "--seed", "1"], "--seed=1 has no effect"),
        ([*SAMPLE, "--decode", "nope"], "choose one of sample, greedy, beam"),
        ([*SAMPLE, "--temperature", "0"], "--temperature=0 is not allowed"),
        ([*SAMPLE, "--temperature", "nan"], "--temperature=nan is not allowed"),
        ([*SAMPLE, "--prompts", "0"], "--prompts"),
        ([*SAMPLE, "--prompt", ""], "--prompt is empty"),
        ([*SAMPLE, "--prompt", "x y " * 200], "more than the data.max_prompt_tokens=160"),
        ([*SAMPLE, "--proxy-weight", "2"], "--proxy-weight=2.0 has no effect without --proxy"),
        ([*SAMPLE, "--proxy", "5555"], "name its reference: --proxy-ref=RUN"),
        ([*SAMPLE, "--proxy", "aaaa", "--decode", "beam"], "leave --proxy out"),
        ([*SAMPLE, "--proxy", "aaaa", "--proxy-ref", "STRANGER"], "different tokenizers"),
        (["credit", "nope", "--text", "x"], "is called 'nope'"),
        (["credit", "aaaa", "--text", ""], "--text is empty"),
        (["credit", "aaaa"], "--text"),
        (["credit", "5555", *CREDIT[2:]], "name what it is compared with: --ref=RUN"),
        ([*CREDIT[:-1], "far too long " * 200], "tokens and rl/mine-s1-aaaaaaaaaa reads 256"),
        ([*CREDIT, "--beta", "0"], "--beta=0 is not allowed"),
        ([*CREDIT, "--beta", "nan"], "--beta=nan is not allowed"),
        ([*CREDIT, "--ref", "7777"], "is a reward model, not a policy"),
        ([*CREDIT, "--ref", "STRANGER"], "different tokenizers"),
        ([*CREDIT, "--out", "/dev/null/here"], "cannot write"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    rlhf: Rlhf, chain: Chain, tmp_path: Path, words: list[str], says: str
) -> None:
    stranger = str(chain.runs / "stranger")
    code, out, err = rlhf(*(stranger if word == "STRANGER" else word for word in words))
    assert code == 2, out
    assert says in err and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
