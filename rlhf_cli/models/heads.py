"""The three questions a model is asked: how likely is this text, what is it worth, what is a state worth.

All three take `tokens` and `attention` of shape [N,L]: prompts padded on the left, responses on the
right, the response in the last T columns. Positions are counted from the first real token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE


def positions(attention: Tensor) -> Tensor:
    """[N,L] position of each real token; padding gets 0."""
    return (attention.long().cumsum(-1) - 1).clamp_min(0)


def next_logits(policy: nn.Module, tokens: Tensor, attention: Tensor, length: int) -> Tensor:
    """[N,length,V] logits that predict the last `length` columns; no others are formed.

    What predicts column i stands at column i-1, so the last column is not fed at all.
    """
    attention = attention[:, :-1]
    return policy(
        input_ids=tokens[:, :-1],
        attention_mask=attention.long(),
        position_ids=positions(attention),
        use_cache=False,
        logits_to_keep=length,
    ).logits


def log_probs(policy: nn.Module, tokens: Tensor, attention: Tensor, length: int) -> Tensor:
    """[N,length] log pi(token | what precedes it) of the last `length` columns, fp32, in nats."""
    logits = next_logits(policy, tokens, attention, length).flatten(0, 1)
    targets = tokens[:, -length:]
    return -cross_entropy(logits.float(), targets.flatten(), reduction="none").view_as(targets)


class Scorer(nn.Module):
    """A scalar head on a trunk: one score per response (its last token), or a value per state."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def hidden(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """[N,L,width] last hidden states of the trunk."""
        return self.model.base_model(
            input_ids=tokens,
            attention_mask=attention.long(),
            position_ids=positions(attention),
            use_cache=False,
        ).last_hidden_state

    def forward(self, tokens: Tensor, attention: Tensor, length: int | None = None) -> Tensor:
        """[N] score read at the last real token; with `length`, [N,length] values instead.

        The value in response column t is that of the state before token t, as in `log_probs`.
        """
        if length is not None:
            states = self.hidden(tokens[:, :-1], attention[:, :-1])[:, -length:]
            return self.calibrated(self.model.score(states).squeeze(-1))
        hidden = self.hidden(tokens, attention)
        last = tokens.shape[1] - 1 - attention.long().flip(-1).argmax(-1)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self.calibrated(self.model.score(hidden[rows, last]).squeeze(-1))

    def calibrated(self, raw: Tensor) -> Tensor:
        """(raw - offset) / scale in fp32, so that SFT responses score 0 with standard deviation 1."""
        config = self.model.config
        return (raw.float() - getattr(config, SCORE_OFFSET, 0.0)) / getattr(
            config, SCORE_SCALE, 1.0
        )


class Actor(nn.Module):
    """What an update trains: the policy, and beside it a critic if the algorithm wants one."""

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = None if critic is None else Scorer(critic)

    def forward(
        self, tokens: Tensor, attention: Tensor, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """log pi [N,length] and V [N,length] (None without a critic) of the last `length` columns."""
        logp = log_probs(self.policy, tokens, attention, length)
        return logp, None if self.critic is None else self.critic(tokens, attention, length)
