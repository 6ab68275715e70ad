"""The classifier that optax's documentation trains, on digits.

A Linen MLP under a chain of optax's: adaptive gradient clipping, Adam, and a learning
rate that warms up and decays.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import optax
from digits import batches, score

import shardkit as sk


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    hidden_sizes: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x):
        """Maps images `[batch, 8, 8]` to logits `[batch, num_classes]`."""
        x = x.reshape((x.shape[0], -1))
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(self.num_classes)(x)


def loss(apply, batch):
    """Ordinary single-device code; `apply` has the variables."""
    return score(apply(batch["image"]), batch["label"])


def optimizer(steps):
    """Chains what optax has."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, max(steps, 10))
    return optax.chain(optax.adaptive_grad_clip(1.0), optax.adam(rate))


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    image = jax.ShapeDtypeStruct((1, 8, 8), "float32")
    model = sk.from_linen(MLP((64, 32), 10), image, loss, axis_rules={"out": "fsdp"})
    trainer = sk.Trainer(
        **model,
        tx=optimizer(steps),
        data=batches(),
        num_microbatches=12,
        path_rules={"**/kernel": ("in", "out"), "**/bias": ("out",)},
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
