"""Flax Linen modules.

Owns the way from `module.init` and `module.apply` to functions of params and state.
Invariant: every collection beside `params` is carried on, or named as temporary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from shardkit.annotations import axes
from shardkit.frameworks.applied import (
    BoundApply,
    call_key,
    model_of_apply,
    positional,
    traced_once,
)
from shardkit.frameworks.common import check_params, load
from shardkit.keys import stream
from shardkit.model import Model
from shardkit.model_state import Variables

__all__ = ["from_linen"]

_GROWN = (
    "Make them in module.init (init_options has what it takes by name), or name their "
    "collections in temporary= if nothing of them is to be kept."
)
_REMEDY = (
    "What is not trained belongs into a collection of its own: "
    "self.variable('constants', name, init)."
)


def from_linen(
    module: Any,
    inputs: Any,
    loss: Callable[..., Any],
    *,
    init_options: Mapping[str, Any] | None = None,
    eval_loss: Callable[..., Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    temporary: Sequence[str] = (),
    axis_rules: Mapping[str, str | None] | None = None,
    combine: Mapping[str, str] | None = None,
) -> Model:
    """Makes a model of a Flax Linen module.

    A loss is given `apply`, which is `module.apply` with the variables and keys filled
    in: `apply(x, train=True)` returns the output alone. The collection `params` is
    trained. All others (`batch_stats`, caches) are the model's state: each call begins
    with what the last one left, all microbatches of a step begin with the same, and
    `combine` says how what they leave becomes one. Logical axes are read from boxes
    (`nn.with_partitioning`, `nn.with_logical_partitioning`).

    Args:
        module: An `nn.Module`.
        inputs: What `module.init` takes after the keys: one input or a tuple, arrays
            or `jax.ShapeDtypeStruct`.
        loss: `(apply, microbatch) → scalar or LossOutput`. `apply.params` and
            `apply.state` are there for what it needs beside outputs.
        init_options: What `module.init` takes by name, such as `{"train": False}`.
        eval_loss: The same for evaluation; None for `loss`, with its dropout.
        rngs: The streams that the module draws from, seeded by name and microbatch.
        temporary: Collections that are made by a call and not carried on, such as
            losses that are sown. `apply(…, mutable=["losses"])` returns them too.
        axis_rules: See `Model`.
        combine: Glob over paths of the state, such as `"batch_stats/**/mean"`: see
            `Trainer`.

    Raises:
        PartitionError: When it is used, if a variable cannot be trained or carried on.

    Example:
        >>> import flax.linen as nn
        >>> model = from_linen(
        ...     nn.Dense(3),
        ...     jax.ShapeDtypeStruct((1, 5), "float32"),
        ...     lambda apply, microbatch: (apply(microbatch["x"]) ** 2).mean(),
        ... )
        >>> jax.tree.map(lambda x: x.shape, model.init(jax.random.key(0)).params)
        {'bias': (3,), 'kernel': (5, 3)}
    """
    meta = load("flax.core.meta", "flax", "from_linen")

    @traced_once
    def init(key: PRNGKeyArray) -> Variables:
        keys = {"params": key, **{name: stream(key, name) for name in rngs}}
        made = module.init(keys, *positional(inputs), **(init_options or {}))
        state = {n: c for n, c in made.items() if n not in ("params", *temporary)}
        params = _annotated(meta, made.get("params", {}))
        check_params(params, _REMEDY)
        return Variables(params, _annotated(meta, state))

    def bind(params: Any, state: Any, key: PRNGKeyArray) -> BoundApply:
        def call(
            number: int, state: Any, args: Sequence[Any], options: Mapping[str, Any]
        ) -> tuple[Any, Any]:
            asked = options.get("mutable", ())
            asked = [asked] if isinstance(asked, str) else list(asked or ())
            streams = {name: call_key(key, name, number) for name in rngs}
            options = {"rngs": streams, **options, "mutable": [*state, *asked]}
            out, left = module.apply({"params": params, **state}, *args, **options)
            new = {name: left.get(name, old) for name, old in state.items()}
            extra = {name: left[name] for name in asked if name in left}
            return ((out, extra) if asked else out), new

        return BoundApply(call, params, state)

    return model_of_apply(
        init,
        bind,
        loss,
        eval_loss,
        _GROWN,
        axis_rules=axis_rules or {},
        combine=combine or {},
    )


def _annotated(meta: Any, variables: Any) -> Any:
    """Puts shardkit's annotations where Linen's boxes are."""

    def replaced(x: Any) -> Any:
        if not meta.is_axis_metadata(x):
            return x
        names = getattr(x, "names", None)
        value = meta.unbox(x)
        return value if names is None else axes(value, *names)

    return jax.tree.map(replaced, variables, is_leaf=meta.is_axis_metadata)
