"""The convolutional net of Flax's own NNX tutorial, on digits.

Its layers are `nnx.Conv`, `nnx.BatchNorm`, `nnx.Dropout` and `nnx.Linear`: statistics
and random streams live in the module, and the loss changes them in place.
"""

from functools import partial

import jax
import optax
from digits import batches, score
from flax import nnx

import shardkit as sk


class CNN(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(8, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(16, rngs=rngs)
        self.linear1 = nnx.Linear(64, 32, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(32, 10, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        """Maps images `[batch, 8, 8, 1]` to logits `[batch, 10]`."""
        x = nnx.relu(self.norm1(self.dropout1(self.conv1(x))))
        x = self.avg_pool(x)
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = self.avg_pool(x)
        x = nnx.relu(self.dropout2(self.linear1(x.reshape(x.shape[0], -1))))
        return self.linear2(x)


def loss(module, batch):
    """As in plain NNX."""
    return score(module(batch["image"][..., None]), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_nnx(CNN, loss, axis_rules={"out": "fsdp"})
    trainer = sk.Trainer(
        **model,
        tx=optax.adamw(5e-3, 0.9),
        data=batches(),
        num_microbatches=12,
        path_rules={"linear*/kernel": ("in", "out")},
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
