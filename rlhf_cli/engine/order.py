"""Orders that are pure functions of their key, so that a resumed run sees the same rows again."""

from __future__ import annotations

import numpy as np


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), the same for the same key everywhere."""
    return np.random.default_rng(list(key)).permutation(count)


def batch_at(count: int, size: int, step: int, seed: int) -> np.ndarray:
    """The `size` row numbers of batch `step`, epoch after epoch, each epoch in an order of its own.

    A batch may straddle two epochs; no row is left out. Raises ValueError if there are no rows.
    """
    if count < 1:
        raise ValueError("no rows to batch")
    wanted = np.arange(step * size, (step + 1) * size)
    epochs = wanted // count
    orders = {epoch: shuffled(count, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[e][i] for e, i in zip(epochs, wanted % count, strict=True)])
