"""A residual network with batch normalisation, on 8 × 8 images of digits.

Shows a model with a state: `init` makes `sk.Variables(params, state)`, dicts of arrays,
and a loss leaves the next running statistics. Invariant: a convolution is a product
of matrices, so that no gradient contains a scatter or what a library of convolutions
may add in any order.

Shape suffixes:
    B rows, H height, W width, C channels, P channels of a patch (9 C)

References:
    He et al., Deep Residual Learning for Image Recognition (CVPR 2016).
    Ioffe & Szegedy, Batch Normalization (ICML 2015).
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import shardkit as sk
from models import mlp

__all__ = ["build", "digits"]

SIDE = 8
AXIS_RULES = {"patch": "fsdp", "features": "fsdp"}
EPSILON = 1e-5
FloatBHWC = Float[Array, "B H W C"]


def build(
    width: int = 16, num_stages: int = 3, num_blocks: int = 1, momentum: float = 0.9
) -> sk.Model:
    """Makes the model that a config names.

    Args:
        width: Channels of the first stage; every other stage has twice as many.
        num_stages: Stages, 1 to 4; every other one has half the height and width.
        num_blocks: Residual blocks of a stage.
        momentum: How much of the running statistics a step keeps.

    Returns:
        A model over microbatches `{"image": float32 [rows, 64], "label": int32
        [rows]}`, and perhaps `"weight"`: float32 [rows].

    Raises:
        ConfigError: Naming every value that cannot be used.

    Example:
        >>> model = build(width=2, num_stages=2)
        >>> made = model.init(jax.random.key(0))
        >>> sorted(made.state)
        ['stage_0_block_0', 'stage_1_block_0', 'stem']
    """
    _check(width, num_stages, num_blocks, momentum)
    blocks = {
        f"stage_{stage}_block_{block}": (
            width * 2 ** max(stage - (block == 0), 0),
            width * 2**stage,
            2 if stage and not block else 1,
        )
        for stage, block in itertools.product(range(num_stages), range(num_blocks))
    }

    def init(key: PRNGKeyArray) -> sk.Variables:
        keys = iter(jax.random.split(key, 2 + 3 * len(blocks)))
        params: dict[str, Any] = {"stem": _unit(next(keys), 9, width)}
        for name, (num_in, num_out, _) in blocks.items():
            params[name] = {
                "first": _unit(next(keys), 9 * num_in, num_out),
                "second": _unit(next(keys), 9 * num_out, num_out),
            }
            if num_in != num_out:
                params[name]["shortcut"] = _unit(next(keys), num_in, num_out)
        num_features = width * 2 ** (num_stages - 1)
        logits = jax.random.normal(next(keys), (num_features, mlp.NUM_CLASSES))
        params["logits"] = {
            "kernel": sk.axes(logits * num_features**-0.5, "features", "classes"),
            "bias": sk.axes(jnp.zeros(mlp.NUM_CLASSES), "classes"),
        }
        return sk.Variables(params, _first_statistics(params))

    def logits(
        params: Any, state: Any, image: Float[Array, "B pixels"], *, is_training: bool
    ) -> tuple[Float[Array, "B classes"], Any]:
        left: dict[str, Any] = {}
        norm = _Norm(momentum, is_training)
        x = image.reshape(-1, SIDE, SIDE, 1)
        x, left["stem"] = norm(_patches(x), params["stem"], state["stem"])
        x = jax.nn.relu(x)
        for name, (_, _, stride) in blocks.items():
            x, left[name] = _block(norm, params[name], state[name], x, stride)
        x = x.mean((1, 2)) @ params["logits"]["kernel"]
        return x + params["logits"]["bias"][None], left

    def loss(
        params: Any, state: Any, microbatch: Any, key: PRNGKeyArray | None
    ) -> sk.LossOutput:
        y, left = logits(params, state, microbatch["image"], is_training=True)
        return mlp.score(y, microbatch, left)

    def eval_loss(
        params: Any, state: Any, microbatch: Any, key: PRNGKeyArray | None
    ) -> sk.LossOutput:
        y, left = logits(params, state, microbatch["image"], is_training=False)
        return mlp.score(y, microbatch, left)

    return sk.Model(init=init, loss=loss, eval_loss=eval_loss, axis_rules=AXIS_RULES)


def _check(width: Any, num_stages: Any, num_blocks: Any, momentum: Any) -> None:
    ranges = {"width": (1, 1024), "num_stages": (1, 4), "num_blocks": (1, 64)}
    found = {"width": width, "num_stages": num_stages, "num_blocks": num_blocks}
    problems = [
        f"{name}: expected an integer from {least} to {most}, found {found[name]!r}"
        for name, (least, most) in ranges.items()
        if type(found[name]) is not int or not least <= found[name] <= most
    ]
    if type(momentum) not in (int, float) or not 0.0 <= momentum < 1.0:
        problems.append(
            f"momentum: expected a number, at least 0 and less than 1, found "
            f"{momentum!r}"
        )
    if problems:
        raise sk.ConfigError("models.resnet: " + "; ".join(problems) + ".")


def _unit(key: PRNGKeyArray, num_in: int, num_out: int) -> dict[str, Any]:
    """A product with a kernel and the normalisation of what comes out."""
    kernel = jax.random.normal(key, (num_in, num_out)) * (2.0 / num_in) ** 0.5
    return {
        "kernel": sk.axes(kernel, "patch", "channels"),
        "scale": sk.axes(jnp.ones(num_out), "channels"),
        "bias": sk.axes(jnp.zeros(num_out), "channels"),
    }


def _first_statistics(params: dict[str, Any]) -> dict[str, Any]:
    """Mean 0 and variance 1 for every unit, in a tree of their own."""
    if "scale" in params:
        zeros = jnp.zeros_like(params["bias"].value)
        return {
            "mean": sk.axes(zeros, "channels"),
            "variance": sk.axes(zeros + 1, "channels"),
        }
    return {k: _first_statistics(v) for k, v in params.items() if k != "logits"}


def _patches(x_BHWC: FloatBHWC, stride: int = 1) -> Float[Array, "B H W P"]:
    """Lays the nine neighbours of every pixel, zeros outside, side by side."""
    height, width = x_BHWC.shape[1:3]
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i, j in itertools.product(range(3), range(3))
    ]
    return jnp.concatenate(shifted, axis=-1)


def _block(
    norm: "_Norm", params: Any, state: Any, x: FloatBHWC, stride: int
) -> tuple[FloatBHWC, dict[str, Any]]:
    """What two units say is added to what came in, or to a projection of it."""
    left: dict[str, Any] = {}
    y, left["first"] = norm(_patches(x, stride), params["first"], state["first"])
    y = jax.nn.relu(y)
    y, left["second"] = norm(_patches(y), params["second"], state["second"])
    if "shortcut" in params:
        x = x[:, ::stride, ::stride]
        x, left["shortcut"] = norm(x, params["shortcut"], state["shortcut"])
    return jax.nn.relu(x + y), left


class _Norm:
    """A product, and batch normalisation of its channels."""

    def __init__(self, momentum: float, is_training: bool):
        self.momentum, self.is_training = momentum, is_training

    def __call__(
        self, x: Float[Array, "B H W P"], params: Any, state: Any
    ) -> tuple[FloatBHWC, Any]:
        """Returns what comes out, and the running statistics after it."""
        x = jnp.einsum("BHWP,PC->BHWC", x, params["kernel"])
        mean, variance = state["mean"], state["variance"]
        if self.is_training:
            # The rows of one microbatch are normalised together, never those of a
            # device: which rows these are is fixed by the grid, so the mesh enters
            # neither the outputs nor the statistics, and nothing is exchanged.
            mean = x.mean((0, 1, 2))
            variance = jnp.square(x - mean[None, None, None]).mean((0, 1, 2))
            keep, new = self.momentum, 1.0 - self.momentum
            state = {
                "mean": keep * state["mean"] + new * mean,
                "variance": keep * state["variance"] + new * variance,
            }
        factor = params["scale"] * jax.lax.rsqrt(variance + EPSILON)
        x = (x - mean[None, None, None]) * factor[None, None, None]
        return x + params["bias"][None, None, None], state


def digits(
    *, global_batch_size: int | sk.BatchRamp, seed: int = 0, split: str = "train"
) -> Callable[[Any], Any]:
    """Reads the digits of `models.mlp`, of which validation sees each image once.

    Args:
        global_batch_size: Images of a batch, over all devices together; or a ramp.
        seed: Chooses the order of each epoch.
        split: `"train"` or `"validation"`.

    Returns:
        As `models.mlp.digits` does; for validation an `sk.FixedSet`.

    Raises:
        DataError: If scikit-learn is not installed, or there is no such split.
    """
    if split == "train":
        return mlp.digits(global_batch_size=global_batch_size, seed=seed)
    if isinstance(global_batch_size, sk.BatchRamp):
        global_batch_size = global_batch_size(0)
    return sk.FixedSet(mlp.read_digits(split), global_batch_size=global_batch_size)
