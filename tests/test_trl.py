"""The same numbers go through TRL's trainers and through ours: two implementations by different people.

TRL is not needed to use this project, and these tests are skipped without it: `pip install -e .[bench]`.
They were written against TRL 1.16. Its losses live inside trainers, so each is called on an object that
was never initialised, given the few attributes it reads and, in place of a model, the log-probabilities
that a case holds. Where TRL does something else on purpose, the test says what and compares that too.

That version has no trainer for XPO, for Nash-MD, for SPIN or for SPPO with soft win rates.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from rlhf_cli.core.algorithm import Sampling, Targets
from rlhf_cli.core.rollout import Forward
from tests.algos.cases import Case, case, judge
from tests.algos.discovery import tuned

EXACT = 1e-11
"""Two float64 routes to one number."""

SINGLE = 2e-6
"""Where TRL computes in float32: relative to numbers of size 1."""

PAIR = Sampling(dataset=2)


def alone() -> Any:
    """An accelerator of one process."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
        is_main_process=False,
        gather=lambda x: x,
        reduce=lambda x, **_: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda x: x,
    )


class Idle(torch.nn.Identity):
    """Stands where a trainer wants a model, and is never run."""

    is_gradient_checkpointing = False


def bare(trainer: type, **known: Any) -> Any:
    """A trainer that was never initialised; what it asks beyond `known` is None."""

    class Bare(trainer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(known)

        def __getattr__(self, word: str) -> None:
            return None

    made = Bare()
    made.model = Idle()
    made.accelerator = alone()
    made._metrics = defaultdict(lambda: defaultdict(list))
    made._total_train_tokens, made._tp_size = 0, 1
    return made


def told(logp: Tensor) -> Any:
    """A model that says these log-probabilities [N,T] of its tokens, whatever it is asked."""
    zeros = torch.zeros_like(logp)
    return lambda **_: SimpleNamespace(
        log_probs=logp, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
    )


def rows(x: Tensor, places: list[int]) -> Tensor:
    """[P,G,...] -> [N,...]: all responses of the first place, then all of the second."""
    return torch.cat([x[:, g] for g in places])


def with_prompt(mask: Tensor) -> dict[str, Tensor]:
    """[N,T] masks as the inputs of sequences that start with one token of prompt."""
    whole = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    return {
        "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
    }


def slope_of(loss: Tensor, one: Case) -> Tensor:
    """[P,G,T] d loss / d log pi."""
    return torch.autograd.grad(loss, one.now.logp)[0]


def same(name: str, one: Case, theirs: Tensor, tolerance: float = EXACT, **settings: Any) -> None:
    """Our loss and its gradient are theirs."""
    ours = judge(tuned(name, **settings), one)
    torch.testing.assert_close(ours.loss, theirs.detach().double(), atol=tolerance, rtol=tolerance)
    slope = slope_of(theirs, one)
    torch.testing.assert_close(ours.d_logp, slope.double(), atol=tolerance, rtol=tolerance)
    assert slope.abs().max() > 1e-3


# --- DPO and IPO


def trl_dpo(one: Case, kind: str, beta: float, noise: float = 0.0) -> Tensor:
    """TRL's DPOTrainer on the pairs of a case."""
    from trl import DPOTrainer

    trainer = bare(
        DPOTrainer,
        beta=beta,
        label_smoothing=noise,
        loss_types=[kind],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
    )
    assert one.rollout.logp_ref is not None
    better, worse = (one.rollout.logp_ref * one.rollout.mask).sum(-1).unbind(1)
    inputs = {
        **with_prompt(rows(one.rollout.mask, [0, 1])),
        "ref_chosen_logps": better,
        "ref_rejected_logps": worse,
    }
    model = told(rows(one.now.logp * one.rollout.mask, [0, 1]))
    loss: Tensor = trainer._compute_loss(model, inputs, False)
    return loss


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("dpo", "sigmoid", {}),
        ("dpo", "robust", {"noise": 0.2, "robust": True}),
        ("ipo", "ipo", {"ipo_norm": "mean"}),
    ],
)
def test_dpo_ipo_and_robust_dpo(name: str, kind: str, settings: dict[str, Any], seed: int) -> None:
    one = case(seed, spread=0.5, sampling=PAIR)
    theirs = trl_dpo(one, kind, 0.3, settings.get("noise", 0.0))
    same(name, one, theirs, beta=0.3, **settings)


