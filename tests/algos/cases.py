"""Small random rollouts, and everything an algorithm says about one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_cli.core.algorithm import Algorithm, Sampling, Terms
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import PER_TOKEN, Forward, Rollout
from tests.algos.toys import leaf, tensor

VOCABULARY = 3
"""Tokens there are."""


@dataclass(frozen=True)
class Case:
    """A rollout and what the current weights say; `now` holds the leaves of the gradient."""

    rollout: Rollout
    now: Forward

    def take(self, prompts: Tensor) -> Case:
        """Some prompts only, with leaves of their own."""
        return Case(self.rollout.take(prompts), self.said(lambda x: x[prompts]))

    def said(self, change: Callable[[Tensor], Tensor]) -> Forward:
        """The forward with every tensor changed alike, as leaves."""
        return Forward(**{word: leaf(change(x)) for word, x in leaves(self.now).items()})

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor changed alike."""
        changed: dict[str, Any] = {
            f.name: change(x)
            for f in fields(self.rollout)
            if isinstance(x := getattr(self.rollout, f.name), Tensor)
        }
        return Case(replace(self.rollout, **changed), self.said(change))

    def with_rollout(self, **changes: object) -> Case:
        """The same forward, another rollout."""
        return replace(self, rollout=replace(self.rollout, **changes))  # type: ignore[arg-type]

    def with_columns(self, fill: Callable[[Tensor], Tensor]) -> Case:
        """Three more token columns with mask 0, everything else in them filled by `fill`."""

        def wider(x: Tensor) -> Tensor:
            return torch.cat([x.detach(), fill(pad(x.detach(), (0, 3))[..., -3:])], -1)

        def widened(x: Tensor) -> Tensor:
            if x.dim() == 4:  # [P,G,T,V]
                return wider(x.transpose(-1, -2)).transpose(-1, -2)
            return wider(x) if x.dim() == 3 else x

        rollout = replace(
            self.rollout,
            mask=pad(self.rollout.mask, (0, 3)),
            **{
                name: wider(value)
                for name in PER_TOKEN[1:]
                if (value := getattr(self.rollout, name)) is not None
            },
        )
        return Case(rollout, self.said(widened))


def case(
    seed: int,
    prompts: int = 4,
    responses: int = 2,
    tokens: int = 5,
    spread: float = 0.15,
    sampling: Sampling | None = None,
) -> Case:
    """Random numbers in the shape of a rollout; responses of 1 to `tokens` tokens.

    `spread` is the standard deviation, in nats per token, of log pi - log pi_old. Values are not 0
    on padding, as a critic's are not. `sampling`: where the responses came from; `responses` draws of
    the policy unless given.
    """
    sources = (sampling or Sampling(policy=responses)).sources
    random = torch.Generator().manual_seed(seed)
    responses = len(sources)
    shape = (prompts, responses, tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    length = torch.randint(1, tokens + 1, (prompts, responses, 1), generator=random)
    length[0, 0] = tokens
    mask = (torch.arange(tokens) < length).to(torch.float64)
    old = -normal(*shape).exp() * mask
    value = normal(*shape)
    ref = old + 0.2 * normal(*shape) * mask
    rollout = Rollout(
        tokens=torch.zeros(prompts, responses, 0),
        attention=torch.zeros(prompts, responses, 0),
        mask=mask,
        logp_old=old,
        logp_ref=ref,
        score=normal(prompts, responses),
        value_old=value,
        coin=torch.rand(prompts, responses, generator=random, dtype=torch.float64),
        source=sources,
    )
    logp = old + spread * normal(*shape) * mask
    now = Forward(leaf(logp), leaf(value + 2 * spread * normal(*shape)))
    # Drawn last, so that the numbers above are the same with and without them.
    rollout = replace(rollout, logp_guide=ref + 0.3 * normal(*shape) * mask)
    entropy, score = normal(*shape).exp(), normal(prompts, responses)
    now = replace(now, entropy=leaf(entropy), score=leaf(score))
    logps, logps_ref = (normal(*shape, VOCABULARY).log_softmax(-1) for _ in range(2))
    q = 2 * normal(*shape, VOCABULARY)
    every = {"logps": logps, "logps_ref": logps_ref, "q": q, "q_taken": q[..., 0]}
    return Case(rollout, replace(now, **{word: leaf(x) for word, x in every.items()}))


def dialogue(seed: int) -> Case:
    """A draw per prompt in turns that are paid one by one; what the other side says is masked."""
    one = case(seed, responses=1, tokens=9)
    said = tensor([1, 1, 0, 0, 1, 1, 0, 1, 1])
    ends = tensor([0, 1, 0, 0, 0, 1, 0, 0, 1])
    assert one.rollout.score is not None
    paid = one.rollout.score.unsqueeze(-1) * ends * torch.linspace(0.5, 1.5, 9).double()

    def silenced(x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[-1] == 9:
            return x * said
        return x

    silent = one.mapped(silenced)
    return silent.with_rollout(reward=paid * silent.rollout.mask)


def leaves(now: Forward) -> dict[str, Tensor]:
    """What the current weights say, by name."""
    return {f.name: x for f in fields(now) if (x := getattr(now, f.name)) is not None}


def twins(seed: int) -> Case:
    """Two draws of the policy per prompt; the first prompt got the same response twice."""
    return twinned(case(seed))


def twinned(one: Case) -> Case:
    """The case with the first prompt's second response, if there is one, made equal to its first."""

    def same(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[0, 1:2] = x[0, 0]
        return x

    return one.mapped(same)


@dataclass(frozen=True)
class Verdict:
    """All an algorithm says about a case; the gradients by name of the leaf."""

    terms: Terms
    watch: Terms
    loss: Tensor
    slopes: dict[str, Tensor]

    @property
    def d_logp(self) -> Tensor:
        """[P,G,T]."""
        return self.slopes["logp"]

    @property
    def d_value(self) -> Tensor:
        """[P,G,T], 0 without a critic."""
        return self.slopes.get("value", torch.zeros_like(self.d_logp))


def judge(algorithm: Algorithm, one: Case) -> Verdict:
    """Terms, watched terms, averaged loss and its gradients."""
    targets, _ = algorithm.prepare(one.rollout, {})
    terms = algorithm.loss(one.now, one.rollout, targets)
    watch = algorithm.watch(one.now, one.rollout, targets)
    return verdict(one, terms, watch)


def judge_side(algorithm: Algorithm, one: Case) -> Verdict:
    """The same of the second stream."""
    return verdict(one, algorithm.side_loss(one.now, one.rollout), {})


def verdict(one: Case, terms: Terms, watch: Terms) -> Verdict:
    """Averages the terms and differentiates them."""
    mask, known = one.rollout.mask, leaves(one.now)
    loss = torch.stack(list(averages(terms, mask, denominators(mask)).values())).sum()
    grads = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
    slopes = {
        word: torch.zeros_like(x) if grad is None else grad
        for (word, x), grad in zip(known.items(), grads, strict=True)
    }
    return Verdict(terms, watch, loss.detach(), slopes)
