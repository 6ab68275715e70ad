"""The arguments of a compiled program, and how they lie.

Owns what is known of each: its name, its shape, and how the mesh cuts it. Invariant:
what neither the text nor the executable tells is None.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.hlo import Module, shape_bytes

__all__ = ["Argument", "read_arguments"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Argument:
    """One array that a program is called with.

    Attributes:
        name: What JAX calls it, such as `"params['w']"`, or the caller's own name.
        num_bytes: Of it on one device.
        shape: Its global shape; None if unknown.
        spec: How the mesh cuts it, an entry for every dim; None if unknown.
    """

    name: str
    num_bytes: int
    shape: tuple[int, ...] | None = None
    spec: tuple[tuple[str, ...], ...] | None = None

    def dims_cut_by(self, axes: tuple[str, ...]) -> list[int]:
        """The dims that any of these axes cuts."""
        return [d for d, cut in enumerate(self.spec or ()) if {*cut} & {*axes}]

    def spec_without(self, axes: tuple[str, ...]) -> str:
        """Writes its `PartitionSpec` if these axes no longer cut it."""
        kept = [tuple(a for a in cut if a not in axes) for cut in self.spec or ()]
        return spell_spec(kept)


def spell_spec(spec: Any) -> str:
    """Writes a `PartitionSpec`.

    Example:
        >>> spell_spec([(), ("data", "fsdp"), ("tensor",)])
        "P(None, ('data', 'fsdp'), 'tensor')"
    """
    words = []
    for cut in spec:
        each = repr(cut[0]) if len(cut) == 1 else repr(tuple(cut))
        words.append(each if cut else "None")
    return f"P({', '.join(words)})"


def read_arguments(
    module: Module,
    compiled: jax.stages.Compiled | None = None,
    names: Mapping[str, str] | None = None,
) -> list[Argument]:
    """Lists the arguments in the order of the program's parameters.

    Args:
        module: The program's text.
        compiled: The program itself, which knows shapes and shardings.
        names: JAX's name → the name to use.
    """
    known = _placed(compiled) if compiled is not None else []
    if len(known) != len(module.parameters):
        # Constants can be handed over as arguments too; then none can be told apart.
        known = [(None, None)] * len(module.parameters)
    return [
        Argument(
            name=(names or {}).get(each.op_name, each.op_name) or each.name,
            num_bytes=shape_bytes(each.shape),
            shape=shape,
            spec=spec,
        )
        for each, (shape, spec) in zip(module.parameters, known, strict=True)
    ]


def _placed(compiled: jax.stages.Compiled) -> list[tuple[Any, Any]]:
    """Lists shapes and cuts of the arguments that the program uses."""
    shardings: Any = compiled.input_shardings
    infos = jax.tree.leaves(compiled.args_info)
    # One that the program does not use has no sharding.
    leaves = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    if len(infos) != len(leaves):
        return []
    return [
        (tuple(info.shape), _spec(sharding, len(info.shape)))
        for info, sharding in zip(infos, leaves, strict=True)
        if sharding is not None
    ]


def _spec(sharding: Any, ndim: int) -> tuple[tuple[str, ...], ...] | None:
    if not isinstance(sharding, NamedSharding):
        return ((),) * ndim if sharding.is_fully_replicated else None
    spec: PartitionSpec = sharding.spec
    entries: list[Any] = [*spec, *[None] * (ndim - len(spec))]
    return tuple(
        () if e is None else (e,) if isinstance(e, str) else tuple(e)
        for e in entries[:ndim]
    )
