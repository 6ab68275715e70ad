"""Several updates of many optimizers at once, on any mesh, for the tests of that."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sharded import is_key, place

from shardkit.annotations import axes
from shardkit.layout import state_shards
from shardkit.localize import Localizer
from shardkit.mesh import MeshSpec
from shardkit.program import Program
from shardkit.put import put
from shardkit.recipe import Recipe, update_arguments
from shardkit.rounding import opaque_zero
from shardkit.state_layout import lay_out
from shardkit.state_moves import to_host

NAMES = {"matrix": ("cut", None), "stack": (None, "cut", None), "vector": ("cut",)}


def mesh_of(data, fsdp):
    return MeshSpec(data=data, fsdp=fsdp).build(jax.devices()[: data * fsdp])


def init_of(shapes, dtype=np.float32, seed=0):
    """Returns a function that makes annotated parameters, whatever the key."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def init(key):
        return {
            name: axes(jnp.asarray(x, dtype), *NAMES.get(name, (None,) * x.ndim))
            for name, x in values.items()
        }

    return init


@dataclasses.dataclass
class Problem:
    """An optimizer, and the state that it begins with."""

    recipe: Recipe
    layout: object
    localizer: Localizer
    state: object

    @classmethod
    def of(cls, tx, init):
        recipe = Recipe(init=init, loss=lambda p, x, k: 0.0, tx=tx, num_microbatches=1)
        layout, _, localizer = lay_out(recipe, {"cut": "fsdp"})
        state = jax.jit(recipe.first_state)(jax.random.key(0))
        return cls(recipe, layout, localizer, state)

    def update(self, shards, state, grads):
        """One update of a state in pieces, as `Placement` does it."""
        localizer = Localizer(shards, opaque_zero(state.step))
        dims = jax.tree.map(lambda leaf: leaf.dim, self.layout)
        abstract = jax.tree.map(lambda leaf: leaf.abstract, self.layout)
        (new, metrics), (new_dims, _) = localizer(
            self.recipe.update,
            (state, grads, state.grad_exponent, None),
            update_arguments(dims, lambda _: -1),
            update_arguments(abstract, lambda x: x),
        )
        return jax.tree.map(localizer.recut, new, new_dims, self.layout), metrics


def gradients(params, step, seed=0):
    """Whole gradients, fixed and of many magnitudes."""
    rng = np.random.default_rng((seed, step))

    def draw(x):
        size = np.exp2(rng.integers(-9, 3, x.shape).astype(np.float32))
        return jnp.asarray(rng.normal(size=x.shape) * size, x.dtype)

    return jax.tree.map(draw, params)


def run_updates(problems, mesh, num_steps, seed=0):
    """Updates all problems together; lists the states on the host after each step."""
    shards = state_shards(mesh)
    layouts = [problem.layout for problem in problems]
    specs = jax.tree.map(lambda leaf: leaf.spec, layouts)

    def update(states, grads):
        return [
            problem.update(shards, state, grads)
            for problem, state in zip(problems, states, strict=True)
        ]

    program = Program(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(specs, specs[0].params),
            out_specs=[(spec, PartitionSpec()) for spec in specs],
            check_vma=False,
        )
    )
    states = [place_state(problem.state, problem.layout, mesh) for problem in problems]
    found = []
    for step in range(num_steps):
        grads = gradients(problems[0].state.params, step, seed)
        out = program(states, place_state(grads, layouts[0].params, mesh))
        states = [state for state, _ in out]
        found.append(
            [
                (host(state, problem.layout), metrics)
                for problem, (state, metrics) in zip(problems, out, strict=True)
            ]
        )
    return found, states


def place_state(state, layout, mesh):
    """Places a whole state in pieces whose padding is the worst that it could be."""
    return jax.tree.map(
        lambda x, leaf: (
            put(x, NamedSharding(mesh, PartitionSpec()))
            if is_key(x)
            else place(np.asarray(x), leaf, mesh)
        ),
        state,
        layout,
    )


def host(state, layout):
    """Copies the logical state to the host."""
    return jax.tree.map(
        lambda x, leaf: (
            np.asarray(jax.random.key_data(x)) if is_key(x) else to_host(x, leaf)
        ),
        state,
        layout,
    )


def different_leaves(found, expected):
    """Paths of leaves that differ in a bit."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    )
    return [
        jax.tree_util.keystr(path)
        for (path, a), b in pairs
        if (a.shape, a.dtype, np.asarray(a).tobytes())
        != (b.shape, b.dtype, np.asarray(b).tobytes())
    ]