def test_ipo_as_its_paper_prints_it_is_not_what_trl_does() -> None:
    """TRL averages log-ratios over tokens, as IPO's authors told it; a sum is longer responses' tau."""
    one = case(1, spread=0.5, sampling=PAIR)
    ours = judge(tuned("ipo", beta=0.3, ipo_norm="sum"), one)
    assert (ours.d_logp - slope_of(trl_dpo(one, "ipo", 0.3), one)).abs().max() > 0.1
    single = case(1, tokens=1, spread=0.5, sampling=PAIR)
    same("ipo", single, trl_dpo(single, "ipo", 0.3), beta=0.3, ipo_norm="sum")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_conservative_dpo(seed: int) -> None:
    """`sigmoid` no longer smooths labels in TRL; `aot` does, and is DPO where there is one pair to sort."""
    one = case(seed, prompts=1, spread=0.5, sampling=PAIR)
    same("dpo", one, trl_dpo(one, "aot", 0.3, noise=0.1), beta=0.3, noise=0.1)


# --- KTO


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_kto(seed: int) -> None:
    """One sampling policy on both sides: TRL takes z0 from the policy in training, we from the rollout's."""
    from trl import KTOTrainer

    one = case(seed, spread=0.5, sampling=Sampling(dataset=2, mismatch=1))
    rollout = one.rollout
    assert rollout.logp_ref is not None
    one = one.with_rollout(logp_old=one.now.logp.detach())
    trainer = bare(
        KTOTrainer,
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.33,
        undesirable_weight=0.75,
    )
    ref = rows((rollout.logp_ref * rollout.mask).sum(-1), [0, 1, 2])
    matched, other = with_prompt(rows(rollout.mask, [0, 1])), with_prompt(rollout.mask[:, 2])
    inputs = {
        **matched,
        **{f"KL_{word}": x for word, x in other.items()},
        "label": torch.tensor([True] * 4 + [False] * 4),
        "ref_logps": ref[:8],
        "ref_KL_logps": ref[8:],
    }
    logp = rows(one.now.logp * rollout.mask, [0, 1, 2])
    # The mismatched responses are asked for first.
    answers = iter([told(logp[8:]), told(logp[:8])])
    theirs = trainer._compute_loss(lambda **asked: next(answers)(**asked), inputs, False)
    same("kto", one, theirs, beta=0.3, desirable=1.33, undesirable=0.75)


# --- SimPO and ORPO


def means(one: Case) -> tuple[Tensor, Tensor]:
    """[P] mean log-probability of the preferred response and of the other."""
    mask = one.rollout.mask
    better, worse = ((one.now.logp * mask).sum(-1) / mask.sum(-1)).unbind(1)
    return better, worse


def test_simpo() -> None:
    """TRL has SimPO as a loss of its trainer for CPO, there with CPO's alpha at 0."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = bare(
        cpo.CPOTrainer,
        loss_type="simpo",
        beta=2.5,
        simpo_gamma=1.375,
        alpha=0.0,
        label_smoothing=0.0,
    )
    one = case(1, spread=0.5, sampling=PAIR)
    theirs = trainer.cpo_loss(*means(one))[0].mean()
    same("simpo", one, theirs, beta=2.5, gamma=1.375)


def orpo(prompt: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TRL's loss, ours and both gradients in the logits, on 2 prompts of `prompt` tokens.

    lengths: of the two preferred responses and of the two others.
    """
    module = pytest.importorskip("trl.experimental.orpo")
    random = torch.Generator().manual_seed(1)
    size, vocab = prompt + max(lengths), 7
    ids = torch.randint(vocab, (4, size), generator=random)
    logits = torch.randn(4, size, vocab, generator=random, dtype=torch.float64).requires_grad_()
    place = torch.arange(size)
    attention = (place < prompt + torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill((place < prompt) | (attention == 0), -100)
    batch = {
        "concatenated_input_ids": ids,
        "concatenated_attention_mask": attention,
        "concatenated_labels": labels,
    }
    trainer = bare(module.ORPOTrainer, beta=0.7, concatenated_inputs=lambda *_, **__: batch)
    theirs, _ = trainer.get_batch_loss_metrics(
        lambda *_, **__: SimpleNamespace(logits=logits), {"chosen_labels": labels[:2]}
    )

    mask = (labels[:, prompt:] != -100).double()
    logp = logits.log_softmax(-1)[:, prompt - 1 : -1].gather(-1, ids[:, prompt:, None]).squeeze(-1)
    one = case(1, prompts=2, tokens=max(lengths), sampling=PAIR)
    paired = [x.view(2, 2, -1).transpose(0, 1) for x in (logp * mask, mask)]
    terms = tuned("orpo", lam=0.7).loss(
        Forward(paired[0]), replace(one.rollout, mask=paired[1]), Targets()
    )
    ours = sum(term.mean() for term in terms.values())
    assert isinstance(ours, Tensor)
    slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (theirs, ours)]
    return theirs.detach().double(), ours.detach(), *slopes


