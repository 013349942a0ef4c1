"""Online DPO: the DPO loss (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) on pairs the policy itself
draws and a reward model labels, as compared in the P3O paper (arXiv:2310.00212) and in Guo et al. 2024
(arXiv:2402.04792).

    h = log pi(y|x) - log pi_ref(y|x)
    L = -p log sigma(beta (h1 - h2)) - (1 - p) log sigma(beta (h2 - h1))

    p = P(y1 preferred):  argmax     1[r1 > r2], ties to the first
                          bernoulli  a coin that lands heads with sigma(r1 - r2)
                          soft       sigma(r1 - r2) itself

With soft or tossed labels the optimum is pi_ref exp(r/beta)/Z; with argmax labels a tabular policy has
no optimum and runs away, so its beta is not comparable to that of the other methods. Which rule the P3O
paper used is not stated; all three are here. More than two responses are compared in all pairs.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn.functional import logsigmoid

from rlhf_cli.core.algorithm import Defaults, Model, Sampling, State, Targets, Terms
from rlhf_cli.core.pairs import pairs
from rlhf_cli.core.rollout import Forward, Rollout, sequence_sum
from rlhf_cli.recipes import STRICT, Optim, Positive, Update


@dataclass(frozen=True, config=STRICT)
class OnlineDPO(Defaults):
    """DPO on the policy's own samples, labelled by the reward model."""

    beta: Positive
    """Inverse temperature of the implicit reward, reward units per nat."""
    label: Literal["argmax", "bernoulli", "soft"]
    """How two scores become a preference."""
    responses: Annotated[int, Field(ge=2)]
    """Responses per prompt."""
    update: Update
    optim: Optim

    needs: ClassVar[frozenset[Model]] = frozenset({Model.REF, Model.REWARD})
    couples_group: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    def sampling(self) -> Sampling:
        """`responses` independent draws of the policy per prompt."""
        return Sampling(policy=self.responses)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Targets, State]:
        """Label every pair: [P,C] probability that its first response is preferred."""
        assert rollout.score is not None
        r1, r2 = pairs(rollout.score)
        preference = (r1 - r2).sigmoid()
        if self.label == "argmax":
            preference = (r1 >= r2).to(preference)
        elif self.label == "bernoulli":
            # One coin per pair out of the two coins of its responses: the sum modulo 1 of
            # independent uniforms is uniform.
            c1, c2 = pairs(rollout.coin)
            preference = ((c1 + c2) % 1.0 < preference).to(preference)
        return Targets(label=preference), state

    def loss(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"policy": [P]}, the mean over the pairs of each prompt."""
        assert rollout.logp_ref is not None and targets.label is not None
        h1, h2 = pairs(sequence_sum(now.logp - rollout.logp_ref, rollout.mask))
        margin = self.beta * (h1 - h2)
        p = targets.label
        return {"policy": (-p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin)).mean(-1)}

    def watch(self, now: Forward, rollout: Rollout, targets: Targets) -> Terms:
        """{"accuracy": [P], "margin": [P]}: implicit reward against label, and its size in nats."""
        assert rollout.logp_ref is not None and targets.label is not None
        h1, h2 = pairs(sequence_sum(now.logp - rollout.logp_ref, rollout.mask))
        agrees = (h1 > h2) == (targets.label > 0.5)
        return {"accuracy": agrees.float().mean(-1), "margin": (h1 - h2).abs().mean(-1)}
