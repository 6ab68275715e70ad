"""`hk.nets.MLP` as Haiku ships it, with its dropout, on digits."""

import haiku as hk
import jax
import optax
from digits import batches, score

import shardkit as sk


@hk.transform
def net(images, rate=None):
    """Maps images `[batch, 8, 8]` to logits `[batch, 10]`."""
    key = None if rate is None else hk.next_rng_key()
    return hk.nets.MLP([64, 64, 10])(hk.Flatten()(images), rate, key)


def loss(apply, batch, rate=0.1):
    """Ordinary single-device code; `apply` has the params and the keys."""
    return score(apply(batch["image"], rate), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    image = jax.ShapeDtypeStruct((1, 8, 8), "float32")
    model = sk.from_haiku(net, image, loss, axis_rules={"out": "fsdp"})
    trainer = sk.Trainer(
        **model,
        tx=optax.adamw(3e-3),
        data=batches(),
        num_microbatches=12,
        path_rules={"*/w": ("in", "out"), "*/b": ("out",)},
    )
    with trainer:
        run = trainer.run(steps, membership=sk.scripted(resize or {10: 5, 20: 2}))
        losses = [metrics.loss_bits for metrics in run]

    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(main()[-1])
