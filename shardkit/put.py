"""Places values that every process has on a mesh.

Owns `put`. Invariant: no process needs what another one has. It moves no state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from shardkit.keys import is_key_dtype

__all__ = ["put"]


def put(x: Any, sharding: NamedSharding) -> Array:
    """Places a value that every process has on a mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if is_key_dtype(jnp.asarray(x).dtype):
        data = put(np.asarray(jax.random.key_data(x)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(np.shape(x), sharding, lambda i: x[i])
