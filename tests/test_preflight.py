"""Known failures of RLHF runs, each planted, and what catches it before the first optimiser step.

| known failure | caught by | tested in |
|---|---|---|
| a negative KL: the reference is not the policy's start | KL of 0 at step 0; digest of the parent | here |
| a KL unlike the one that is trained | temperature and masks shared by both | here, test_services |
| a frontier of rows without a contract | the origin of every row | test_frontier, test_compare |
| the reward model's head is missing or renamed | its name must be in the file | here, test_engine |
| the reward model's head is another one than was trained | digest of the parent | here |
| a score that depends on its batch or padding | scored alone and together | test_reward_report, test_cards |
| padding that is the end token: never learns to stop | a padding token of its own | here |
| a tokenizer without an end token | refused when it is loaded | here, test_tokens |
| two start tokens, by a chat template | one in every prompt | here, test_tokens |
| drawn otherwise than trained: temperature, top-p, stale weights, padding | random numbers of tokens | here |
| totals that do not divide | refused with the arithmetic | test_config, test_plan |
| accumulation changes the loss: 1x8 is not 8x1 | denominators of the minibatch | test_engine, test_world |
| out of memory late in a run | the longest micro-batch goes first | test_memory |
| ZeRO 3 has saved empty weights | the folder is loaded again and compared | here |
| the same seed, another run | two runs are equal, bit for bit | here, test_resume |
| a resumed run is a new one in W&B | the key is its id | test_track |
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine import checkpoint, rollout, sampler
from rlhf_cli.engine.learner import Learner
from rlhf_cli.engine.sampler import Expert
from rlhf_cli.errors import UserError
from rlhf_cli.models.load import new_policy
from rlhf_cli.models.tokenizer import END, load_tokenizer, train_tokenizer
from rlhf_cli.models.tuning import Policy
from rlhf_cli.recipes import Model, Scratch, Tuning
from rlhf_cli.stages.chain import Chain
from rlhf_cli.stages.feed import Feed
from rlhf_cli.store.files import sha256
from rlhf_cli.store.run import Run
from tests.conftest import ROOT
from tests.test_chain import TINY, exit_code

WORDS = ["train", *TINY, "track=off", "algo.update.episodes=32", "eval.points=1"]
WEIGHTS = "checkpoints/final/model.safetensors"
Fault = Callable[..., None]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an SFT policy and a reward model."""
    store = tmp_path_factory.mktemp("preflight") / "runs"
    assert exit_code(*WORDS, "stage=reward", f"paths.runs={store}") == 0
    return store


