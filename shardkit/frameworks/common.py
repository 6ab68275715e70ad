"""What the modules for single frameworks share.

Owns how a framework is imported, what can be trained, and how what a loss returned and
what its module carries on become one. It imports no framework by itself.
"""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from shardkit.errors import ConfigError, PartitionError
from shardkit.keys import is_key_dtype
from shardkit.model import LossOutput, call_loss
from shardkit.tree import format_table, named_leaves

__all__ = ["check_params", "finish", "load"]


def load(module: str, package: str, caller: str) -> Any:
    """Imports a framework when it is first needed.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{caller} needs {error.name}, which is not installed: "
            f"pip install {package}"
        ) from error


def check_params(params: Any, remedy: str) -> None:
    """Checks that all that is to be trained can be.

    Args:
        params: Arrays, annotated or not.
        remedy: Where a framework keeps other things.

    Raises:
        PartitionError: Naming all leaves that are no floats.
    """
    bad = [
        (path, f"{leaf.dtype}{list(leaf.shape)}")
        for path, leaf in named_leaves(params)
        if is_key_dtype(leaf.dtype) or not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if bad:
        raise PartitionError(
            "params are trained and must be floats; found\n"
            + format_table(bad)
            + f"\n{remedy}"
        )


def finish(value: Any, state: Any) -> LossOutput:
    """Adds the state that a model leaves to what its loss returned.

    Args:
        value: A scalar or a `LossOutput`.
        state: The next state, by the framework's own rules.

    Raises:
        PartitionError: If it is anything else, or has a state already.
    """
    out, own = call_loss(lambda *_: value, None, None, None, None)
    if own is not None:
        raise PartitionError(
            "a loss of a framework's module returns no state, found "
            f"LossOutput(state={type(own).__name__}): what the module holds is carried "
            "on without it. Return LossOutput(loss_sum, weight, metrics)."
        )
    # What a loss set to a number of Python's becomes an array like any other.
    state = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), state
    )
    return dataclasses.replace(out, state=state)
