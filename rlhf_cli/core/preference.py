"""What a preference between two responses costs, as DPO and IPO count it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from rlhf_cli.core.algorithm import Terms
from rlhf_cli.core.later import torch
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor

PairLoss: TypeAlias = Literal["sigmoid", "ipo"]
Label: TypeAlias = Literal["argmax", "bernoulli", "soft"]
Norm: TypeAlias = Literal["sum", "mean"]


def sequence_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """[P,G,T] -> [P,G]: mean over response tokens, 0 for an empty response."""
    return sequence_sum(per_token, mask) / mask.sum(-1).clamp_min(1)


def labels(rollout: Rollout, rule: Label) -> Tensor:
    """[P,C] probability that the first of each pair is preferred, by the scores of the two.

    argmax: 1[r1 > r2], ties to the first; bernoulli: a coin with sigma(r1 - r2); soft: sigma(r1 - r2).
    """
    assert rollout.score is not None
    r1, r2 = pairs(rollout.score)
    preference = (r1 - r2).sigmoid()
    if rule == "argmax":
        return (r1 >= r2).to(preference)
    if rule == "bernoulli":
        # One coin per pair out of the two coins of its responses: the sum modulo 1 of
        # independent uniforms is uniform.
        c1, c2 = pairs(rollout.coin)
        return ((c1 + c2) % 1.0 < preference).to(preference)
    return preference


def preference_loss(gap: Tensor, label: Tensor | float, beta: float, pair_loss: PairLoss) -> Tensor:
    """What each pair costs when its first response is preferred with probability `label`.

        sigmoid   -p log sigma(beta gap) - (1 - p) log sigma(-beta gap)
        ipo        p (gap - 1 / (2 beta))^2 + (1 - p) (gap + 1 / (2 beta))^2

    gap: first minus second, nats; beta: reward units per nat. Same shape as gap. `label` may lie
    outside [0, 1], where it undoes a known share of wrong labels.
    """
    if pair_loss == "ipo":
        aim = 1 / (2 * beta)
        return label * (gap - aim) ** 2 + (1 - label) * (gap + aim) ** 2
    margin = beta * gap
    return -label * torch.nn.functional.logsigmoid(margin) - (
        1 - label
    ) * torch.nn.functional.logsigmoid(-margin)


def gaps(
    now: Forward, rollout: Rollout, pair_loss: PairLoss = "sigmoid", ipo_norm: Norm = "sum"
) -> Tensor:
    """[P,C] h1 - h2 of each pair, h = log pi - log pi_ref, nats.

    Of whole responses; of the average token if `pair_loss` is ipo and `ipo_norm` is mean.
    """
    assert rollout.logp_ref is not None
    level = sequence_mean if (pair_loss, ipo_norm) == ("ipo", "mean") else sequence_sum
    h1, h2 = pairs(level(now.logp - rollout.logp_ref, rollout.mask))
    return h1 - h2


def demo_lead(now: Forward, rollout: Rollout) -> Tensor:
    """[P,1] how much more the demonstration has gained since the rollout than the policy's own sample.

    Gains are of log pi over the policy that drew the rollout, nats.
    """
    gained = sequence_sum(now.logp - rollout.logp_old, rollout.mask)
    return gained[:, rollout.where("demo")] - gained[:, rollout.where("policy")]


def watched(gap: Tensor, label: Tensor | float) -> Terms:
    """{"accuracy": [P], "margin": [P]}: implicit reward against label, and its size in nats."""
    agrees = (gap > 0) == (label > 0.5)
    return {"accuracy": agrees.float().mean(-1), "margin": gap.abs().mean(-1)}


def implicit_rewards(
    now: Forward, rollout: Rollout, label: Tensor | float, beta: float
) -> dict[str, Tensor]:
    """{"implicit_chosen": [P], "implicit_rejected": [P]}: beta h of the two, which only pairs compare.

    Both usually fall. Under pi_ref, E[beta h] = -beta KL(pi_ref || pi) <= 0: a policy that moves away from
    a reference that was fine-tuned on such responses must make them less likely on average, while the
    gap between them grows (Rafailov et al. 2024, arXiv:2404.12358, section 5.3).
    """
    assert rollout.logp_ref is not None
    h1, h2 = pairs(sequence_sum(now.logp - rollout.logp_ref, rollout.mask))
    first = torch.as_tensor(label, device=h1.device) > 0.5
    chosen, rejected = torch.where(first, h1, h2), torch.where(first, h2, h1)
    return {
        "implicit_chosen": beta * chosen.mean(-1),
        "implicit_rejected": beta * rejected.mean(-1),
    }
