"""What a model carries from step to step beside its parameters.

Owns `Variables`, and how the states that microbatches leave behind become one.
Invariant: every microbatch begins with the state before the step, and what they leave
is combined in an order that no device enters. It computes no losses.

References:
    Ioffe & Szegedy, Batch Normalization (ICML 2015): the statistics this is mostly for.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from shardkit.errors import ConfigError, PartitionError
from shardkit.exact_sum import exact_sum
from shardkit.rounding import not_broadcast
from shardkit.tree import find_rule, format_table, match_path, named_leaves

__all__ = [
    "COMBINE",
    "Combiner",
    "Variables",
    "check_state",
    "split_variables",
    "unused_combine",
]

COMBINE = ("mean", "sum", "last")
"""How a leaf of the state becomes one: the mean of what all microbatches left, which is
what they left if it is the same; what was there and all that was added to it; or what
the last microbatch left. Sums of floats that reach 2¹²⁰ are NaN."""

_KEPT = "kept"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """What `init` returns for a model with a state of its own.

    Then `loss` is `(params, state, microbatch, key) → LossOutput`, whose `state` is the
    next one.

    Attributes:
        params: What is trained; annotated or not.
        state: What is not, such as statistics and counters; likewise.
    """

    params: Any
    state: Any


def split_variables(made: Any) -> tuple[Any, Any]:
    """Returns parameters and state, None where there is none."""
    return (made.params, made.state) if isinstance(made, Variables) else (made, None)


def unused_combine(state: Any, rules: Mapping[str, str]) -> list[str]:
    """Says which rules fit no leaf of a state, as what is misspelled does."""
    paths = [path for path, _ in named_leaves(state)]
    return [
        f"combine: no leaf of the state fits {glob!r}"
        for glob, kind in rules.items()
        if not any(find_rule(path, {glob: kind}) for path in paths)
    ]


def check_state(before: Any, after: Any) -> None:
    """Checks that a loss leaves a state like the one it was given.

    Raises:
        PartitionError: If it does not, naming all leaves.
    """
    wanted, found = dict(named_leaves(before)), dict(named_leaves(after))
    rows = [
        (
            path,
            f"expected {_spell(wanted.get(path))}",
            f"found {_spell(found.get(path))}",
        )
        for path in {**wanted, **found}
        if _spell(wanted.get(path)) != _spell(found.get(path))
    ]
    if not rows and jax.tree.structure(before) != jax.tree.structure(after):
        rows = [
            (f"expected {jax.tree.structure(before)}",),
            (f"found {jax.tree.structure(after)}",),
        ]
    if rows:
        raise PartitionError(
            "a loss must leave a state like the one it was given\n"
            + format_table(rows)
            + "\nReturn it as sk.LossOutput(…, state=…), of the same tree, shapes and "
            "dtypes; `init` gives the first one, as sk.Variables(params, state)."
        )


def _spell(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


@dataclasses.dataclass(frozen=True)
class Combiner:
    """Makes one state of those that microbatches leave behind, on every device.

    Floats are averaged as float32, exactly where that is asked for.

    Attributes:
        kinds: How, for every leaf.
        num_microbatches: How many leave one.
        exact: Whether the sum keeps its bits on every mesh.
    """

    kinds: tuple[str, ...] = ()
    num_microbatches: int = 1
    exact: bool = True

    @classmethod
    def plan(
        cls,
        state: Any,
        is_kept: list[bool],
        rules: Mapping[str, str],
        num_microbatches: int,
        exact: bool,
    ) -> "Combiner":
        """Decides for every leaf of an abstract state.

        Args:
            state: Before the step.
            is_kept: Whether a loss hands the leaf on untouched, in flattening order.
            rules: Glob over paths → one of `COMBINE`; the first that fits counts.
            num_microbatches: How many there are.
            exact: See `Combiner`.

        Raises:
            PartitionError: Naming all leaves for which it cannot be decided.
            ConfigError: If a rule asks for something else.
        """
        unknown = {glob: kind for glob, kind in rules.items() if kind not in COMBINE}
        if unknown:
            raise ConfigError(
                f"combine: expected one of {', '.join(map(repr, COMBINE))} for each "
                f"glob, found {unknown}"
            )
        kinds, bad = [], []
        for (path, leaf), kept in zip(named_leaves(state), is_kept, strict=True):
            asked = match_path(path, rules)
            fit = _fitting(leaf.dtype)
            kind = _KEPT if kept else asked or ("mean" if "mean" in fit else None)
            if kind in (_KEPT, *fit):
                kinds.append(kind)
            else:
                row = f"{leaf.dtype}{list(leaf.shape)}", f"found {asked or 'no rule'}"
                bad.append((path, *row, f"can be {' or '.join(fit) or 'kept'}"))
        if bad:
            raise PartitionError(
                "the loss changes this state, and it is not known how the changes of "
                "several microbatches become one\n" + format_table(bad) + "\nGive "
                f"combine={{glob: {' | '.join(map(repr, COMBINE))}}}, or return the "
                "leaf as it was given."
            )
        return cls(tuple(kinds), num_microbatches, exact)

    def empty(self, leaves: list[Array]) -> list[Array]:
        """Room for what the microbatches of this device leave."""
        return [
            jnp.zeros((self.num_microbatches, *leaf.shape), jnp.float32)
            if _is_added_up(kind, leaf.dtype)
            else jnp.zeros(leaf.shape, jnp.uint32)
            for kind, leaf in self._changing(leaves)
        ]

    def _changing(self, leaves: list[Array]) -> list[tuple[str, Array]]:
        pairs = zip(self.kinds, leaves, strict=True)
        return [(kind, leaf) for kind, leaf in pairs if kind != _KEPT]

    def put(
        self, held: list[Array], old: list[Array], new: list[Array], i: Array
    ) -> list[Array]:
        """Adds what microbatch `i` left."""
        found = []
        pairs = zip(self._changing(old), self._changing(new), held, strict=True)
        for (kind, before), (_, after), room in pairs:
            if kind == "last":
                is_last = i == self.num_microbatches - 1
                found.append(jnp.where(is_last, _bits(after), room))
            elif _is_added_up(kind, before.dtype):
                row = after.astype(jnp.float32)
                if kind == "sum":
                    # Infinity less infinity would not be nothing.
                    is_same = _bits(after) == _bits(before)
                    change = row - before.astype(jnp.float32)
                    row = jnp.where(is_same, jnp.float32(0), change)
                found.append(lax.dynamic_update_index_in_dim(room, row, i, 0))
            else:
                found.append(
                    room + after.astype(jnp.uint32) - before.astype(jnp.uint32)
                )
        return found

    def finish(
        self,
        held: list[Array],
        old: list[Array],
        add: Callable[[list[Array]], list[Array]],
        zero: Array,
    ) -> list[Array]:
        """Combines what all devices hold; the same on each of them.

        Args:
            held: By this device.
            old: The state before the step.
            add: Adds integers over all devices.
            zero: An int32 zero unknown to the compiler.
        """
        # As integers, what only one device knows stays as it is.
        words = add([lax.bitcast_convert_type(x, jnp.int32) for x in held])
        rooms = iter(
            lax.bitcast_convert_type(word, room.dtype)
            for word, room in zip(words, held, strict=True)
        )
        found = []
        for kind, before in zip(self.kinds, old, strict=True):
            if kind == _KEPT:
                found.append(before)
            elif kind == "last":
                found.append(_from_bits(next(rooms), before.dtype))
            elif _is_added_up(kind, before.dtype):
                after = self._float(kind, next(rooms), before, zero)
                found.append(after.astype(before.dtype))
            else:
                after = before.astype(jnp.uint32) + next(rooms)
                found.append(after.astype(before.dtype))
        return found

    def _float(self, kind: str, rows: Array, before: Array, zero: Array) -> Array:
        """Combines a row for each microbatch, `float32 [microbatches, ...]`."""
        total = exact_sum(rows, [0]) if self.exact else jnp.sum(rows, axis=0)
        bits = _bits(rows)
        if kind == "mean":
            count = jnp.float32(self.num_microbatches)
            mean = total / not_broadcast(count, total, zero)
            # What all have left alike is that, whatever a sum would round.
            return jnp.where((bits == bits[:1]).all(axis=0), rows[0], mean)
        old = before.astype(jnp.float32)
        return jnp.where((bits == 0).all(axis=0), old, old + total)


def _fitting(dtype: Any) -> tuple[str, ...]:
    """How leaves of a dtype can be combined."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or dtype.itemsize > 4:
        return ()
    if jnp.issubdtype(dtype, jnp.floating):
        return COMBINE
    if not jnp.issubdtype(dtype, jnp.integer):
        return ("last",)
    return ("sum", "last") if jnp.iinfo(dtype).bits >= 8 else ()


def _is_added_up(kind: str, dtype: Any) -> bool:
    """Whether there is a row for each microbatch, as sums of floats need them all."""
    return kind != "last" and jnp.issubdtype(dtype, jnp.floating)


def _bits(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _from_bits(bits: Array, dtype: Any) -> Array:
    if dtype == jnp.bool_:
        return bits.astype(jnp.bool_)
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    return lax.bitcast_convert_type(bits.astype(unsigned), dtype)