@pytest.fixture
def store(parents: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return shutil.copytree(parents, tmp_path / "runs")


def parent(store: Path, stage: str) -> Run:
    (path,) = (store / stage).iterdir()
    return Run(path)


class Refusal:
    """Trains, and gives the sentence by which that was refused before the first step."""

    def __init__(self, store: Path, said: pytest.CaptureFixture[str], steps: list[int]) -> None:
        self.store, self.said, self.steps = store, said, steps

    def __call__(self, *words: str) -> str:
        self.said.readouterr()
        assert exit_code(*WORDS, f"paths.runs={self.store}", *words) == 2
        assert not self.steps
        return self.said.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


@pytest.fixture
def refusal(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refusal:
    """See the class."""
    steps: list[int] = []
    step = Learner.step

    def counted(self: Learner, *given: Any, **more: Any) -> dict[str, float]:
        steps.append(self.step_index)
        return step(self, *given, **more)

    monkeypatch.setattr(Learner, "step", counted)
    return Refusal(store, capsys, steps)


def perturbed(model: Any, by: float = 0.3) -> Any:
    """The model with other weights."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + by)
    return model


# --- the reference


def test_a_reference_with_other_weights_shows_a_kl_and_ends_the_run(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    load, loaded = Chain.policy, list[str]()

    def second_is_another(self: Chain, role: str = "sft") -> Any:
        loaded.append(role)
        model = load(self, role)
        return perturbed(model) if len(loaded) == 2 else model

    monkeypatch.setattr(Chain, "policy", second_is_another)
    said = refusal()
    assert loaded == ["sft", "sft"]
    assert said.startswith("the KL to the SFT policy is ")
    assert "before the first update, but must be 0 (to 0.0001)" in said
    assert "look for a reference that is not the SFT checkpoint" in said
    fault(
        "the reference has other weights than the policy starts from",
        "the KL before the first step is not 0: the run ends with one sentence that names the causes",
    )


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_parent_whose_weights_are_not_those_it_was_finished_with_is_not_used(
    refusal: Refusal, store: Path, stage: str, fault: Fault
) -> None:
    run = parent(store, stage)
    tensors = load_file(run.path / WEIGHTS)
    name = "score.weight" if stage == "reward" else min(tensors)
    tensors[name] = torch.randn_like(tensors[name])
    save_file(tensors, run.path / WEIGHTS, {"format": "pt"})
    said = refusal()
    assert str(run.path / WEIGHTS) in said and "delete" in said
    what = "the head of a reward model is drawn anew" if stage == "reward" else "a tensor changes"
    fault(
        f"{what} in the finished folder of a parent ({stage})",
        "no run starts from it: its digest is not that of the manifest",
    )


# --- the reward model


def kept_as(run: Run, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Changes the weights of a finished run, and its manifest with them, as if it had saved them so."""
    save_file(change(load_file(run.path / WEIGHTS)), run.path / WEIGHTS, {"format": "pt"})
    manifest = run.manifest()
    manifest["outputs"][WEIGHTS] = sha256(run.path / WEIGHTS)
    run.manifest_path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("renamed", [True, False], ids=["renamed", "missing"])
def test_a_reward_model_that_was_saved_without_its_head_would_score_at_random(
    refusal: Refusal, store: Path, renamed: bool, fault: Fault
) -> None:
    run = parent(store, "reward")

    def headless(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors.pop("score.weight")
        return {**tensors, "v_head.weight": head} if renamed else tensors

    kept_as(run, headless)
    assert refusal() == (
        f"{run.final}: the reward model lacks score.weight; it would score at random, so train it again"
    )
    fault(
        f"the head of a saved reward model is {'called otherwise' if renamed else 'not in the file'}",
        "refused with one sentence; it would have scored at random",
    )


# --- tokens


def pretrained(folder: Path, pad: str | None, unk: str | None = None) -> Any:
    """A tokenizer in a folder: its padding token, and its unknown token if it has one."""
    tokenizer: Any = train_tokenizer(["the cat sat on the mat"], 300, 64)
    if unk:
        tokenizer.add_special_tokens({"unk_token": unk})
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("pad", [END, None], ids=["the end token", "missing"])
@pytest.mark.parametrize("unk", [None, "<unk>"])
def test_padding_that_is_the_end_token_or_missing_gets_a_token_of_its_own(
    tmp_path: Path, pad: str | None, unk: str | None, fault: Fault
) -> None:
    pretrained(tmp_path, pad, unk)
    tokenizer: Any = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token == (unk or "<|pad|>")
    ids = Encoder(tokenizer, 16, 16, lambda _: None).response(" the cat")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in ids
    fault(
        f"a tokenizer {'whose padding is its end token' if pad else 'without a padding token'}"
        f"{' that has an unknown token' if unk else ''}",
        "padding gets another token, and every answer still ends with the end token",
    )


def test_an_end_token_that_is_only_padding_to_an_unknown_token_is_refused(tmp_path: Path) -> None:
    """Where unknown, end and padding are one and the same, a new token pads."""
    tokenizer: Any = train_tokenizer(["the cat sat on the mat"], 300, 64)
    tokenizer.unk_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(tmp_path)
    again: Any = load_tokenizer(tmp_path)
    assert again.unk_token_id == again.eos_token_id != again.pad_token_id


def test_a_policy_whose_tokenizer_lost_its_end_token_is_not_trained(
    refusal: Refusal, store: Path, fault: Fault
) -> None:
    run = parent(store, "sft")
    file = run.final / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    manifest = run.manifest()
    manifest["outputs"]["checkpoints/final/tokenizer_config.json"] = sha256(file)
    run.manifest_path.write_text(json.dumps(manifest))
    assert refusal() == (
        f"model.name={run.final}: its tokenizer has no end token, so a policy could never stop; set"
        " eos_token in its tokenizer_config.json."
    )
    fault(
        "the end token is missing in the tokenizer of a finished policy",
        "refused with one sentence; the policy could never have stopped",
    )


def test_a_chat_template_that_writes_the_start_token_gives_one_and_not_two(fault: Fault) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = train_tokenizer(["the cat sat on the mat"], 300, 64)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert tokenizer(said)["input_ids"][:2] == [start, start]  # what a plain call would make of it
    ids = Encoder(tokenizer, 16, 16, lambda _: None).prompt(said)
    assert ids.count(start) == 1 and ids[0] == start
    fault(
        "a chat template writes the start token that the tokenizer adds too",
        "every prompt has exactly one",
    )


# --- what is drawn and what is trained

OTHERWISE = "responses are not drawn from the policy that is trained: the random numbers behind"
LATER = "responses are not learned from as they were drawn: the log-probabilities of their tokens"


def top_p(share: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    whole = sampler.inverse_cdf

    def cut(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        chances, order = logits.float().softmax(-1).sort(-1, descending=True)
        kept = torch.zeros_like(chances, dtype=torch.bool)
        kept.scatter_(-1, order, chances.cumsum(-1) - chances < share)
        return whole(logits.masked_fill(~kept, -torch.inf), uniform)

    return cut


def heated(
    logits: Tensor, uniform: Tensor, whole: Any = sampler.inverse_cdf
) -> tuple[Tensor, Tensor]:
    picked: tuple[Tensor, Tensor] = whole(logits / 0.9, uniform)
    return picked


@pytest.mark.parametrize(
    ("what", "picks"),
    [("a cut by top-p of 0.95", top_p(0.95)), ("a temperature of 0.9 for 1", heated)],
)
def test_responses_that_are_drawn_otherwise_than_trained_are_found_by_their_random_numbers(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, what: str, picks: Any, fault: Fault
) -> None:
    monkeypatch.setattr(sampler, "inverse_cdf", picks)
    said = refusal()
    assert said.startswith(OTHERWISE) and "rounding explains at most 1e-05" in said
    assert said.endswith("set launch.attention=eager, or model.precision=fp32.")
    fault(
        f"responses are drawn with {what}, unknown to what learns from them",
        "the tokens do not fit their random numbers: the run ends with one sentence before its first step",
    )


def test_a_sampler_with_stale_weights_or_that_reads_padding_is_found(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    draw, reader = sampler.draw, sampler.reader

    def stale(experts: list[Expert], *given: Any, **more: Any) -> sampler.Draw:
        model: Policy = perturbed(copy.deepcopy(experts[0].model), 0.05)
        return draw([Expert(model)], *given, **more)

    def blind(model: Policy, ids: Tensor, real: Tensor, *given: Any) -> Any:
        return reader(model, ids, torch.ones_like(real), *given)

    monkeypatch.setattr(rollout, "draw", stale)
    assert refusal().startswith(OTHERWISE)
    monkeypatch.setattr(rollout, "draw", draw)
    monkeypatch.setattr(sampler, "reader", blind)
    assert refusal().startswith(OTHERWISE)
    fault(
        "the sampler has older weights than the learner, or reads the padding before a prompt",
        "the tokens do not fit their random numbers: the run ends with one sentence before its first step",
    )


def test_a_learner_at_another_temperature_than_the_sampler_is_found(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    from rlhf_cli.engine import agreement

    check = agreement.check_drawing

    def told_otherwise(collector: Any, actor: Any, asked: Any) -> None:
        collector = replace(collector, drawing=replace(collector.drawing, temperature=0.9))
        check(collector, actor, asked)

    monkeypatch.setattr("rlhf_cli.stages.rl.check_drawing", told_otherwise)
    assert refusal().startswith(OTHERWISE)
    monkeypatch.setattr(agreement, "MISSED", dict.fromkeys(agreement.MISSED, 1.0))
    assert refusal().startswith(LATER)
    fault(
        "the sampler's temperature is 0.9 and the learner's 1",
        "both the random numbers and the log-probabilities tell: the run ends with one sentence before its"
        " first step",
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_run_is_let_through_at_any_temperature(
    parents: Path, tmp_path: Path, precision: str
) -> None:
    store = tmp_path / "runs"
    if precision == "fp32":
        shutil.copytree(parents, store)
    words = [f"paths.runs={store}", f"model.precision={precision}", "rollout.temperature=0.7"]
    assert exit_code(*WORDS, *words, "algo.update.episodes=16") == 0


# --- the end


def empty(model: Any) -> None:
    """As ZeRO 3 leaves a weight in each process when nobody has gathered it."""
    model.get_input_embeddings().weight.data = torch.empty(0)


def not_a_number(model: Any) -> None:
    model.get_input_embeddings().weight.data[3, 1] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "what"), [(empty, "is empty"), (not_a_number, "holds what is no number")]
)
def test_weights_that_are_not_there_are_not_saved_as_a_finished_model(
    tmp_path: Path, spoil: Callable[[Any], None], what: str, fault: Fault
) -> None:
    tokenizer = train_tokenizer(["the cat"], 300, 64)
    model = new_policy(tiny(), tokenizer)
    spoil(model)
    with pytest.raises(UserError) as error:
        checkpoint.save_final(tmp_path / "final", model, tokenizer, "")
    assert str(error.value) == (
        f"the finished model cannot be saved whole (gpt_neox.embed_in.weight {what}), so the run is not"
        " done; give the same command again to save it anew, with launch.zero=2 if it was 3."
    )
    assert list(tmp_path.iterdir()) == []
    fault(
        f"a tensor of the finished model {what}",
        "no final folder is made, and the run does not say that it is done",
        lost="nothing: the same command goes on from the last checkpoint",
    )


def test_a_file_that_gives_back_other_weights_than_the_model_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["the cat"], 300, 64)
    model = new_policy(tiny(), tokenizer)
    save = type(model).save_pretrained

    def half(self: Any, folder: Path, **more: Any) -> None:
        save(self, folder, **more)
        tensors = load_file(Path(folder) / "model.safetensors")
        name = "embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight"
        tensors[name] /= 2
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", half)
    with pytest.raises(UserError, match=r"\(\w+\.weight is another in the file\)"):
        checkpoint.save_final(tmp_path / "final", model, tokenizer, "")


def tiny() -> Model:
    return Model(
        "tiny", "nano", Scratch(1, 16, 2, 300, 64, 1), None, None, "fp32", Tuning(None, None)
    )


# --- twice the same


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    parents: Path, tmp_path: Path
) -> None:
    found = {}
    for place, seed in (("one", 1), ("two", 1), ("three", 2)):
        store = shutil.copytree(parents, tmp_path / place)
        assert exit_code(*WORDS, f"paths.runs={store}", f"seed={seed}") == 0
        run = parent(store, "rl")
        found[place] = (
            sha256(run.path / WEIGHTS),
            sorted(p.read_text() for p in run.samples.iterdir()),
        )
    assert found["one"] == found["two"]
    assert found["one"][0] != found["three"][0] and found["one"][1] != found["three"][1]


def test_where_the_table_above_points_to_there_are_tests() -> None:
    rows = [line.split("|")[3] for line in (__doc__ or "").splitlines()[4:] if line[:1] == "|"]
    named = {word.strip() for row in rows for word in row.split(",")} - {"here"}
    assert len(rows) == 16 and named
    assert [name for name in sorted(named) if not (ROOT / "tests" / f"{name}.py").exists()] == []


def test_an_algorithm_that_only_reads_the_dataset_is_checked_as_well(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its evaluations draw, and these are what its frontier is made of."""
    monkeypatch.setattr(sampler, "inverse_cdf", top_p(0.95))
    asked: list[int] = []
    batch = Feed.batch
    monkeypatch.setattr(Feed, "batch", lambda self, n, at: asked.append(n) or batch(self, n, at))
    assert refusal("algo=dpo").startswith(OTHERWISE) and asked
