"""NNX modules taken apart into Variables, and put together again.

Owns which Variable of a module is what: trained, a random stream, or state. Invariant:
all of them are somewhere. It computes no losses.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from shardkit.annotations import axes
from shardkit.errors import PartitionError
from shardkit.frameworks.common import load
from shardkit.keys import is_key_dtype, stream
from shardkit.tree import format_table

__all__ = ["Parts", "check_variables", "nested"]

Flat = dict[tuple[str, ...], Any]
"""Path → an `nnx.Variable`, or an array that a module holds without one."""

_ANNOTATIONS = ("out_sharding", "sharding_names", "sharding")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A module taken apart.

    Attributes:
        graphdef: What is no array.
        params: What is trained.
        rngs: Random streams.
        state: All else.
    """

    graphdef: Any
    params: Flat
    rngs: Flat
    state: Flat

    @classmethod
    def of(cls, module: Any, wrt: Any) -> "Parts":
        """Takes a module apart; `wrt` is the filter of what is trained."""
        nnx = load("flax.nnx", "flax", "from_nnx")
        graphdef, *states = nnx.split(module, wrt, nnx.RngState, ...)
        return cls(graphdef, *(dict(nnx.to_flat_state(state)) for state in states))

    def filled(self, params: Any, state: Any, key: PRNGKeyArray) -> "Parts":
        """Puts values in, and keys that depend on nothing but one key and a path."""
        return dataclasses.replace(
            self,
            params={p: _with(v, _at(params, p)) for p, v in self.params.items()},
            rngs={p: _with(v, _reseeded(p, v, key)) for p, v in self.rngs.items()},
            state={p: _with(v, _at(state, p)) for p, v in self.state.items()},
        )

    def module(self) -> Any:
        """Puts the module together."""
        nnx = load("flax.nnx", "flax", "from_nnx")
        flat = {**self.params, **self.rngs, **self.state}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def _is_variable(leaf: Any) -> bool:
    return hasattr(leaf, "get_raw_value")


def _value(leaf: Any) -> Any:
    return leaf.get_raw_value() if _is_variable(leaf) else leaf


def _with(leaf: Any, value: Any) -> Any:
    if not _is_variable(leaf):
        return value
    return type(leaf).from_metadata(value, leaf.get_metadata())


def _reseeded(path: tuple[Any, ...], variable: Any, key: PRNGKeyArray) -> Any:
    old = _value(variable)
    if not is_key_dtype(old.dtype):
        return jnp.zeros(old.shape, old.dtype)
    new = stream(key, _spell(path))
    return jax.random.split(new, old.shape) if old.shape else new


def _spell(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(operator.getitem, map(str, path), tree)


def nested(flat: Flat, annotated: bool = False) -> dict[str, Any]:
    """Makes dicts of the values, whatever the types of the Variables."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _annotated(path, leaf) if annotated else _value(leaf)
    return tree


def _annotated(path: tuple[Any, ...], leaf: Any) -> Any:
    value = _value(leaf)
    metadata = leaf.get_metadata() if _is_variable(leaf) else {}
    names = next((metadata[n] for n in _ANNOTATIONS if metadata.get(n)), None)
    if names is None or not jax.tree_util.all_leaves([value]):
        return value
    if len(names) != np.ndim(value):
        raise PartitionError(
            f"{_spell(path)}: expected a logical axis for each dim of "
            f"{value.dtype}{list(value.shape)}, found {tuple(names)}"
        )
    return axes(value, *names)


def check_variables(before: Parts, after: Parts) -> None:
    """Refuses Variables that come and go, as none of them would be carried on."""
    rows = []
    for name in ("params", "rngs", "state"):
        old, new = getattr(before, name), getattr(after, name)
        both = {**old, **new}
        rows += [
            (_spell(path), type(both[path]).__name__, found)
            for found, paths in (("is new", new), ("is gone", old))
            for path in paths
            if not (path in old and path in new)
        ]
    if rows:
        raise PartitionError(
            "the loss leaves other Variables in its module than it was given\n"
            + format_table(rows)
            + "\nMake every Variable in the constructor, and take out again what was "
            "sown: nnx.capture, or nnx.pop(module, nnx.Intermediate)."
        )
