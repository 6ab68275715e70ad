"""How a group of devices shares a transformer's activations, and where these wait.

Owns what `gpt.py` and `moe.py` ask of the compiler, which no number depends on but by
rounding. Where no group computes a microbatch together, nothing is asked.

References:
    Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models
    (MLSys 2023).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

import shardkit as sk
from models.gpt_config import GPTConfig

__all__ = ["keep_input", "recomputed", "share_stream", "whole_context"]

_INPUT = "block_input"


def share_stream(config: GPTConfig, x_BTD: Float[Array, "B T D"]) -> Any:
    """Asks for rows to be cut by `expert`, and positions by `context`.

    With `sequence_parallel` also `tensor` cuts positions, and norms and dropout are
    shared too.
    """
    positions = ("context", "tensor") if config.sequence_parallel else "context"
    return sk.constrain(x_BTD, "expert", positions, None)


def whole_context(x_BTGK: Float[Array, "B T G K"]) -> Any:
    """Asks for keys or values of all positions, to be looked at by those of a device.

    As each device then has as much attention to compute, whatever its positions, what a
    causal mask leaves out is balanced.
    """
    return sk.constrain(x_BTGK, "expert", None, ..., ...)


def keep_input(x_BTD: Float[Array, "B T D"]) -> Any:
    """Names what a block that is computed anew begins with."""
    return checkpoint_name(x_BTD, _INPUT)


def recomputed(run: Callable[..., Any], config: GPTConfig) -> Callable[..., Any]:
    """Computes blocks anew in the backward pass, from inputs kept near or far."""
    policy = None
    if config.offload_activations:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    # Outside a scan, XLA's CSE would undo the recomputation.
    prevent_cse = not config.scan_layers
    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)
