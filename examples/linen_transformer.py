"""A transformer block of Flax Linen, on digits as sequences of eight rows.

The block is made of Linen's own layers: `nn.MultiHeadDotProductAttention`,
`nn.LayerNorm`, `nn.Dense` and `nn.Dropout`, with logical axes as in MaxText or T5X.
"""

import flax.linen as nn
import jax
import optax
from digits import batches, score

import shardkit as sk

KERNEL = nn.initializers.xavier_uniform()
WIDTH = 32


class Block(nn.Module):
    """Attention, then a wide layer, each added to what came in."""

    @nn.compact
    def __call__(self, x, train=False):
        """Maps rows `[batch, 8, 8]` to logits `[batch, 10]`."""
        up = nn.with_logical_partitioning(KERNEL, ("embed", "mlp"))
        down = nn.with_logical_partitioning(KERNEL, ("mlp", "embed"))
        x = nn.Dense(WIDTH)(x)
        x += nn.MultiHeadDotProductAttention(
            num_heads=4, dropout_rate=0.1, deterministic=not train
        )(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * WIDTH, kernel_init=up)(nn.LayerNorm()(x)))
        hidden = nn.Dropout(0.1, deterministic=not train)(hidden)
        x += nn.Dense(WIDTH, kernel_init=down)(hidden)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


def loss(apply, batch, train=True):
    """Ordinary single-device code; `apply` has the variables and the keys."""
    return score(apply(batch["image"], train=train), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_linen(
        Block(),
        jax.ShapeDtypeStruct((1, 8, 8), "float32"),
        loss,
        eval_loss=lambda apply, batch: loss(apply, batch, train=False),
        axis_rules={"embed": "fsdp"},
    )
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
