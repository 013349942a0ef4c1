"""The bench measures what it says: its arithmetic, its bare loop, its races and what it writes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedModel,
)

from benchmarks import bare, comparisons, floor, table
from benchmarks.race import Contestant, Result, Sample, race, spread
from rlhf_cli.config import compose
from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.plan import plan

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
EACH, REPLY = 2, 5


def test_floor_by_hand() -> None:
    """Two layers of width 4, 10 tokens to choose from; prompts of 3 and 1 tokens, 2 responses of 2."""
    shape = floor.Shape(layers=2, width=4, vocabulary=10)
    token = 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) * 2  # qkv, out, up, down; both layers
    pair = 2 * (4 + 4) * 2  # a product of query and key, a weighted value; both layers
    head = 2 * 4 * 10
    # Read when drawing: the prompt and the first token of each response.
    tokens = (3 + 2) + (1 + 2)
    pairs = (1 + 2 + 3) + 2 * 4 + 1 + 2 * 2
    drawing = tokens * token + pairs * pair + 2 * 2 * 2 * head
    scored = (3 + 4 + 1 + 4) * token + ((6 + 2 * (4 + 5)) + (1 + 2 * (2 + 3))) * pair
    assert floor.step(shape, [3, 1], each=2, reply=2) == {
        "drawing": drawing,
        "reference": drawing,
        "reward": scored,
        "forward": drawing,
        "backward": 2 * drawing,
    }
    # Apart: four prompts of 3 tokens with a response each.
    apart = 4 * (3 + 1) * token + 4 * (6 + 4) * pair + 4 * 2 * head
    assert floor.step(shape, [3, 1], each=2, reply=2, apart=True)["reference"] == apart


def test_rate_is_of_the_best_size() -> None:
    once = 2 * 100 * 10 * 10
    done = round(floor.WORK / once) * once
    assert floor.rate({"100 x 10 x 10": 2.0, "200 x 10 x 10": 1.0}) == pytest.approx(done)


def config() -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=40, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, tie_word_embeddings=False, num_labels=1,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip


@pytest.fixture
def whole() -> list[PreTrainedModel]:
    """Policy, reference and reward model."""
    torch.manual_seed(0)
    kinds = (GPTNeoXForCausalLM, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification)
    return [kind(config()).eval() for kind in kinds]


def decoders(whole: list[PreTrainedModel]) -> bare.Models:
    policy, ref, scorer = whole
    return bare.Models(
        bare.Decoder(policy.gpt_neox), policy.get_output_embeddings().weight,
        bare.Decoder(ref.gpt_neox), ref.get_output_embeddings().weight,
        bare.Decoder(scorer.gpt_neox), scorer.score.weight, (0.1, 1.7),
    )  # fmt: skip


def alone(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """[T] log-probabilities by transformers' own forward pass of one row, nothing padded or shared."""
    ids = torch.tensor([[*prompt, *response]])
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


def rows(model: PreTrainedModel, responses: Tensor) -> Tensor:
    return torch.stack(
        [
            torch.stack([alone(model, prompt, one.tolist()) for one in group])
            for prompt, group in zip(PROMPTS, responses, strict=True)
        ]
    )


def test_bare_draws_by_inverse_cdf(whole: list[PreTrainedModel]) -> None:
    models, uniform = decoders(whole), torch.rand(len(PROMPTS), EACH, REPLY)
    drawn = bare.draw(models.policy, models.policy_head, PROMPTS, uniform)
    with torch.no_grad():
        for p, prompt in enumerate(PROMPTS):
            for g in range(EACH):
                ids = list(prompt)
                for t in range(REPLY):
                    logits = whole[0](input_ids=torch.tensor([ids])).logits[0, -1]
                    cumulative = logits.softmax(-1).cumsum(-1)
                    ids.append(int((cumulative <= uniform[p, g, t] * cumulative[-1]).sum()))
                assert drawn[p, g].tolist() == ids[len(prompt) :]


def test_bare_says_what_transformers_says(whole: list[PreTrainedModel]) -> None:
    models = decoders(whole)
    responses = torch.randint(2, 40, (len(PROMPTS), EACH, REPLY))
    packed = bare.Packed.of(PROMPTS, responses)
    with torch.no_grad():
        said = packed.log_probs(models.policy, models.policy_head)
        assert (said - rows(whole[0], responses)).abs().max() < 2e-5
        scores = packed.scores(models.reward, models.reward_head)
        for p, prompt in enumerate(PROMPTS):
            for g in range(EACH):
                ids = torch.tensor([[*prompt, *responses[p, g].tolist()]])
                states = whole[2].gpt_neox(input_ids=ids).last_hidden_state
                assert torch.allclose(whole[2].score(states[0, -1])[0], scores[p, g], atol=2e-5)


@pytest.mark.parametrize("algo", bare.LOSSES)
def test_bare_learns_as_ours_does(whole: list[PreTrainedModel], algo: str) -> None:
    """Its loss and its gradient are those of the algorithm on transformers' log-probabilities."""
    models, policy = decoders(whole), whole[0]
    responses = torch.randint(2, 40, (len(PROMPTS), EACH, REPLY))
    ours = plan(compose([f"algo={algo}", "data=hh"])).recipe.algo
    loss = bare.gradient(models, algo, PROMPTS, responses, ours.beta)  # type: ignore[attr-defined]
    found = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert len(found) == len(list(policy.parameters()))
    policy.zero_grad()

    logp = rows(policy, responses)
    packed = bare.Packed.of(PROMPTS, responses)
    with torch.no_grad():
        offset, scale = models.calibration
        score = (packed.scores(models.reward, models.reward_head) - offset) / scale
        ref = rows(whole[1], responses)
    mask = torch.ones(len(PROMPTS), EACH, REPLY)
    rollout = Rollout(
        tokens=responses, attention=mask.bool(), mask=mask, logp_old=logp.detach(), logp_ref=ref,
        score=score, coin=torch.rand(len(PROMPTS), EACH), source=Sampling(policy=EACH).sources,
        value_old=None,
    )  # fmt: skip
    targets, _ = ours.prepare(rollout, {})
    terms = ours.loss(Forward(logp=logp), rollout, targets)
    want = torch.stack(list(averages(terms, mask, denominators(mask)).values())).sum()
    want.backward()
    assert torch.allclose(loss, want.detach(), rtol=1e-5, atol=1e-6)
    size = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    apart = torch.stack(
        [(p.grad - g).norm() for p, g in zip(policy.parameters(), found, strict=True)]
    ).norm()
    assert size > 0 and apart / size < 1e-5


