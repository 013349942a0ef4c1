"""The reward with the KL to the reference charged to it, as it stood when the responses were drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli.core.returns import paid
from rlhf_cli.core.rollout import Rollout, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


def sequence_reward(rollout: Rollout, beta: float) -> Tensor:
    """[P,G]: R = r(x, y) - beta (log pi_old(y|x) - log pi_ref(y|x))."""
    assert rollout.logp_ref is not None and rollout.score is not None
    return rollout.score - beta * sequence_sum(rollout.logp_old - rollout.logp_ref, rollout.mask)


def token_reward(rollout: Rollout, beta: float) -> Tensor:
    """[P,G,T]: each token pays beta (log pi_old - log pi_ref), the last one earns r(x, y); where a task
    pays, each earns what it is paid.

    Its sum over a response is `sequence_reward`; 0 where mask is 0.
    """
    assert rollout.logp_ref is not None
    penalty = beta * (rollout.logp_old - rollout.logp_ref) * rollout.mask
    return paid(rollout) - penalty
