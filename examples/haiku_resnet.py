"""`hk.nets.ResNet` as Haiku ships it, narrow, on digits: BatchNorm in every block."""

import haiku as hk
import jax
import optax
from digits import batches, score

import shardkit as sk


@hk.transform_with_state
def net(images, is_training):
    """Maps images `[batch, 8, 8]` to logits `[batch, 10]`."""
    resnet = hk.nets.ResNet(
        blocks_per_group=(1, 1, 1, 1),
        num_classes=10,
        bottleneck=False,
        channels_per_group=(8, 8, 16, 16),
        strides=(1, 1, 2, 1),
        initial_conv_config={"output_channels": 8, "kernel_shape": 3, "stride": 1},
    )
    return resnet(images[..., None], is_training)


def loss(apply, batch, is_training=True):
    """Ordinary single-device code; `apply` has the params, the state and the keys."""
    return score(apply(batch["image"], is_training), batch["label"])


def main(steps: int = 40, resize: dict[int, int] | None = None) -> list[str]:
    """Trains while devices come and go; returns the bits of the losses."""
    # Elastic: what follows, up to the empty line.
    model = sk.from_haiku(
        net,
        (jax.ShapeDtypeStruct((1, 8, 8), "float32"), True),
        loss,
        eval_loss=lambda apply, batch: loss(apply, batch, is_training=False),
        combine={"**/counter": "last"},
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
