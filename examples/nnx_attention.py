"""`nnx.MultiHeadAttention` as Flax ships it, with dropout of its weights, on digits.

Logical axes are given where the layers are made, as metadata of their kernels.
"""

import jax
import optax
from digits import batches, score
from flax import nnx

import shardkit as sk

OUT = {"out_sharding": ("embed", "out")}


class Net(nnx.Module):
    """Attention between the eight rows of an image."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(8, 32, rngs=rngs, kernel_metadata=OUT)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4,
            in_features=32,
            dropout_rate=0.1,
            deterministic=False,
            decode=False,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs, kernel_metadata=OUT)

    def __call__(self, x):
        """Maps rows `[batch, 8, 8]` to logits `[batch, 10]`."""
        x = self.embed(x)
        x += self.attention(self.norm(x))
        return self.out(nnx.gelu(x).mean(axis=1))


def loss(module, batch):
    """As in plain NNX."""
    return score(module(batch["image"]), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_nnx(Net, loss, axis_rules={"embed": "fsdp"})
    trainer = sk.Trainer(
        **model, tx=optax.adamw(3e-3), data=batches(), num_microbatches=12
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
