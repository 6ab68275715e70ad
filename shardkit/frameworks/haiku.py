"""Haiku functions.

Owns the way from `hk.transform` and `hk.transform_with_state` to functions of params
and state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import PRNGKeyArray

from shardkit.errors import ConfigError
from shardkit.frameworks.applied import (
    BoundApply,
    call_key,
    model_of_apply,
    positional,
)
from shardkit.frameworks.common import check_params, load
from shardkit.model import Model
from shardkit.model_state import Variables

__all__ = ["from_haiku"]

_GROWN = "Make them in transformed.init too: init_options has what it takes by name."
_REMEDY = "What is not trained belongs into hk.get_state and hk.set_state."


def from_haiku(
    transformed: Any,
    inputs: Any,
    loss: Callable[..., Any],
    *,
    init_options: Mapping[str, Any] | None = None,
    eval_loss: Callable[..., Any] | None = None,
    axis_rules: Mapping[str, str | None] | None = None,
    combine: Mapping[str, str] | None = None,
) -> Model:
    """Makes a model of a transformed Haiku function.

    A loss is given `apply`, which is `transformed.apply` with params, state and key
    filled in: `apply(x, is_training=True)` returns the output alone. Each call begins
    with the state that the last one left, all microbatches of a step begin with the
    same, and `combine` says how what they leave becomes one.

    Args:
        transformed: What `hk.transform` or `hk.transform_with_state` returned.
        inputs: What `transformed.init` takes after the key: one input or a tuple,
            arrays or `jax.ShapeDtypeStruct`.
        loss: `(apply, microbatch) → scalar or LossOutput`. `apply.params` and
            `apply.state` are there for what it needs beside outputs.
        init_options: What `transformed.init` takes by name.
        eval_loss: The same for evaluation; None for `loss`, with its dropout.
        axis_rules: See `Model`.
        combine: Glob over paths of the state: see `Trainer`. Haiku's moving averages,
            so those of `hk.BatchNorm`, count their updates and need
            `{"**/counter": "last"}`.

    Raises:
        ConfigError: If it is no transformed function, or Haiku is not installed.
        PartitionError: When it is used, if a variable cannot be trained or carried on.

    Example:
        >>> import haiku as hk, jax
        >>> model = from_haiku(
        ...     hk.transform(lambda x: hk.Linear(3)(x)),
        ...     jax.ShapeDtypeStruct((1, 5), "float32"),
        ...     lambda apply, microbatch: (apply(microbatch["x"]) ** 2).mean(),
        ... )
        >>> jax.tree.map(lambda x: x.shape, model.init(jax.random.key(0)).params)
        {'linear': {'b': (3,), 'w': (5, 3)}}
    """
    hk = load("haiku", "dm-haiku", "from_haiku")
    has_state = isinstance(transformed, hk.TransformedWithState)
    if not has_state and not isinstance(transformed, hk.Transformed):
        raise ConfigError(
            "from_haiku: expected what hk.transform or hk.transform_with_state "
            f"returns, found {type(transformed).__name__}"
        )

    def init(key: PRNGKeyArray) -> Variables:
        made = transformed.init(key, *positional(inputs), **(init_options or {}))
        params, state = made if has_state else (made, {})
        check_params(params, _REMEDY)
        return Variables(params, state)

    def bind(params: Any, state: Any, key: PRNGKeyArray) -> BoundApply:
        def call(
            number: int, state: Any, args: Sequence[Any], options: Mapping[str, Any]
        ) -> tuple[Any, Any]:
            drawn = call_key(key, "haiku", number)
            if has_state:
                return transformed.apply(params, state, drawn, *args, **options)
            return transformed.apply(params, drawn, *args, **options), state

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
