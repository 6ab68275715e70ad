"""Flax NNX modules.

Owns the way from an `nnx.Module` to functions of params and state, and back. Invariant:
every Variable of a module is trained, carried on, or fed with keys; what a loss changes
beside is refused by name. Loss functions are written as in plain NNX.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from shardkit.errors import ConfigError, PartitionError
from shardkit.frameworks.common import check_params, finish, load
from shardkit.frameworks.forwarding import is_forwarded
from shardkit.frameworks.nnx_parts import Parts, check_variables, nested
from shardkit.model import LossOutput, Model
from shardkit.model_state import Variables
from shardkit.tree import format_table, named_leaves

__all__ = ["from_nnx"]

_REMEDY = (
    "What is not trained belongs into a Variable of another type, such as "
    "nnx.Variable or nnx.BatchStat; or say which ones are trained with wrt=."
)


def from_nnx(
    make: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    eval_loss: Callable[..., Any] | None = None,
    wrt: Any = None,
    axis_rules: Mapping[str, str | None] | None = None,
    combine: Mapping[str, str] | None = None,
) -> Model:
    """Makes a model of a Flax NNX module.

    `nnx.Param`s are trained. Random streams (`nnx.RngState`) are seeded anew for each
    microbatch, by where they are in the module, and are no part of the state. All other
    Variables are the model's state: all microbatches of a step begin with the same one,
    and `combine` says how what they leave becomes one. Logical axes are read from the
    metadata of Variables. Python attributes that a loss sets are not carried.

    Args:
        make: `nnx.Rngs → nnx.Module`, called as `make(rngs)`.
        loss: `(module, microbatch) → scalar or LossOutput`. It may change the module's
            Variables, but not those that are trained.
        eval_loss: The same for evaluation; None for `loss`. It is given the module
            after `module.eval()`, and what it changes is forgotten.
        wrt: An NNX filter: which Variables are trained; None for `nnx.Param`.
        axis_rules: See `Model`.
        combine: Glob over paths of Variables, such as `"encoder/norm/mean"`: see
            `Trainer`.

    Returns:
        A model whose params and state are dicts, by the paths of the Variables.

    Raises:
        PartitionError: When it is used, if a Variable cannot be trained or carried on.
        ConfigError: If `make` is a module, is not called as `make(rngs)`, or returns
            no module.

    Example:
        >>> from flax import nnx
        >>> model = from_nnx(
        ...     lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        ...     lambda norm, microbatch: norm(microbatch["x"]).std(),
        ... )
        >>> first = model.init(jax.random.key(0))
        >>> sorted(first.params), sorted(first.state)
        (['bias', 'scale'], ['mean', 'var'])
    """
    nnx = load("flax.nnx", "flax", "from_nnx")
    wrt = nnx.Param if wrt is None else wrt
    _check_make(make, nnx.Module)

    def made(key: PRNGKeyArray) -> Any:
        # Meshes are shardkit's: a Variable with logical axes must not ask for one.
        with nnx.use_eager_sharding(False):
            module = make(nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise ConfigError(
                "from_nnx: make must return an nnx.Module, found "
                f"{type(module).__name__}"
            )
        return module

    @functools.cache
    def template() -> Parts:
        module = nnx.eval_shape(lambda: made(jax.random.key(0)))
        return Parts.of(module, wrt)

    def init(key: PRNGKeyArray) -> Variables:
        parts = Parts.of(made(key), wrt)
        params, state = nested(parts.params, True), nested(parts.state, True)
        check_params(params, _REMEDY)
        return Variables(params, state)

    def trained(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        before = template()

        def run(params: Any, state: Any) -> tuple[Any, Parts]:
            module = before.filled(params, state, key).module()
            with nnx.use_eager_sharding(False):
                value = loss(module, microbatch)
            return value, Parts.of(module, wrt)

        def left(params: Any, state: Any) -> tuple[Any, Any]:
            parts = run(params, state)[1]
            return nested(parts.params), nested(parts.state)

        value, after = run(params, state)
        check_variables(before, after)
        return finish(value, _kept(left, (params, state), after))

    def evaluated(params: Any, state: Any, microbatch: Any, key: Any) -> LossOutput:
        module = template().filled(params, state, key).module()
        module.eval()
        with nnx.use_eager_sharding(False):
            return finish((eval_loss or loss)(module, microbatch), state)

    return Model(
        init=init,
        loss=trained,
        eval_loss=evaluated,
        axis_rules=axis_rules or {},
        combine=combine or {},
    )


def _check_make(make: Any, module_type: type) -> None:
    if isinstance(make, module_type):
        name = type(make).__name__
        raise ConfigError(
            "from_nnx: expected what makes a module, nnx.Rngs → nnx.Module, found a "
            f"{name} that is made. Give from_nnx({name}, …), or lambda rngs: "
            f"{name}(…, rngs=rngs)."
        )
    # The signature of a module's class is that of Flax's metaclass, which says nothing.
    is_class = inspect.isclass(make) and issubclass(make, module_type)
    called: Any = make.__init__ if is_class else make
    signature = None
    with contextlib.suppress(TypeError, ValueError):
        signature = inspect.signature(called)
    if signature is None:
        return
    try:
        signature.bind(*[None] * (2 if is_class else 1))
    except TypeError as error:
        name = getattr(make, "__name__", type(make).__name__)
        raise ConfigError(
            f"from_nnx: make is called as make(rngs), and {name}{signature} cannot be: "
            f"{error}. Give lambda rngs: {name}(…, rngs=rngs)."
        ) from None


def _kept(left: Callable[..., Any], given: tuple[Any, Any], after: Parts) -> Any:
    """Returns the next state, in which what was not changed is what was given.

    Raises:
        PartitionError: If what is trained was changed, naming all of it.
    """
    found = nested(after.params), nested(after.state)
    olds, news = jax.tree.leaves(given), jax.tree.leaves(found)
    if len(olds) != len(news):
        return found[1]
    same = [a is b for a, b in zip(olds, news, strict=True)]
    num = len(jax.tree.leaves(given[0]))
    if not all(same[:num]):
        # A transformed function inside hands on new arrays for all that it was given.
        same = is_forwarded(left, *given)
    rows = [
        (path,)
        for (path, _), kept in zip(named_leaves(given[0]), same[:num], strict=True)
        if not kept
    ]
    if rows:
        raise PartitionError(
            "the loss changes what is trained, and the change would be lost\n"
            + format_table(rows)
            + f"\n{_REMEDY}"
        )
    kept = [a if k else b for a, b, k in zip(olds, news, same, strict=True)]
    return jax.tree.structure(found[1]).unflatten(kept[num:])
