"""Groups of devices that compute a microbatch together.

Owns the border between what is left to the compiler within a group and what each device
does by itself. Invariant: nothing here alters a number. Which dims are cut is the
layout's, how a group splits its work the compiler's.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

from shardkit.mesh import GROUP_AXES

__all__ = ["each_of_group", "pin"]

T = TypeVar("T")


def pin(tree: T, specs: Any) -> T:
    """Keeps arrays cut within a group as they should be.

    Args:
        tree: Arrays, as the batch axes cut them.
        specs: How the axes of a group cut each, a tree like it; empty or None where a
            group is one device.
    """
    return jax.tree.map(lax.with_sharding_constraint, tree, specs) if specs else tree


def each_of_group(
    fn: Callable[[list[Array]], list[Array]], specs: Sequence[PartitionSpec]
) -> Callable[[list[Array]], list[Array]]:
    """Lets each device of a group do something with its own pieces.

    Collectives over the batch axes belong in there: beside axes that are the compiler's
    it would gather what these cut, exchange it whole, and cut it again.

    Args:
        fn: A function of arrays, of as many.
        specs: How the axes of a group cut what goes in, and what comes out; empty where
            a group is one device, which does it anyway.
    """
    if not specs:
        return fn
    specs = list(specs)
    mapped: Any = jax.shard_map(
        fn,
        in_specs=(specs,),
        out_specs=specs,
        axis_names={*GROUP_AXES},
        check_vma=False,
    )
    return mapped
