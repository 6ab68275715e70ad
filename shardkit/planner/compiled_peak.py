"""What the compiler makes of one microbatch.

Owns the one question to it: memory and collectives of a microbatch's gradient, on one
device or on a group of devices that compute it together. Both are the same on every
mesh with such groups, so that one compilation tells of all of them. It allocates and
runs nothing.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from shardkit.annotations import strip
from shardkit.errors import ConfigError
from shardkit.hlo import find_exchanges, parse_module
from shardkit.hlo.groups import span_of
from shardkit.mesh import BATCH_AXES, GROUP_AXES, MESH_AXES, MeshSpec
from shardkit.model import Model, call_loss
from shardkit.model_state import split_variables
from shardkit.planner.ledger import axes_in
from shardkit.planner.model_facts import Leaf, ModelFacts

__all__ = ["CompiledMicrobatch", "compile_microbatch"]


@dataclasses.dataclass(frozen=True)
class CompiledMicrobatch:
    """What a microbatch takes on one device of a group.

    Attributes:
        peak_bytes: At the peak, beside parameters, the batch and the gradient itself;
            None if the backend does not tell.
        exchanges: `(kind, axes)` → bytes of the buffers of collectives, on a device.
    """

    peak_bytes: int | None
    exchanges: Mapping[tuple[str, tuple[str, ...]], int]


def compile_microbatch(
    model: Model,
    microbatch: Any,
    facts: ModelFacts,
    group: Mapping[str, int] | None = None,
) -> CompiledMicrobatch:
    """Compiles the gradient of a microbatch.

    Args:
        model: What a model factory returns.
        microbatch: The arrays of one microbatch, abstract or not.
        facts: What `read_model` says of both.
        group: Axes of a group → sizes, 1 if not named; None for a single device.

    Returns:
        What holds for the backend of the default device, and for
        `ModelFacts.with_peak`.

    Raises:
        ConfigError: If there are fewer devices than a group has.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from shardkit.planner.reading import read_model
        >>> def loss(params, microbatch, key):
        ...     return jnp.sum((microbatch["x"] @ params["w"]) ** 2)
        >>> model = Model(init=lambda key: {"w": jnp.ones((8, 4))}, loss=loss)
        >>> microbatch = {"x": jnp.ones((2, 8))}
        >>> facts = read_model(model, microbatch, optax.sgd(0.1))
        >>> dict(compile_microbatch(model, microbatch, facts).exchanges)
        {}
    """
    sizes = {axis: 1 for axis in MESH_AXES} | dict(group or {})
    num_devices, devices = math.prod(sizes.values()), jax.devices()
    if num_devices > len(devices) or not {*sizes} == {*MESH_AXES}:
        raise ConfigError(
            f"compile_microbatch: expected sizes of {', '.join(GROUP_AXES)} for up to "
            f"{len(devices)} devices, found {group}"
        )
    mesh = MeshSpec(**sizes).build(devices[:num_devices])
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = split_variables(strip(jax.eval_shape(model.init, key)))
    specs = [_spec(leaf, sizes) for leaf in facts.params]

    def gradient(params: Any, state: Any, microbatch: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            out, left = call_loss(model.loss, params, state, microbatch, key)
            return out.loss_sum, (out, left)

        grads, out = jax.grad(loss, has_aux=True)(params)
        leaves, treedef = jax.tree.flatten(grads)
        if num_devices > 1:
            leaves = [*map(lax.with_sharding_constraint, leaves, specs)]
        return treedef.unflatten(leaves), out

    # As in a step: a group's axes are the compiler's, and the others are not.
    program = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names={*(BATCH_AXES if num_devices > 1 else MESH_AXES)},
        check_vma=False,
    )

    def placed(x: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    microbatch = jax.eval_shape(lambda x: x, microbatch)
    leaves, treedef = jax.tree.flatten(params)
    cut = treedef.unflatten([*map(placed, leaves, specs)])
    rest = jax.tree.map(lambda x: placed(x, PartitionSpec()), (state, microbatch, key))
    # Made once where no mesh is, as modules ask for one when they are made.
    jax.eval_shape(lambda p, rest: call_loss(model.loss, p, *rest), params, rest)
    compiled = jax.jit(program).lower(cut, *rest).compile()
    return CompiledMicrobatch(
        _peak_bytes(compiled, facts, sizes), _exchanges(compiled, sizes)
    )


def _spec(leaf: Leaf, sizes: Mapping[str, int]) -> PartitionSpec:
    """How the axes of a group cut a parameter."""
    cuts = [axis if sizes.get(axis or "", 1) > 1 else None for axis in leaf.cuts]
    return PartitionSpec(*(axis if axis in GROUP_AXES else None for axis in cuts))


def _peak_bytes(
    compiled: jax.stages.Compiled, facts: ModelFacts, sizes: Mapping[str, int]
) -> int | None:
    found: Any = compiled.memory_analysis()
    if found is None:
        return None
    gradient_bytes = sum(
        leaf.num_bytes
        // math.prod(
            sizes[axis] for entry in _spec(leaf, sizes) for axis in axes_in(entry)
        )
        for leaf in facts.params
    )
    total = found.temp_size_in_bytes + found.output_size_in_bytes
    return max(total - gradient_bytes, 0)


def _exchanges(
    compiled: jax.stages.Compiled, sizes: Mapping[str, int]
) -> dict[tuple[str, tuple[str, ...]], int]:
    found: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for each in find_exchanges(parse_module(compiled.as_text() or "")):
        # What the text does not tell goes over all of them.
        axes = span_of(each.instruction.attributes, sizes).axes
        span = tuple(a for a, n in sizes.items() if n > 1) if axes is None else axes
        found[each.kind, span] += each.count * each.num_bytes
    return dict(found)
