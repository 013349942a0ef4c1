"""ReMax (Li, Xu, Zhang, Lin, Yu, Sun, Luo 2023, arXiv:2310.10505): the greedy response is the baseline.

    y ~ pi(.|x)        y' = the policy's most likely tokens        u_t = log pi_old(y_t) - log pi_ref(y_t)

    A_t = r(x, y) - b(x) - beta sum_{s>=t} u_s        [P,T]
    L   = -sum_t A_t log pi(y_t)                      [P]; y' is scored and never learned from

y' is fixed by the prompt and the policy, so any b made of it leaves the expected gradient that of
E[r] - beta KL, and a reward shifted prompt by prompt cancels.

The paper writes one reward and leaves open what of y' counts once a KL is charged. Here b is its score,
as in the authors' code, or its score with its own KL. That code charges each token for its own u_t alone
(its variable says cumulative), so that a token answers for none of the KL it leads to; it also discounts
by 0.99, clips scores at +-5 and averages over the batch's tokens. Here KL is charged to the end, and
undiscounted, as J has it. Strictly on-policy: one step per rollout.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.returns import to_go
from rlhf_cli.core.rollout import Forward, Rollout
from rlhf_cli.core.shaping import sequence_reward, token_reward
from rlhf_cli.recipes import STRICT, NonNegative, Optim, Update


@dataclass(frozen=True, config=STRICT)
class ReMax(Defaults):
    """One draw against the policy's own best guess."""

    beta: NonNegative
    """KL coefficient, reward units per nat, charged token by token."""
    baseline: Literal["score", "regularised"]
    """b(x): the greedy response's score, or its score minus beta times its log-ratio."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """One draw of the policy per prompt and one greedy response, which counts as an episode."""
        return Sampling(policy=1, greedy=1)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """[P,G,T] how much better than the greedy response; 0 for the greedy one itself."""
        assert rollout.score is not None
        returns = to_go(token_reward(rollout, self.beta), rollout.mask)
        worth = rollout.score if self.baseline == "score" else sequence_reward(rollout, self.beta)
        (greedy,), (drawn,) = rollout.where("greedy"), rollout.where("policy")
        advantage = returns.new_zeros(returns.shape)
        level = worth[:, greedy, None]
        advantage[:, drawn] = (returns[:, drawn] - level) * rollout.mask[:, drawn]
        return Targets(advantage=advantage), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the sum over the drawn response's tokens."""
        assert targets.advantage is not None
        return {"policy": -(targets.advantage * now.logp * rollout.mask).sum((1, 2))}
