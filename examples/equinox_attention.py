"""`eqx.nn.MultiheadAttention` and `eqx.nn.Dropout` as Equinox ships them, on digits."""

import equinox as eqx
import jax
import optax
from digits import batches, score

import shardkit as sk


class Net(eqx.Module):
    """Attention between the eight rows of an image."""

    embed: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(8, 32, key=keys[0])
        self.norm = eqx.nn.LayerNorm(32)
        self.attention = eqx.nn.MultiheadAttention(4, 32, dropout_p=0.1, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.1)
        self.out = eqx.nn.Linear(32, 10, key=keys[2])

    def __call__(self, x, key):
        """Maps the rows `[8, 8]` of one image to its logits `[10]`."""
        first, second = jax.random.split(key)
        x = jax.vmap(self.embed)(x)
        normal = jax.vmap(self.norm)(x)
        x += self.attention(normal, normal, normal, key=first)
        return self.out(self.dropout(jax.nn.gelu(x).mean(axis=0), key=second))


def loss(module, batch, key):
    """Ordinary single-device code."""
    keys = jax.random.split(key, len(batch["label"]))
    return score(jax.vmap(module)(batch["image"], keys), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_equinox(Net, loss, axis_rules={"out": "fsdp"})
    trainer = sk.Trainer(
        **model,
        tx=optax.adamw(3e-3),
        data=batches(),
        num_microbatches=12,
        path_rules={"norm/*": (None,), "**/weight": ("out", "in")},
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
