"""RAFT, reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767): draw k responses, keep the good
ones, learn them as if they were demonstrations.

    s = r(x, y), or r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))         what is ranked by
    L = - mean of log pi(y|x) over the selected                                response tokens only

    select   best       the best of each prompt's k
             top        the best `share` of the whole rollout, whatever their prompts
             threshold  whatever scores at least `threshold`

One exact round of best-of-k turns the chances F(y) - F(y-) of a response into F(y)^k - F(y-)^k, F the
distribution of s; t rounds with k equal one with k^t. Ranked by r it therefore ends in the best response
alone, not in pi_ref exp(r / beta), and only the order of scores matters. Ranked by the regularised reward
the order turns against what has become likely, and the policy is driven towards that optimum, where all
ranks are equal.

Ahmadian et al. 2024 (arXiv:2402.14740) report that RAFT suffers as beta grows, so they seem to rank with
the KL in; Dong et al.'s code ranks by score. Both are here. The reference is listed as needed because the
list belongs to the method, not to its settings; its KL is measured in any case. Ties keep the first drawn
(with `best` and `top`): no prompt counts twice because its responses are equal. A rollout in which nothing
reaches the threshold teaches nothing.

Published code that is not followed: Dong et al.'s trains on the prompt's tokens too, and so does trlx's
variant, padding included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.later import torch
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.core.shaping import sequence_reward
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class RAFT(Defaults):
    """Maximum likelihood on the responses that rank highest."""

    beta: NonNegative
    """KL coefficient of the regularised rank, reward units per nat of sequence KL."""
    rank: Literal["score", "regularised"]
    """What responses are ranked by: r, or r with the KL charged."""
    select: Literal["best", "top", "threshold"]
    """Which responses are learned from."""
    share: Annotated[float, Field(gt=0, le=1)]
    """alpha: how much of a rollout `top` keeps, rounded down, but one response at least."""
    threshold: float
    """The least rank that `threshold` keeps, reward units."""
    responses: Annotated[int, Field(ge=2)]
    """k, responses per prompt."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    """With `best`, as shipped; `top` and `threshold` compare prompts with each other."""
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G] weights of mean 1: equal on the selected, 0 elsewhere."""
        assert rollout.score is not None
        rank = rollout.score if self.rank == "score" else sequence_reward(rollout, self.beta)
        chosen = self._chosen(rank)
        return Targets(advantage=chosen / chosen.mean().clamp_min(1 / chosen.numel())), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P,G]}, the negative log-likelihood of whole responses."""
        assert targets.advantage is not None
        return {"policy": -targets.advantage * sequence_sum(now.logp, rollout.mask)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"selected": [P,G]}: whether a response is learned from."""
        assert targets.advantage is not None
        return {"selected": (targets.advantage > 0).float()}

    def _chosen(self, rank: Tensor) -> Tensor:
        """[P,G] 1 where selected, else 0."""
        if self.select == "threshold":
            return (rank >= self.threshold).to(rank)
        row = rank if self.select == "best" else rank.reshape(1, -1)
        kept = 1 if self.select == "best" else max(1, int(self.share * row.numel()))
        # Stable, so that of equal ranks the first drawn comes first.
        first = row.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        return torch.zeros_like(row).scatter(1, first, 1.0).view_as(rank)
