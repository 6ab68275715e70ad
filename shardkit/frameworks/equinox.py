"""Equinox modules.

Owns the way from an `eqx.Module` to params and state, and back. Invariant: params keep
the structure of the module; what is neither a float array nor a layer's state is handed
on as it was made.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from shardkit.annotations import Annotated, strip
from shardkit.errors import PartitionError
from shardkit.frameworks.common import check_params, finish, load
from shardkit.keys import is_key_dtype
from shardkit.model import LossOutput, Model
from shardkit.model_state import Variables

__all__ = ["from_equinox"]


class _Kind(enum.Enum):
    PARAM = enum.auto()
    CONSTANT = enum.auto()


_PARAM, _CONSTANT = _Kind.PARAM, _Kind.CONSTANT
_REMEDY = "Keep what is not trained in arrays of integers, or in eqx.nn.StateIndex."


def from_equinox(
    make: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    eval_loss: Callable[..., Any] | None = None,
    axis_rules: Mapping[str, str | None] | None = None,
    combine: Mapping[str, str] | None = None,
) -> Model:
    """Makes a model of an Equinox module.

    Arrays of floats are trained. Other arrays are carried on as they are; what is no
    array (functions, flags, Python numbers) stays in the program. If `make` returns
    `(module, state)`, as from `eqx.nn.make_with_state`, all microbatches of a step
    begin with the same state, and `combine` says how what they leave becomes one.

    Args:
        make: `key → eqx.Module`, or `key → (eqx.Module, eqx.nn.State)`.
        loss: `(module, microbatch, key) → scalar or LossOutput`; with a state
            `(module, state, microbatch, key) → (scalar or LossOutput, state)`.
        eval_loss: The same for evaluation; None for `loss`. It is given the module
            after `eqx.nn.inference_mode`, and what it returns as state is forgotten.
        axis_rules: See `Model`.
        combine: Glob over paths of the state, such as `"layers/*norm.mean"`: see
            `Trainer`. The counts of `eqx.nn.BatchNorm` need `"last"`.

    Returns:
        A model whose params are the module, with None for what is not trained.

    Raises:
        PartitionError: When it is used, if a leaf cannot be trained or carried on.

    Example:
        >>> import equinox as eqx
        >>> model = from_equinox(
        ...     lambda key: eqx.nn.Linear(5, 3, key=key),
        ...     lambda module, batch, key: jax.vmap(module)(batch["x"]).mean(),
        ... )
        >>> model.init(jax.random.key(0)).params.weight.shape
        (3, 5)
    """
    eqx = load("equinox", "equinox", "from_equinox")

    @functools.cache
    def template() -> _Template:
        made = eqx.filter_eval_shape(make, jax.random.key(0))
        return _Template.of(*_taken_apart(eqx, made))

    def init(key: PRNGKeyArray) -> Variables:
        module, state = _taken_apart(eqx, make(key))
        params, constants = template().split(module)
        check_params(params, _REMEDY)
        return Variables(params, {"constants": constants, "layers": state})

    def trained(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        module = template().module(params, state["constants"])
        if not template().is_stateful:
            return finish(loss(module, microbatch, key), state)
        value, left = _checked(
            eqx, loss(module, _state(eqx, state["layers"]), microbatch, key)
        )
        return finish(value, {**state, "layers": left})

    def evaluated(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        module = template().module(params, state["constants"])
        module, fn = eqx.nn.inference_mode(module), eval_loss or loss
        if not template().is_stateful:
            return finish(fn(module, microbatch, key), state)
        value, _ = _checked(
            eqx, fn(module, _state(eqx, state["layers"]), microbatch, key)
        )
        return finish(value, state)

    return Model(
        init=init,
        loss=trained,
        eval_loss=evaluated,
        axis_rules=axis_rules or {},
        combine=combine or {},
    )


@dataclasses.dataclass(frozen=True)
class _Template:
    """What of a module is the same whenever it is made.

    Attributes:
        treedef: Its structure, one for the whole run: modules made twice may hold
            functions that are not equal.
        leaves: What is no array; `_PARAM` or `_CONSTANT` for arrays.
        is_stateful: Whether there is an `eqx.nn.State`.
    """

    treedef: Any
    leaves: list[Any]
    is_stateful: bool

    @classmethod
    def of(cls, module: Any, state: Any) -> "_Template":
        leaves, treedef = jax.tree.flatten(strip(module))
        return cls(treedef, [_kind(leaf) or leaf for leaf in leaves], bool(state))

    def split(self, module: Any) -> tuple[Any, Any]:
        """Returns what is trained and what is not, annotations and all."""
        leaves = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, Annotated))
        pairs = list(zip(leaves, self.leaves, strict=True))
        params, constants = (
            self.treedef.unflatten([x if kind is wanted else None for x, kind in pairs])
            for wanted in (_PARAM, _CONSTANT)
        )
        return params, constants

    def module(self, params: Any, constants: Any) -> Any:
        """Puts a module together."""
        arrays = {
            _PARAM: iter(jax.tree.leaves(params)),
            _CONSTANT: iter(jax.tree.leaves(constants)),
        }
        return self.treedef.unflatten(
            [next(arrays[x]) if isinstance(x, _Kind) else x for x in self.leaves]
        )


def _kind(leaf: Any) -> "_Kind | None":
    """What an array is; None for what is none."""
    if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
        return None
    is_param = not is_key_dtype(leaf.dtype) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return _PARAM if is_param else _CONSTANT


def _taken_apart(eqx: Any, made: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the module, and what its layers carry on, by name.

    Raises:
        PartitionError: If layers have a state that was not taken out.
    """
    is_index = lambda x: isinstance(x, eqx.nn.StateIndex)  # noqa: E731
    module, state = made, {}
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], eqx.nn.State):
        module, state = made[0], _by_name(made[1])
    found = [x for x in jax.tree.leaves(module, is_leaf=is_index) if is_index(x)]
    # Names that are no text are made anew with every module.
    if any(x.marker not in state for x in found) or any(
        not isinstance(name, str) for name in state
    ):
        raise PartitionError(
            "from_equinox: the module has layers with a state of their own; expected "
            "make to return (module, state), as eqx.nn.make_with_state(Module)(…) does"
        )
    return module, state


def _by_name(state: Any) -> dict[str, Any]:
    values, names = state.tree_flatten()
    return dict(zip(names, values, strict=True))


def _state(eqx: Any, values: Mapping[str, Any]) -> Any:
    return eqx.nn.State.tree_unflatten(tuple(values), tuple(values.values()))


def _checked(eqx: Any, returned: Any) -> tuple[Any, dict[str, Any]]:
    if not (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[1], eqx.nn.State)
    ):
        raise PartitionError(
            "from_equinox: the module has a state, so its loss must return "
            f"(loss, state), found {type(returned).__name__}"
        )
    return returned[0], _by_name(returned[1])
