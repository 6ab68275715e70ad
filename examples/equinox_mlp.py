"""`eqx.nn.MLP` as Equinox ships it, on digits."""

import equinox as eqx
import jax
import optax
from digits import batches, score

import shardkit as sk


def make(key):
    """Makes the module."""
    return eqx.nn.MLP(64, 10, width_size=64, depth=2, activation=jax.nn.gelu, key=key)


def loss(module, batch, key):
    """Ordinary single-device code."""
    logits = jax.vmap(module)(batch["image"].reshape(-1, 64))
    return score(logits, batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_equinox(make, loss, axis_rules={"out": "fsdp"})
    trainer = sk.Trainer(
        **model,
        tx=optax.adamw(3e-3),
        data=batches(),
        num_microbatches=12,
        path_rules={"layers/*/weight": ("out", "in"), "layers/*/bias": ("out",)},
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
