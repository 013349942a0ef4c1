"""The three questions a model is asked: how likely is this text, what is it worth, what is a state worth.

All three take `tokens` and `attention` of shape [N,L]: prompts padded on the left, responses on the
right, the response in the last T columns. Positions are counted from the first real token.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rlhf_cli.models.load import SCORE_OFFSET, SCORE_SCALE
from rlhf_cli.models.tuning import Policy


def positions(attention: Tensor) -> Tensor:
    """[N,L] position of each real token; padding gets 0."""
    return (attention.long().cumsum(-1) - 1).clamp_min(0)


def next_logits(policy: Policy, tokens: Tensor, attention: Tensor, length: int) -> Tensor:
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


def taken(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N,length] log softmax of logits [N,length,V] at the last `length` columns of tokens, fp32."""
    targets = tokens[:, -logits.shape[1] :]
    flat = logits.flatten(0, 1).float()
    return -cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)


def log_probs(
    policy: Policy, tokens: Tensor, attention: Tensor, length: int, temperature: float = 1.0
) -> Tensor:
    """[N,length] log pi(token | what precedes it) of the last `length` columns, fp32, in nats.

    pi is the distribution the tokens were drawn from: the model's logits over `temperature`.
    """
    return taken(next_logits(policy, tokens, attention, length) / temperature, tokens)


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
        self.critic = None if critic is None else Scorer(critic)
        self.reward = None if reward is None else Scorer(reward)
        self.q = q
        self.q_target = None if q is None else copy.deepcopy(q).requires_grad_(False)
        self.temperature, self.entropy = temperature, entropy

    def forward(self, tokens: Tensor, attention: Tensor, length: int) -> dict[str, Tensor]:
        """What `core.rollout.Forward` holds, by name, for [N] rows instead of [P,G].

        All but the score are of the last `length` columns; what is not there is left out.
        """
        rows = (tokens, attention, length)
        logits = next_logits(self.policy, *rows) / self.temperature
        said = {"logp": taken(logits, tokens)}
        if self.entropy or self.q is not None:
            logps = logits.float().log_softmax(-1)
            if self.entropy:
                said["entropy"] = -(logps.exp() * logps).sum(-1)
        if self.critic is not None:
            said["value"] = self.critic(*rows)
        if self.reward is not None:
            said["score"] = self.reward(tokens, attention)
        if self.q is not None:
            said["logps"] = logps
            said["q"] = next_logits(self.q, *rows).float()
            said["q_taken"] = said["q"].gather(-1, tokens[:, -length:, None]).squeeze(-1)
        return said
