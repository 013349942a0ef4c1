"""Worlds small enough to sum over every response, and small random rollouts; all in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlhf_cli.core.algorithm import Algorithm, Sampling
from rlhf_cli.core.rollout import Forward, Rollout


def tensor(values: object) -> Tensor:
    """Float64, the precision of every number in these tests."""
    return torch.as_tensor(values, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    """A copy that collects its own gradient."""
    return x.detach().clone().requires_grad_()


def close(got: Tensor | float, expected: object, tolerance: float = 6e-7) -> None:
    """Equal shapes and numbers; the default tolerance is that of literals with six decimals."""
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64), tensor(expected), atol=tolerance, rtol=0
    )


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
    guide: Tensor | None = None
    """[S,V] the guide policy's logits; the reference's if None."""
    demos: Tensor | None = None
    """[N] how often each response is demonstrated; as the optimum would answer if None."""
    q: Tensor | None = None
    """[S,V] what the Q network says; the policy's exact soft Q if None."""

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

    def rollout(self, old: Tensor, draws: Tensor, sampling: Sampling | None = None) -> Rollout:
        """The rollout in which the responses to a prompt happened to be `draws`, old being the policy.

        sampling: where they came from; from the policy unless given.
        """
        shape = (*draws.shape, self.state.shape[1])
        guide = self.ref if self.guide is None else self.guide
        return Rollout(
            tokens=torch.zeros(*draws.shape, 0),
            attention=torch.zeros(*draws.shape, 0),
            mask=torch.ones(shape, dtype=torch.float64),
            logp_old=self.logp(old)[draws],
            logp_ref=self.logp(self.ref)[draws],
            score=self.score[draws],
            value_old=self.values(old)[draws],
            coin=torch.zeros(draws.shape, dtype=torch.float64),
            source=(sampling or Sampling(policy=draws.shape[1])).sources,
            logp_guide=self.logp(guide)[draws],
        )

    def now(self, theta: Tensor, rollout: Rollout, draws: Tensor) -> Forward:
        """What the policy theta says of a rollout; the critic and the reward model say nothing new."""
        logs = theta.log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)[self.state][draws]
        q = self.soft_q(theta.detach()) if self.q is None else self.q
        return Forward(
            logp=self.logp(theta)[draws],
            value=rollout.value_old,
            entropy=entropy,
            score=rollout.score,
            logps=logs[self.state][draws],
            logps_ref=self.ref.log_softmax(-1)[self.state][draws],
            q=q[self.state][draws],
            q_taken=q[self.state, self.token][draws],
        )

    def soft_q(self, theta: Tensor) -> Tensor:
        """[S,V] reward to come after each token in each state, less what the tokens after it spend."""
        table = torch.zeros_like(self.ref)
        after = torch.cat([self.values(theta)[:, 1:], self.score.unsqueeze(-1)], -1)
        table[self.state, self.token] = after
        return table

    def chances(self, old: Tensor, draws: Tensor, sampling: Sampling | None = None) -> Tensor:
        """[P] probability of each row of `draws`, each response from its own source.

        Preference pairs come from two draws of the reference, put in order by a Bradley-Terry coin.
        """
        sampling = sampling or Sampling(policy=draws.shape[1])
        now, ref = (self.probability(logits) for logits in (old, self.ref))
        weight = sampling.mixture_ref
        mixed = (1 - weight) * old.log_softmax(-1) + weight * self.ref.log_softmax(-1)
        laws = {
            "policy": now,
            "ref": ref,
            "greedy": self.probability(one_hot(old.argmax(-1), old.shape[-1]).double().log()),
            "mixture": self.probability(mixed),
            "mismatch": ref,
            "demo": self.optimum() if self.demos is None else self.demos,
        }
        total = torch.ones(len(draws), dtype=torch.float64)
        for place, source in enumerate(sampling.sources):
            if source != "dataset":
                total = total * laws[source][draws[:, place]]
        if sampling.dataset:
            first = sampling.sources.index("dataset")
            chosen, rejected = draws[:, first], draws[:, first + 1]
            gap = self.score[chosen] - self.score[rejected]
            total = total * 2 * ref[chosen] * ref[rejected] * gap.sigmoid()
        return total


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
    sampling = algorithm.sampling()
    draws = world.draws(sampling.responses)
    rollout = world.rollout(old, draws, sampling)
    if critic is not None:
        rollout = replace(rollout, value_old=critic[draws])
    targets, _ = algorithm.prepare(rollout, {})
    terms = algorithm.loss(world.now(theta, rollout, draws), rollout, targets).values()
    chances = world.chances(old, draws, sampling)
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