def test_orpo() -> None:
    """TRL computes the odds in float32."""
    theirs, ours, slope, expected = orpo(prompt=1, lengths=[4, 4, 2, 5])
    torch.testing.assert_close(ours, theirs, atol=SINGLE, rtol=SINGLE)
    torch.testing.assert_close(slope, expected, atol=SINGLE, rtol=SINGLE)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize(("prompt", "lengths"), [(3, [4, 4, 2, 5]), (1, [4, 2, 2, 5])])
def test_orpo_learns_prompts_and_weighs_long_responses_more_in_trl(
    prompt: int, lengths: list[int]
) -> None:
    """Its fine-tuning term is the mean over all tokens of the batch; the paper's is over a response's."""
    theirs, ours, slope, expected = orpo(prompt, lengths)
    assert abs(theirs - ours) > 1e-2 and (slope - expected).abs().max() > 1e-3
    assert (expected[:, : prompt - 1] == 0).all()
    assert (slope[:2, : prompt - 1] != 0).all()


# --- advantages

SCORES = [[0.8, 0.2, 0.5, 0.9], [1.0, -2.0, 0.25, 0.25], [0.3, 0.3, 0.3, 0.3]]


def trl_advantages(trainer: type, one: Case, **settings: Any) -> Tensor:
    """[P,G] what a trainer of TRL makes of the scores and log-probabilities of a case."""
    rollout = one.rollout
    assert rollout.score is not None and rollout.logp_ref is not None
    prompts, group, _ = rollout.mask.shape
    lengths = [int(n) for n in rollout.mask.sum(-1).flatten()]
    said = {"policy": rollout.logp_old.flatten(0, 1), "ref": rollout.logp_ref.flatten(0, 1)}
    policy, ref = Idle(), Idle()
    asked, drawn, texts = [[1]] * len(lengths), [[1] * n for n in lengths], [""] * len(lengths)
    generated: Any = (asked, drawn, texts)
    if trainer.__name__ == "GRPOTrainer":  # which knows tools and images too
        generated = (asked, drawn, None, texts, None, {}, None, None)
    made = bare(
        trainer,
        num_generations=group,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["score"],
        reward_funcs=[None],
        multi_objective_aggregation="sum_then_normalize",
        num_iterations=1,
        loss_type="grpo",
        importance_sampling_level="token",
        args=SimpleNamespace(
            per_device_train_batch_size=prompts * group,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            report_to=[],
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        processing_class=SimpleNamespace(
            pad_token_id=0, batch_decode=lambda ids, **_: [""] * len(ids)
        ),
        _logs=defaultdict(lambda: deque(maxlen=99), rewards=defaultdict(list), extra={}),
        _pending_metrics=defaultdict(list),
        _pending_extra_logs={},
        _calculate_rewards=lambda *_: rollout.score.reshape(-1, 1).clone(),
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (
            said["policy" if model is policy else "ref"],
            None,
            None,
        ),
        _generate=lambda _: generated,
        **settings,
    )
    made.model, made.ref_model = policy, ref
    inputs = [{"prompt": "x"} for _ in lengths]
    advantages: Tensor = made._generate_and_score_completions(inputs)["advantages"]
    return advantages.view(prompts, group)


def scored() -> Case:
    """Three prompts with four responses of known scores."""
    return case(1, prompts=3, responses=4).with_rollout(
        score=torch.tensor(SCORES, dtype=torch.float64)
    )


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages(beta: float) -> None:
    from trl import RLOOTrainer

    one = scored()
    theirs = trl_advantages(RLOOTrainer, one, beta=beta, normalize_advantages=False)
    targets, _ = tuned("rloo", beta=beta, variant="paper").prepare(one.rollout, {})
    assert targets.advantage is not None
    torch.testing.assert_close(targets.advantage, theirs, atol=EXACT, rtol=EXACT)
    if beta == 0:
        expected = torch.tensor([0.266667, -0.533333, -0.133333, 0.4], dtype=torch.float64)
        torch.testing.assert_close(theirs[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "scale"), [("grpo", "group"), ("dr_grpo", "none")])
def test_grpo_advantages(name: str, scale: str) -> None:
    """TRL divides by the sample standard deviation plus 1e-4, our `scale: sample`, counting in float32."""
    from trl import GRPOTrainer

    one = scored()
    theirs = trl_advantages(GRPOTrainer, one, beta=0.0, scale_rewards=scale)
    settings = {"scale": "sample", "std_eps": 1e-4} if name == "grpo" else {"scale": "none"}
    targets, _ = tuned(name, **settings).prepare(one.rollout, {})
    assert targets.advantage is not None
    torch.testing.assert_close(targets.advantage, theirs, atol=SINGLE, rtol=SINGLE)
