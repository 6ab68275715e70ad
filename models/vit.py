"""A small vision transformer in Flax Linen, on scikit-learn's digits.

Shows a module as people write it, with Flax's own layers, boxes and dropout: only the
last call is shardkit's. Images are read by `models.mlp`.

References:
    Dosovitskiy et al., An Image is Worth 16x16 Words (ICLR 2021).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import shardkit as sk
from models.mlp import NUM_CLASSES, digits, score

__all__ = ["ViT", "build", "digits"]

SIDE = 8
AXIS_RULES = {"embed": "fsdp"}
_KERNEL = nn.initializers.xavier_uniform()


def _dense(num_features: int, *names: str) -> nn.Dense:
    kernel = nn.with_logical_partitioning(_KERNEL, names)
    return nn.Dense(num_features, kernel_init=kernel)


class Block(nn.Module):
    """Attention between patches, then a wide layer, each added to what came in."""

    num_heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Maps `[batch, patches, embed]` to the same shape."""
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.dropout,
            deterministic=not train,
            broadcast_dropout=False,
        )
        x = x + attention(nn.LayerNorm()(x))
        hidden = nn.gelu(_dense(4 * width, "embed", "mlp")(nn.LayerNorm()(x)))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return x + _dense(width, "mlp", "embed")(hidden)


class ViT(nn.Module):
    """Patches, blocks, and a head on their mean.

    Attributes:
        patch_size: Pixels along each side of a patch; divides 8.
        width: Of a patch's vector; a multiple of `num_heads`.
        num_layers: How many blocks.
        num_heads: How many heads of attention.
        dropout: Probability of dropping an element.
    """

    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    dropout: float

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch 64"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Computes logits."""
        p, n = self.patch_size, SIDE // self.patch_size
        x = image.reshape(-1, n, p, n, p).transpose(0, 1, 3, 2, 4)
        x = _dense(self.width, "pixels", "embed")(x.reshape(-1, n * n, p * p))
        place = nn.with_logical_partitioning(
            nn.initializers.normal(0.02), (None, "embed")
        )
        places: Any = self.param("place", place, (n * n, self.width))
        x = x + places
        for _ in range(self.num_layers):
            x = Block(self.num_heads, self.dropout)(x, train)
        return _dense(NUM_CLASSES, "embed", "classes")(nn.LayerNorm()(x).mean(axis=1))


def build(
    patch_size: int = 2,
    width: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    dropout: float = 0.1,
) -> sk.Model:
    """Makes the model that a config names.

    Args:
        patch_size: See `ViT`, like the others.
        width: Of a patch's vector.
        num_layers: How many blocks.
        num_heads: Heads of attention.
        dropout: Probability of dropping an element.

    Returns:
        A model over microbatches `{"image": float32 [rows, 64], "label": int32
        [rows]}`.

    Raises:
        ConfigError: Naming every value that cannot be used.

    Example:
        >>> model = build(width=8, num_layers=1)
        >>> print(sk.annotate(model).unplaced[:1])
        ('params/Block_0/Dense_0/bias',)
    """
    _check(patch_size, width, num_layers, num_heads, dropout)
    module = ViT(patch_size, width, num_layers, num_heads, dropout)

    def loss(apply: Any, microbatch: Any, train: bool = True) -> sk.LossOutput:
        return score(apply(microbatch["image"], train=train), microbatch)

    return sk.from_linen(
        module,
        jax.ShapeDtypeStruct((1, SIDE * SIDE), jnp.float32),
        loss,
        eval_loss=lambda apply, microbatch: loss(apply, microbatch, train=False),
        axis_rules=AXIS_RULES,
    )


def _check(
    patch_size: Any, width: Any, num_layers: Any, num_heads: Any, dropout: Any
) -> None:
    counts = {
        "patch_size": patch_size,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
    }
    problems = [
        f"{name}: expected an integer, at least 1, found {value!r}"
        for name, value in counts.items()
        if type(value) is not int or value < 1
    ]
    if not problems and SIDE % patch_size:
        problems.append(f"patch_size: expected a divisor of {SIDE}, found {patch_size}")
    if not problems and width % num_heads:
        problems.append(
            f"width: expected a multiple of num_heads = {num_heads}, found {width}"
        )
    if type(dropout) not in (int, float) or not 0.0 <= dropout < 1.0:
        problems.append(
            f"dropout: expected a number, at least 0 and less than 1, found {dropout!r}"
        )
    if problems:
        raise sk.ConfigError("models.vit: " + "; ".join(problems) + ".")
