"""What must hold of a reward model before anything is learned from its scores.

The score of a text must be its own. Other texts in the batch and padding on either side may move it by
rounding alone; what moves it further (a kernel that reads padding, positions counted from the wrong
token, a score read at the wrong one) would pass for noise in every curve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.errors import UserError
from rlhf_cli.models.heads import Scorer

TEXTS = 4
LONGEST, STEP = 96, 8
"""Tokens of the first text that are read, and by how many each further one is cut shorter: enough to have
something to attend to, few enough to take milliseconds, and texts of one length would not be padded."""
PADDING = 5
"""Columns of padding beside the longest text."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""How far a score may move, in standard deviations of those of SFT responses. Measured of 64 texts by a
trained nano model: 1.4e-6 and 0.016; the rest is for deeper models and other machines."""


@torch.inference_mode()
def check_scores(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """UserError if a score depends on what stands beside its text; the first few of `texts` are tried."""
    ids = tokenizer(list(islice(texts, TEXTS)), add_special_tokens=False)["input_ids"]
    rows = [torch.tensor(each[: LONGEST - STEP * i]) for i, each in enumerate(ids)]
    shortest = min(map(len, rows))
    cut = [row[:shortest] for row in rows]
    pad, whole = int(tokenizer.pad_token_id), _alone(scorer, rows)
    found = {
        "other texts in its batch": _together(scorer, cut, pad, 0, 0) - _alone(scorer, cut),
        "padding on its left": _together(scorer, rows, pad, PADDING, 0) - whole,
        "padding on its right": _together(scorer, rows, pad, 0, PADDING) - whole,
    }
    model = scorer.model
    allowed = TOLERANCE[model.dtype]
    for what, moved in found.items():
        most = float(moved.abs().max())
        if not most <= allowed:  # nan is not
            raise UserError(
                f"{model.name_or_path}: the reward model's score of a text changes by {most:.2g} with"
                f" {what}, and rounding explains at most {allowed:g} (1 is the standard deviation under the"
                " SFT policy); set launch.attention=eager, or reward.model.precision=fp32."
            )


def _alone(scorer: Scorer, rows: Sequence[Tensor]) -> Tensor:
    """[N] scores, one row at a time."""
    return torch.cat([_together(scorer, [row], 0, 0, 0) for row in rows])


def _together(scorer: Scorer, rows: Sequence[Tensor], pad: int, left: int, right: int) -> Tensor:
    """[N] scores of one batch; `left` or `right` columns are padding in every row.

    Shorter rows are padded on the same side, on the right if there is none.
    """
    width = max(map(len, rows)) + left + right
    tokens = torch.full((len(rows), width), pad)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, ids in enumerate(rows):
        at = slice(width - len(ids), width) if left else slice(len(ids))
        tokens[row, at], real[row, at] = ids, True
    device = scorer.model.device
    scores: Tensor = scorer(tokens.to(device), real.to(device))
    return scores
