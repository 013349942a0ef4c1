"""Which prompts an RL run asks, and the responses to them that the dataset already has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rlhf_cli.core.algorithm import Sampling
from rlhf_cli.data.corpus import Corpus, Demo, Pair, Split
from rlhf_cli.data.tokens import Encoder
from rlhf_cli.engine.order import batch_at
from rlhf_cli.engine.rollout import Asked
from rlhf_cli.errors import UserError


@dataclass(frozen=True)
class Feed:
    """An endless, shuffled, repeatable stream of what one stream of an algorithm asks."""

    corpus: Corpus
    encoder: Encoder
    sampling: Sampling
    seed: int
    relative: bool = False
    """Whether scores are to be relative to the dataset's own answers, as `recipes.Reward.relative`."""

    def batch(self, size: int, index: int) -> list[Asked]:
        """Batch `index` of `size` prompts. Raises UserError if the dataset has no such rows."""
        rows = self._rows(self.corpus.train)
        if not rows:
            raise UserError(
                f"data={self.corpus.title} has no rows of the kind this algorithm reads (pairs,"
                " demonstrations or prompts); choose another algorithm or other data"
            )
        chosen = [rows[i] for i in batch_at(len(rows), size, index, self.seed)]
        return [self._asked(row, chosen[(i + 1) % size]) for i, row in enumerate(chosen)]

    def _rows(self, split: Split) -> Sequence[Pair | Demo | str]:
        if self.sampling.dataset or self.sampling.mismatch:
            return split.pairs
        return split.demos if self.sampling.demo else split.prompts

    def _asked(self, row: Pair | Demo | str, other: Pair | Demo | str) -> Asked:
        """A row and, for a response that does not match its prompt, the row after it."""
        prompt = row if isinstance(row, str) else row.prompt
        texts: list[str] = []
        if isinstance(row, Pair) and isinstance(other, Pair):
            texts += [row.chosen, row.rejected] if self.sampling.dataset else []
            texts += [other.chosen] * self.sampling.mismatch
        if isinstance(row, Demo):
            texts.append(row.response)
        answer = self.encoder.response(self._answers[prompt]) if self.relative else None
        given = tuple(self.encoder.responses(texts))
        return Asked(self.encoder.prompt(prompt), given, prompt, answer)

    @cached_property
    def _answers(self) -> dict[str, str]:
        return self.corpus.train.answers()
