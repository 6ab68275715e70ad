"""The strategies of the literature, as places of each state of training.

Owns their names and nothing else: what they cost follows from `placement_model`.

References:
    Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models (SC 2020).
    Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel (VLDB
    2023).
    Shoeybi et al., Megatron-LM (2019).
    Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models
    (MLSys 2023), for cutting the sequence too.
    Ren et al., ZeRO-Offload: Democratizing Billion-Scale Model Training (ATC 2021).
"""

import dataclasses

from shardkit.errors import ConfigError
from shardkit.planner.placement_model import Mode, Strategy

__all__ = ["data_parallel", "fsdp", "gather_once", "offloaded", "with_tensor", "zero"]


def data_parallel(axis: str = "data") -> Strategy:
    """Every device has everything, and its own rows."""
    return zero(0, axis)


def zero(stage: int, axis: str = "data") -> Strategy:
    """ZeRO: 1 cuts the optimizer's state, 2 the gradient too, 3 all; 0 nothing.

    Raises:
        ConfigError: For another stage.

    Example:
        >>> from shardkit.planner.placement_model import StateBytes
        >>> sizes = StateBytes.mixed_adam(7.5e9)
        >>> [zero(n).volume(sizes, {"data": 64}).state_bytes / 1e9 for n in (0, 3)]
        [120.0, 1.875]
    """
    if stage not in range(4):
        raise ConfigError(f"ZeRO: expected a stage of 0 to 3, found {stage!r}")
    names = ("data parallel", "ZeRO-1", "ZeRO-2", "ZeRO-3")
    return Strategy(
        name=names[stage],
        batch_axes=(axis,),
        params={axis: Mode.GATHERED} if stage > 2 else {},
        grads={axis: Mode.SHARDED} if stage > 1 else {},
        opt_state={axis: Mode.SHARDED} if stage > 0 else {},
    )


def fsdp(data: str = "data", fsdp: str = "fsdp") -> Strategy:
    """ZeRO-3 along one axis, copies along another: hybrid sharding."""
    shards = {fsdp: Mode.SHARDED}
    return Strategy(
        name="FSDP",
        batch_axes=(data, fsdp),
        params={fsdp: Mode.GATHERED},
        grads=shards,
        opt_state=shards,
    )


def gather_once(data: str = "data", fsdp: str = "fsdp") -> Strategy:
    """What shardkit's step does: as FSDP, with one gather of all parameters."""
    return Strategy(
        name="gather once",
        batch_axes=(data, fsdp),
        params={fsdp: Mode.MATERIALISED},
        grads={fsdp: Mode.MATERIALISED},
        opt_state={fsdp: Mode.SHARDED},
    )


def with_tensor(
    strategy: Strategy, axis: str = "tensor", *, cut_sequence: bool = False
) -> Strategy:
    """The same with layers cut along one more axis, as Megatron does.

    Args:
        strategy: What to add it to.
        axis: The axis.
        cut_sequence: Whether activations between layers are cut along it too.
    """
    shards = {axis: Mode.SHARDED}
    return dataclasses.replace(
        strategy,
        name=f"{strategy.name} × tensor" + " and sequence" * cut_sequence,
        params={**strategy.params, **shards},
        grads={**strategy.grads, **shards},
        opt_state={**strategy.opt_state, **shards},
        activations={**strategy.activations, **(shards if cut_sequence else {})},
    )


def offloaded(strategy: Strategy, axis: str = "data") -> Strategy:
    """The same with the optimizer's state in host memory, cut along `axis`."""
    state = {**strategy.opt_state, axis: Mode.OFFLOADED}
    return dataclasses.replace(
        strategy, name=f"{strategy.name}, offloaded", opt_state=state
    )
