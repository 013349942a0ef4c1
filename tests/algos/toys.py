"""Worlds small enough to sum over every response, and small random rollouts; all in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_cli.core.algorithm import Algorithm, Terms
from rlhf_cli.core.masked import averages, denominators
from rlhf_cli.core.rollout import Forward, Rollout


def tensor(values: object) -> Tensor:
    """Float64, the precision of every number in these tests."""
    return torch.as_tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """One prompt whose N responses of T tokens can all be listed.

    A policy is a table theta [S,V] of logits: S states in which a token is chosen, V tokens.
    """

    state: Tensor
    """[N,T] the state in which each token is chosen."""
    token: Tensor
    """[N,T] the token chosen."""
    ref: Tensor
    """[S,V] the reference policy's logits."""
    score: Tensor
    """[N] r(y)."""
    beta: float

    def logp(self, theta: Tensor) -> Tensor:
        """[N,T] log-probability of each token."""
        return theta.log_softmax(-1)[self.state, self.token]

    def probability(self, theta: Tensor) -> Tensor:
        """[N] probability of each response."""
        return self.logp(theta).sum(-1).exp()

    def regularised(self, theta: Tensor) -> Tensor:
        """[N] r - beta h."""
        return self.score - self.beta * (self.logp(theta) - self.logp(self.ref)).sum(-1)

    def objective(self, theta: Tensor) -> Tensor:
        """J = E[r] - beta KL(pi || pi_ref), differentiable."""
        return (self.probability(theta) * self.regularised(theta)).sum()

    def gradient(self, theta: Tensor) -> Tensor:
        """[S,V] of J, exactly."""
        theta = leaf(theta)
        return torch.autograd.grad(self.objective(theta), theta)[0]

    def optimum(self) -> Tensor:
        """[N] pi_ref exp(r / beta) / Z, the policy that maximises J."""
        return (self.logp(self.ref).sum(-1) + self.score / self.beta).softmax(-1)

    def values(self, theta: Tensor) -> Tensor:
        """[N,T] expected regularised reward still to come in the state of each token."""
        logp = self.logp(theta)
        spent = self.beta * (logp - self.logp(self.ref))
        ahead = self.score.unsqueeze(-1) - spent.flip(-1).cumsum(-1).flip(-1)
        chance = logp.flip(-1).cumsum(-1).flip(-1).exp()
        here = (self.state.unsqueeze(0) == self.state.unsqueeze(1)).to(chance)
        return torch.einsum("nmt,mt,mt->nt", here, chance, ahead)

    def draws(self, responses: int) -> Tensor:
        """[P,G] indices of responses: every possible outcome of G draws, one per row."""
        axes = torch.arange(len(self.score)).repeat(responses, 1)
        return torch.cartesian_prod(*axes).view(-1, responses)

    def rollout(self, old: Tensor, draws: Tensor) -> Rollout:
        """The rollout in which the policy `old` happened to answer with `draws`."""
        shape = (*draws.shape, self.state.shape[1])
        return Rollout(
            tokens=torch.zeros(*draws.shape, 0),
            attention=torch.zeros(*draws.shape, 0),
            mask=torch.ones(shape, dtype=torch.float64),
            logp_old=self.logp(old)[draws],
            logp_ref=self.logp(self.ref)[draws],
            score=self.score[draws],
            value_old=self.values(old)[draws],
            coin=torch.zeros(draws.shape, dtype=torch.float64),
            source=("policy",) * draws.shape[1],
        )

    def chances(self, old: Tensor, draws: Tensor) -> Tensor:
        """[P] probability that `old` answers with each row of `draws`."""
        return self.probability(old)[draws].prod(-1)


def bandit(score: Sequence[float], beta: float) -> World:
    """One token decides; the reference is uniform."""
    arms = torch.arange(len(score)).unsqueeze(-1)
    ref = torch.zeros(1, len(score), dtype=torch.float64)
    return World(torch.zeros_like(arms), arms, ref, tensor(score), beta)


BANDIT = bandit([1, 0, -0.5], beta=0.1)
"""Its policy and sampler below are apart, so that ratios and clips have something to do."""
THETA = tensor([[0.1, -0.2, 0.3]])
THETA_OLD = tensor([[0.0, 0.1, -0.1]])

ARMS = bandit([2.5, 2, 1], beta=0.5)
"""The bandit of the CoPG paper (arXiv:2406.19185, section 5)."""

TREE = World(
    state=torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]),
    token=torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]),
    ref=tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]).log(),
    score=tensor([1, 0, 0.5, 2]),
    beta=0.5,
)
"""Two tokens, the first leading to one of two states: what happens between tokens shows here."""


def enumerated(
    algorithm: Algorithm, world: World, theta: Tensor, old: Tensor, critic: Tensor | None = None
) -> Tensor:
    """Expected loss over everything `old` could draw; a term per token is summed over the response.

    critic: [N,T] what it says; the exact values under `old` unless given.
    """
    draws = world.draws(algorithm.sampling().responses)
    rollout = world.rollout(old, draws)
    if critic is not None:
        rollout = replace(rollout, value_old=critic[draws])
    now = Forward(logp=world.logp(theta)[draws], value=rollout.value_old)
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(now, rollout, targets).values()
    chances = world.chances(old, draws)
    return sum((chances * per_prompt(term)).sum() for term in terms)  # type: ignore[return-value]


def per_prompt(term: Tensor) -> Tensor:
    """[P]: tokens summed, responses averaged."""
    term = term.sum(-1) if term.dim() == 3 else term
    return term.mean(-1) if term.dim() == 2 else term


def ascent(
    algorithm: Algorithm, world: World, theta: Tensor, old: Tensor, critic: Tensor | None = None
) -> Tensor:
    """[S,V] minus the gradient of the expected loss."""
    theta = leaf(theta)
    return -torch.autograd.grad(enumerated(algorithm, world, theta, old, critic), theta)[0]


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


def leaf(x: Tensor) -> Tensor:
    """A copy that collects its own gradient."""
    return x.detach().clone().requires_grad_()


def case(
    seed: int, prompts: int = 4, responses: int = 2, tokens: int = 5, spread: float = 0.15
) -> Case:
    """Random numbers in the shape of a rollout; responses of 1 to `tokens` tokens.

    `spread` is the standard deviation, in nats per token, of log pi - log pi_old. Values are not 0 on
    padding, as a critic's are not.
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
        source=("policy",) * responses,
    )
    logp = old + spread * normal(*shape) * mask
    return Case(rollout, Forward(leaf(logp), leaf(value + 2 * spread * normal(*shape))))


def twins(seed: int) -> Case:
    """A case whose first prompt got the same response twice."""
    one = case(seed)
    assert one.now.value is not None

    def same(x: Tensor) -> Tensor:
        x = x.detach().clone()
        x[0, 1] = x[0, 0]
        return x

    changed = {
        f.name: same(x)
        for f in fields(one.rollout)
        if isinstance(x := getattr(one.rollout, f.name), Tensor)
    }
    return Case(
        replace(one.rollout, **changed),
        Forward(leaf(same(one.now.logp)), leaf(same(one.now.value))),
    )


@dataclass(frozen=True)
class Verdict:
    """All an algorithm says about a case."""

    terms: Terms
    watch: Terms
    loss: Tensor
    d_logp: Tensor
    d_value: Tensor


def judge(algorithm: Algorithm, one: Case, prepared_on: Case | None = None) -> Verdict:
    """Terms, averaged loss and its gradients; targets come from `prepared_on` if it is another rollout."""
    targets, _ = algorithm.prepare((prepared_on or one).rollout, {})
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
