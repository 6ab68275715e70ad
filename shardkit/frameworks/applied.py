"""Modules that are functions of variables: what Linen and Haiku share.

Owns `apply` with its variables and keys filled in, and the model made of it. Invariant:
the keys of a call depend on the microbatch and on how many calls came before.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PRNGKeyArray

from shardkit.errors import PartitionError
from shardkit.frameworks.common import finish
from shardkit.keys import stream
from shardkit.model import LossOutput, Model
from shardkit.tree import format_table, named_leaves

__all__ = ["BoundApply", "call_key", "model_of_apply", "positional", "traced_once"]


def traced_once(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Traces a function of a key when it is first called, and replays that later.

    Some libraries put their own sharding constraints where they find a mesh. shardkit
    asks for shapes first, where there is none.

    Example:
        >>> noise = traced_once(lambda key: {"x": jax.random.normal(key, (2,))})
        >>> noise(jax.random.key(0))["x"].shape
        (2,)
    """

    @functools.cache
    def trace() -> tuple[Callable[..., Any], Any]:
        key = jax.eval_shape(lambda: jax.random.key(0))
        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(key)
        return jaxpr_as_fun(traced), jax.tree.structure(shapes)

    def replay(key: PRNGKeyArray) -> Any:
        run, structure = trace()
        return structure.unflatten(run(key))

    return replay


def positional(inputs: Any) -> tuple[Any, ...]:
    """The inputs that a module is initialized with, zeros where only shapes are known.

    Example:
        >>> [x.shape for x in positional(jax.ShapeDtypeStruct((2, 3), "float32"))]
        [(2, 3)]
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return jax.tree.map(_example, inputs)


def _example(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype)
    # On no device: where what uses it will run is not decided here.
    return np.asarray(x) if isinstance(x, jax.Array) else x


def call_key(key: PRNGKeyArray, name: str, number: int) -> PRNGKeyArray:
    """The key of a stream for one of the calls that a loss makes.

    Example:
        >>> keys = [call_key(jax.random.key(0), "dropout", n) for n in (0, 1)]
        >>> bool(keys[0] == keys[1])
        False
    """
    return stream(key, f"{name}/{number}" if number else name)


class BoundApply:
    """What a loss is given for `apply`: variables and random keys are filled in.

    Calls follow one another: each begins with the state that the last one left, and
    draws with keys of its own. It changes by being called, and so belongs into no
    `jax.vmap` or `jax.checkpoint`; what has to be mapped is mapped inside the module.

    Args:
        call: `(number of the call, state, args, options) → (what it returns, the next
            state)`.
        params: What is trained.
        state: What is not, before the first call.
    """

    def __init__(
        self,
        call: Callable[[int, Any, Sequence[Any], Mapping[str, Any]], tuple[Any, Any]],
        params: Any,
        state: Any,
    ) -> None:
        self._call, self._num_calls = call, 0
        self.params, self.state = params, state

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Applies the module to inputs, with its own options."""
        out, self.state = self._call(self._num_calls, self.state, args, options)
        self._num_calls += 1
        return out


def model_of_apply(
    init: Callable[[Any], Any],
    bind: Callable[[Any, Any, PRNGKeyArray], BoundApply],
    loss: Callable[..., Any],
    eval_loss: Callable[..., Any] | None,
    remedy: str,
    **options: Any,
) -> Model:
    """Makes a model of what has an `apply`.

    Args:
        init: `key → Variables`.
        bind: `(params, state, key) → apply`.
        loss: `(apply, microbatch) → scalar or LossOutput`.
        eval_loss: The same for evaluation; None for `loss`.
        remedy: What to do where a module leaves another state than it was given.
        **options: Of `Model`.
    """

    def trained(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        apply = bind(params, state, key)
        value = loss(apply, microbatch)
        _check_leaves(state, apply.state, remedy)
        return finish(value, apply.state)

    def evaluated(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        apply = bind(params, state, key)
        return finish((eval_loss or loss)(apply, microbatch), state)

    return Model(init=init, loss=trained, eval_loss=evaluated, **options)


def _check_leaves(before: Any, after: Any, remedy: str) -> None:
    """Refuses a state that another call could not begin with."""
    old, new = dict(named_leaves(before)), dict(named_leaves(after))
    rows = [(path, "is new") for path in new if path not in old]
    rows += [(path, "is gone") for path in old if path not in new]
    if rows:
        raise PartitionError(
            "the module leaves other variables than it was given\n"
            + format_table(rows)
            + f"\n{remedy}"
        )
