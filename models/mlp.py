"""A multilayer perceptron on small images of digits, in plain dicts.

Shows that a model needs no framework: `init` makes a dict of annotated arrays, `loss`
is ordinary JAX. Invariant: a dropout mask depends on the key and on the layer alone.
Owns the digits data too, which come with scikit-learn; nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import shardkit as sk

__all__ = ["build", "digits", "read_digits", "score"]

NUM_PIXELS = 64
NUM_CLASSES = 10
AXIS_RULES = {"pixels": "fsdp", "mlp_in": "fsdp", "mlp": "tensor"}


def build(hidden_dim: int = 128, num_layers: int = 2, dropout: float = 0.1) -> sk.Model:
    """Makes the model that a config names.

    Args:
        hidden_dim: Width of each hidden layer.
        num_layers: Number of hidden layers, at least 1.
        dropout: Probability of dropping an element of a hidden layer.

    Returns:
        A model over microbatches `{"image": float32 [rows, 64], "label": int32
        [rows]}`.

    Raises:
        ConfigError: Naming every value that cannot be used.

    Example:
        >>> model = build(hidden_dim=8)
        >>> list(model.init(jax.random.key(0)))
        ['hidden_0', 'hidden_1', 'logits']
    """
    _check(hidden_dim=hidden_dim, num_layers=num_layers, dropout=dropout)

    def init(key: PRNGKeyArray) -> dict[str, Any]:
        keys = jax.random.split(key, num_layers + 1)
        params = {}
        num_in, in_axis = NUM_PIXELS, "pixels"
        for layer in range(num_layers):
            params[f"hidden_{layer}"] = _dense(
                keys[layer], (num_in, hidden_dim), (in_axis, "mlp")
            )
            num_in, in_axis = hidden_dim, "mlp_in"
        params["logits"] = _dense(keys[-1], (num_in, NUM_CLASSES), (in_axis, "classes"))
        return params

    def loss(params: Any, microbatch: Any, key: PRNGKeyArray | None) -> sk.LossOutput:
        stream = None if key is None else sk.keys.stream(key, "dropout")
        x = microbatch["image"]
        for layer in range(num_layers):
            x = jax.nn.gelu(_apply(params[f"hidden_{layer}"], x))
            layer_key = None if stream is None else jax.random.fold_in(stream, layer)
            x = sk.nn.dropout(x, layer_key, dropout)
        return score(_apply(params["logits"], x), microbatch)

    return sk.Model(
        init=init,
        loss=loss,
        eval_loss=lambda params, microbatch, key: loss(params, microbatch, None),
        axis_rules=AXIS_RULES,
    )


def score(
    logits: Float[Array, "batch classes"], microbatch: Any, state: Any = None
) -> sk.LossOutput:
    """Sums the losses of classified images, of rows with a weight times that weight.

    Args:
        logits: Of the images.
        microbatch: With `"label"`, and perhaps `"weight"`.
        state: What the model carries on, if it does.
    """
    losses = sk.nn.cross_entropy(logits, microbatch["label"])
    is_right = jnp.argmax(logits, axis=-1) == microbatch["label"]
    num_images = jnp.float32(losses.size)
    if "weight" in microbatch:
        weight = microbatch["weight"]
        losses, is_right, num_images = losses * weight, is_right * weight, weight.sum()
    metrics = {"accuracy": jnp.sum(is_right, dtype=jnp.float32)}
    return sk.LossOutput(losses.sum(), num_images, metrics, state)


def _check(*, hidden_dim: Any, num_layers: Any, dropout: Any) -> None:
    problems = [
        f"{name}: expected an integer, at least 1, found {value!r}"
        for name, value in (("hidden_dim", hidden_dim), ("num_layers", num_layers))
        # By exact type: True is an instance of int.
        if type(value) is not int or value < 1
    ]
    if type(dropout) not in (int, float) or not 0.0 <= dropout < 1.0:
        problems.append(
            f"dropout: expected a number, at least 0 and less than 1, found {dropout!r}"
        )
    if problems:
        raise sk.ConfigError("models.mlp: " + "; ".join(problems) + ".")


def _dense(
    key: PRNGKeyArray, shape: tuple[int, int], names: tuple[str, str]
) -> dict[str, Any]:
    # Scaled so that GELU layers neither blow up nor shrink what goes through (He et
    # al., Delving Deep into Rectifiers, 2015).
    kernel = jax.random.normal(key, shape) * (2.0 / shape[0]) ** 0.5
    return {
        "kernel": sk.axes(kernel, *names),
        "bias": sk.axes(jnp.zeros(shape[1:]), *names[1:]),
    }


def _apply(
    layer: dict[str, Any], x: Float[Array, "batch in"]
) -> Float[Array, "batch out"]:
    return x @ layer["kernel"] + layer["bias"][None]


def digits(
    *, global_batch_size: int | sk.BatchRamp, seed: int = 0, split: str = "train"
) -> Callable[[SupportsIndex], dict[str, np.ndarray]]:
    """Reads the 1797 images of digits that come with scikit-learn.

    Which images are kept for validation, a fifth of them, is fixed once and for all.

    Args:
        global_batch_size: Images of a batch, over all devices together; or a ramp.
        seed: Chooses the order of each epoch.
        split: `"train"` or `"validation"`.

    Returns:
        The global batch of a step: `{"image": float32 [batch, 64], in [0, 1],
        "label": int32 [batch]}`.

    Raises:
        DataError: If scikit-learn is not installed, or there is no such split.

    Example:
        >>> batches = digits(global_batch_size=32)
        >>> batches(0)["image"].shape
        (32, 64)
    """
    arrays = read_digits(split)
    return sk.data.ArrayBatches(arrays, global_batch_size=global_batch_size, seed=seed)


def read_digits(split: str) -> dict[str, np.ndarray]:
    """Reads all images of a split, as `digits` describes them.

    Raises:
        DataError: If scikit-learn is not installed, or there is no such split.
    """
    if split not in ("train", "validation"):
        raise sk.DataError(
            f"models.mlp: split: expected 'train' or 'validation', found {split!r}."
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise sk.DataError(
            "models.mlp: the digits come with scikit-learn, which cannot be imported "
            f"({error}). Install it: pip install scikit-learn."
        ) from error
    image, label = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(label))
    num_validation = len(rows) // 5
    rows = rows[:num_validation] if split == "validation" else rows[num_validation:]
    return {
        "image": np.asarray(image[rows] / 16.0, np.float32),
        "label": np.asarray(label[rows], np.int32),
    }
