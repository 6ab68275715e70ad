"""What the compiler takes for one microbatch.

Owns the one question to it: the memory of a microbatch's gradient on one device. It is
the same on every mesh that does not cut microbatches, so that one compilation makes the
memory of all of them exact. It allocates and runs nothing.
"""

from typing import Any

import jax

from shardkit.annotations import strip
from shardkit.model import Model, call_loss
from shardkit.model_state import split_variables

__all__ = ["compiled_peak_bytes"]


def compiled_peak_bytes(model: Model, microbatch: Any) -> int | None:
    """Compiles the gradient of a microbatch and returns what it takes at the peak.

    Args:
        model: What a model factory returns.
        microbatch: The arrays of one microbatch, abstract or not.

    Returns:
        Bytes beside parameters, the batch and the gradient itself, for
        `dataclasses.replace(facts, peak_bytes=…)`; None if the backend does not tell.
        They hold for the backend of the default device.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = split_variables(strip(jax.eval_shape(model.init, key)))

    def gradient(params: Any, state: Any, microbatch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            out, left = call_loss(model.loss, params, state, microbatch, key)
            return out.loss_sum, (out, left)

        return jax.grad(loss, has_aux=True)(params)

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)),
        microbatch,
    )
    compiled = jax.jit(gradient).lower(params, state, abstract, key).compile()
    found: Any = compiled.memory_analysis()
    if found is None:
        return None
    gradient_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    total = found.temp_size_in_bytes + found.output_size_in_bytes
    return max(total - gradient_bytes, 0)
