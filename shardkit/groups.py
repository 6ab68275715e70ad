"""Groups of devices that compute a microbatch together.

Owns the border between what is left to the compiler within a group and what each device
does by itself. Invariant: nothing here alters a number. Which dims are cut is the
layout's, how a group splits its work the compiler's.

References:
    Xu et al., GSPMD: General and Scalable Parallelization for ML Computation Graphs
    (2021).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec

from shardkit.mesh import GROUP_AXES

__all__ = ["each_of_group"]


def each_of_group(
    fn: Callable[[list[Array]], list[Array]], specs: list[PartitionSpec]
) -> Callable[[list[Array]], list[Array]]:
    """Lets each device of a group do something with its own pieces.

    Collectives over the batch axes belong in there: beside axes that are the compiler's
    it would gather what these cut, exchange it whole, and cut it again.

    Args:
        fn: A function of arrays, of as many.
        specs: How the axes of a group cut what goes in, and what comes out.
    """
    mapped: Any = jax.shard_map(
        fn,
        in_specs=(specs,),
        out_specs=specs,
        axis_names={*GROUP_AXES},
        check_vma=False,
    )
    return mapped
