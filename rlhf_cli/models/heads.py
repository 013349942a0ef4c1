"""The three questions a model is asked: how likely is this text, what is it worth, what is a state worth.

All three take `tokens` and `attention` of shape [N,L]: prompts padded on the left, responses on the
right, the response in the last T columns. Positions are counted from the first real token. Every `group`
consecutive rows answer one prompt, which a model then need not read as often (`models.sequence`).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE
from rlhf_cli.models.sequence import sequences
from rlhf_cli.models.tuning import Policy


def next_logits(
    policy: Policy, tokens: Tensor, attention: Tensor, length: int, group: int = 1
) -> Tensor:
    """[N,length,V] logits that predict the last `length` columns; no others are formed."""
    fed = sequences(policy, tokens, attention, length, group)
    return fed.by_row(policy(**fed.asked, logits_to_keep=fed.before).logits)


def taken(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N,length] log softmax of logits [N,length,V] at the last `length` columns of tokens, fp32."""
    targets = tokens[:, -logits.shape[1] :]
    flat = logits.flatten(0, 1).float()
    return -cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)


def log_probs(
    policy: Policy,
    tokens: Tensor,
    attention: Tensor,
    length: int,
    group: int = 1,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """[N,length] log pi(token | what precedes it) of the last `length` columns, fp32, in nats.

    pi is the distribution the tokens were drawn from: the model's logits over `temperature`.
    """
    return taken(next_logits(policy, tokens, attention, length, group) / temperature, tokens)


class Scorer(nn.Module):
    """A scalar head on a trunk: one score per response, read at its last token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def states(self, tokens: Tensor, attention: Tensor, length: int, group: int = 1) -> Tensor:
        """[N,length,width] last hidden states of the trunk, before each of the last `length` columns."""
        fed = sequences(self.model, tokens, attention, length, group)
        return fed.taken(self.model.base_model(**fed.asked).last_hidden_state)

    def forward(
        self, tokens: Tensor, attention: Tensor, length: int | None = None, group: int = 1
    ) -> Tensor:
        """[N] scores; length: columns of the responses, None where a text is not parted."""
        # One column more than there are, so that there is a state behind each of them.
        length = 1 + (tokens.shape[1] - 1 if length is None else length)
        last = length - 1 - attention.long().flip(-1).argmax(-1)
        states = self.states(pad(tokens, (0, 1)), pad(attention, (0, 1)), length, group)
        behind = states[torch.arange(len(tokens), device=tokens.device), last.clamp_min(0)]
        return self.calibrated(self.model.score(behind).squeeze(-1))

    def calibrated(self, raw: Tensor) -> Tensor:
        """(raw - offset) / scale in fp32, so that SFT responses score 0 with standard deviation 1."""
        config = self.model.config
        return (raw.float() - getattr(config, SCORE_OFFSET, 0.0)) / getattr(
            config, SCORE_SCALE, 1.0
        )


class Critic(Scorer):
    """The same read before every token: what the state there is worth."""

    def forward(
        self, tokens: Tensor, attention: Tensor, length: int | None = None, group: int = 1
    ) -> Tensor:
        """[N,length] values; what stands in response column t is that of the state before token t."""
        length = tokens.shape[1] - 1 if length is None else length
        states = self.states(tokens, attention, length, group)
        return self.calibrated(self.model.score(states).squeeze(-1))


class Actor(nn.Module):
    """What an update trains: the policy, and beside it whatever else the algorithm lets learn."""

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: PreTrainedModel | None = None,
        reward: PreTrainedModel | None = None,
        q: PreTrainedModel | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> None:
        """temperature: of the distribution responses are drawn from; entropy: whether it is wanted."""
        super().__init__()
        self.policy = policy
        self.critic = None if critic is None else Critic(critic)
        self.reward = None if reward is None else Scorer(reward)
        self.q = q
        self.q_target = None if q is None else copy.deepcopy(q).requires_grad_(False)
        self.temperature, self.entropy = temperature, entropy

    def forward(
        self, tokens: Tensor, attention: Tensor, length: int, group: int = 1
    ) -> dict[str, Tensor]:
        """What `core.rollout.Forward` holds, by name, for [N] rows instead of [P,G].

        All but the score are of the last `length` columns; what is not there is left out.
        """
        rows = (tokens, attention, length, group)
        logits = next_logits(self.policy, *rows) / self.temperature
        said = {"logp": taken(logits, tokens)}
        if self.entropy or self.q is not None:
            logps = logits.float().log_softmax(-1)
            if self.entropy:
                said["entropy"] = -(logps.exp() * logps).sum(-1)
        if self.critic is not None:
            said["value"] = self.critic(*rows)
        if self.reward is not None:
            said["score"] = self.reward(*rows)
        if self.q is not None:
            said["logps"] = logps
            said["q"] = next_logits(self.q, *rows).float()
            said["q_taken"] = said["q"].gather(-1, tokens[:, -length:, None]).squeeze(-1)
        return said
