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
from rlhf_cli.core.rollout import Forward, Rollout
from tests.algos.toys import leaf


@dataclass(frozen=True)
class Case:
    """A rollout and what the current weights say; `now` holds the leaves of the gradient."""

    rollout: Rollout
    now: Forward

    def take(self, prompts: Tensor) -> Case:
        """Some prompts only, with leaves of their own."""
        assert self.now.value is not None
        return Case(
            self.rollout.take(prompts),
            Forward(leaf(self.now.logp[prompts]), leaf(self.now.value[prompts])),
        )

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor changed alike."""
        assert self.now.value is not None
        changed: dict[str, Any] = {
            f.name: change(x)
            for f in fields(self.rollout)
            if isinstance(x := getattr(self.rollout, f.name), Tensor)
        }
        now = Forward(leaf(change(self.now.logp)), leaf(change(self.now.value)))
        return Case(replace(self.rollout, **changed), now)

    def with_rollout(self, **changes: object) -> Case:
        """The same forward, another rollout."""
        return replace(self, rollout=replace(self.rollout, **changes))  # type: ignore[arg-type]

    def with_columns(self, fill: Callable[[Tensor], Tensor]) -> Case:
        """Three more token columns with mask 0, everything else in them filled by `fill`."""

        def wider(x: Tensor) -> Tensor:
            return torch.cat([x.detach(), fill(pad(x.detach(), (0, 3))[..., -3:])], -1)

        old = self.rollout
        assert old.logp_ref is not None and old.value_old is not None
        assert self.now.value is not None
        rollout = replace(
            old,
            mask=pad(old.mask, (0, 3)),
            logp_old=wider(old.logp_old),
            logp_ref=wider(old.logp_ref),
            value_old=wider(old.value_old),
        )
        return Case(rollout, Forward(leaf(wider(self.now.logp)), leaf(wider(self.now.value))))


def case(
    seed: int, prompts: int = 4, responses: int = 2, tokens: int = 5, spread: float = 0.15
) -> Case:
    """Random numbers in the shape of a rollout; responses of 1 to `tokens` tokens.

    `spread` is the standard deviation, in nats per token, of log pi - log pi_old. Values are not 0
    on padding, as a critic's are not.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (prompts, responses, tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    length = torch.randint(1, tokens + 1, (prompts, responses, 1), generator=random)
    length[0, 0] = tokens
    mask = (torch.arange(tokens) < length).to(torch.float64)
    old = -normal(*shape).exp() * mask
    value = normal(*shape)
    rollout = Rollout(
        tokens=torch.zeros(prompts, responses, 0),
        attention=torch.zeros(prompts, responses, 0),
        mask=mask,
        logp_old=old,
        logp_ref=old + 0.2 * normal(*shape) * mask,
        score=normal(prompts, responses),
        value_old=value,
        coin=torch.rand(prompts, responses, generator=random, dtype=torch.float64),
        source=Sampling(policy=responses).sources,
    )
    logp = old + spread * normal(*shape) * mask
    return Case(rollout, Forward(leaf(logp), leaf(value + 2 * spread * normal(*shape))))


def twins(seed: int) -> Case:
    """A case whose first prompt got the same response twice."""

    def same(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[0, 1] = x[0, 0]
        return x

    return case(seed).mapped(same)


@dataclass(frozen=True)
class Verdict:
    """All an algorithm says about a case."""

    terms: Terms
    watch: Terms
    loss: Tensor
    d_logp: Tensor
    d_value: Tensor


def judge(algorithm: Algorithm, one: Case) -> Verdict:
    """Terms, watched terms, averaged loss and its gradients."""
    targets, _ = algorithm.prepare(one.rollout, {})
    terms = algorithm.loss(one.now, one.rollout, targets)
    watch = algorithm.watch(one.now, one.rollout, targets)
    mask = one.rollout.mask
    loss = torch.stack(list(averages(terms, mask, denominators(mask)).values())).sum()
    leaves = [one.now.logp] if one.now.value is None else [one.now.logp, one.now.value]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    d_logp, d_value = (*grads, None)[:2]
    return Verdict(
        terms,
        watch,
        loss.detach(),
        d_logp if d_logp is not None else torch.zeros_like(one.now.logp),
        d_value if d_value is not None else torch.zeros_like(one.now.logp),
    )
