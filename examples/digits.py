"""Small images of digits, which come with scikit-learn, for all examples."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import shardkit as sk

__all__ = ["batches", "score"]


def batches(batch_size: int = 48, seed: int = 0) -> Callable[[Any], dict[str, Any]]:
    """Returns the batch of a step: images `[batch, 8, 8]` in [0, 1], and labels."""
    images, labels = load_digits(return_X_y=True)
    arrays = {
        "image": np.asarray(images, np.float32).reshape(-1, 8, 8) / 16,
        "label": np.asarray(labels, np.int32),
    }
    return sk.data.ArrayBatches(arrays, global_batch_size=batch_size, seed=seed)


def score(logits: Any, labels: Any) -> sk.LossOutput:
    """Adds up cross-entropies and right answers, without a scatter."""
    losses = sk.nn.cross_entropy(logits, labels)
    right = (logits.argmax(-1) == labels).sum()
    return sk.LossOutput(losses.sum(), losses.size, {"accuracy": right})