TOYS = """
def worker(turns, units):
    while True:
        with turns.turn(), turns.part("work"):
            for _ in range(units * 200_000):
                pass


def quitter(turns):
    with turns.turn():
        pass
    raise SystemExit("I give up")
"""


def test_race_tells_the_slow_from_the_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    heard: list[str] = []
    contestants = [
        Contestant(name, "toys:worker", {"units": units}, threads=1)
        for name, units in (("quick", 1), ("slow", 6))
    ]
    lost = Contestant("lost", "toys:quitter", {}, threads=1)
    quick, slow, gone = race([*contestants, lost], 3, tmp_path, heard.append)
    assert len(quick.samples) == len(slow.samples) == 3
    ratio, (low, high) = spread(
        [s.seconds for s in slow.samples], [s.seconds for s in quick.samples]
    )
    assert low <= ratio <= high and 2 < ratio < 20
    assert 0 < slow.parts["work"] <= slow.seconds
    assert gone.failed == "ended with code 1: I give up" and not gone.samples
    assert heard.count("quick") == 5


def test_a_race_that_is_told_to_end_takes_its_contestants_along(tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text(TOYS)
    code = (
        "from pathlib import Path\n"
        "from benchmarks.race import Contestant, race\n"
        "each = [Contestant(name, 'toys:worker', {'units': 9}) for name in ('one', 'other')]\n"
        "race(each, 10_000, Path(), lambda name: print(name, flush=True))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    racing = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    with racing as child:
        assert child.stdout is not None and child.stdout.readline()
        contestants = psutil.Process(child.pid).children()
        child.terminate()
        assert child.wait(30) == 143
    assert len(contestants) == 2 and not any(each.is_running() for each in contestants)


def result(name: str, *seconds: float, memory: float = 100.0) -> Result:
    return Result(name, [Sample(each, 0.0, memory, {"100 x 10 x 10": 1.0}) for each in seconds])


def test_ratios_are_what_goals_speak_of() -> None:
    ours, theirs = result("ours", 1.0, 1.2, 1.1), result("theirs", 3.3, 3.0, 4.4, memory=400.0)
    line = comparisons.quicker("step", "them", ours, theirs, ">= 2.5")
    assert line.ratio == pytest.approx(3.0) and line.met
    assert line.spread == pytest.approx((2.5, 4.0))
    line = comparisons.dearer("step", "them", theirs, ours, "<= 1.2")
    assert line.ratio == pytest.approx(3.0) and line.met is False
    line = comparisons.leaner("memory", "them", ours, theirs, "<= 0.5")
    assert line.ratio == pytest.approx(0.25) and line.met
    assert comparisons.quicker("step", "them", ours, None, "").note == comparisons.NO_TRL
    theirs.failed = "ended"
    assert comparisons.quicker("step", "them", ours, theirs, "").note == "theirs ended"


def test_every_line_is_there_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost is said, line by line."""
    online = comparisons.Online(2, 2, 5, {"rloo": ["rloo"]}, comparisons.Goals(trl=">= 2.5"))
    shape = floor.Shape(1, 4, 10)
    start = comparisons.Start("", "", shape, ["a"] * 4, [3, 4, 5, 6], {}, {})
    names = ("ours-rloo", "bare-rloo", "products")
    lines = online.lines(start, {name: result(name, 1.0, 2.0) for name in names})
    assert [line.against for line in lines if line.note == comparisons.NO_TRL] == ["TRL rloo"] * 2
    assert all(line.ratio is not None for line in lines if line.note != comparisons.NO_TRL)


def test_what_is_written(tmp_path: Path) -> None:
    lines = [
        table.Line("step", "TRL", "0.5 s", "1.5 s", 3.0, (2.5, 3.5), ">= 2.5", True),
        table.Line("step", "bare", "0.5 s", "0.25 s", 2.0, (1.9, 2.1), "<= 1.2", False),
        table.missing("SFT", "TRL", ">= 2", comparisons.NO_TRL),
    ]
    page = table.write(lines, {"online": [result("ours", 1.0)]}, tmp_path, "python -m benchmarks")
    words = page.read_text()
    assert "| step | TRL | 0.5 s | 1.5 s | 3.00 | 2.50 to 3.50 | >= 2.5 | yes |  |" in words
    assert "| <= 1.2 | **no** |" in words and "1 of 2 goals that were measured are met" in words
    assert f"| SFT | TRL |  |  |  |  | >= 2 |  | {comparisons.NO_TRL} |" in words
    whole = json.loads(page.with_suffix(".json").read_text())
    assert [each["met"] for each in whole["lines"]] == [True, False, None]
    assert whole["races"]["online"][0]["samples"][0]["seconds"] == 1.0
    assert {"processor", "cores", "memory_gb", "torch", "transformers", "commit"} <= whole.keys()
