"""One update of a matrix optimizer: products shared out, or done by every device.

    python benchmarks/optimizers.py [--optimizer muon] [--counts 1,2,4,8] [--layers 4]

The parameters are the matrices of a transformer's layers, cut along their longer dim.
`shared` deals the matrices out, `every device` has each do them all, and `jit` is the
same update under `jax.jit` with the same shardings, left to XLA: it keeps no bits. They
are stepped in turn, so that a busy machine disturbs them alike. Medians, in ms.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

HEADER = (
    "| devices | shared, ms | every device, ms | jit, ms | every device : shared, "
    "median [quartiles] |\n" + "|---" * 5 + "|"
)


class Update:
    """An update that is compiled for one mesh, and its state."""

    def __init__(self, tx, shapes, mesh, how):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding

        import shardkit as sk
        from shardkit.program import Program
        from shardkit.recipe import Recipe
        from shardkit.state_layout import lay_out

        def init(key):
            names = {
                n: ("cut", None) if a > b else (None, "cut") for n, (a, b) in shapes
            }
            keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
            return {
                n: sk.axes(jax.random.normal(keys[n], shape), *names[n])
                for n, shape in shapes
            }

        recipe = Recipe(init=init, loss=lambda p, x, k: 0.0, tx=tx, num_microbatches=1)
        layout, *_ = lay_out(recipe, {"cut": "fsdp"})
        shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.spec), layout)
        first = jax.jit(recipe.first_state, out_shardings=shardings)
        self._state = first(jax.random.key(0))
        self._grads = jax.tree.map(jnp.copy, self._state.params)
        if how == "jit":
            self._step = jax.jit(
                lambda state, grads: recipe.update(
                    state, grads, state.grad_exponent, None
                )[0],
                out_shardings=shardings,
                donate_argnums=(0,),
            )
        else:
            fn = on_shards(recipe, layout, mesh)
            self._step = Program(fn, donate_argnums=(0,))
        with shared_out(how == "shared"):
            self.go()

    def go(self):
        """Does one update; returns its seconds."""
        import jax

        start_s = time.perf_counter()
        self._state = jax.block_until_ready(self._step(self._state, self._grads))
        return time.perf_counter() - start_s


def on_shards(recipe, layout, mesh):
    """The update on pieces, as a run does it."""
    import jax

    from shardkit.layout import state_shards
    from shardkit.localize import Localizer
    from shardkit.recipe import update_arguments
    from shardkit.rounding import opaque_zero

    specs = jax.tree.map(lambda leaf: leaf.spec, layout)
    dims = jax.tree.map(lambda leaf: leaf.dim, layout)
    abstract = jax.tree.map(lambda leaf: leaf.abstract, layout)

    def update(state, grads):
        localizer = Localizer(state_shards(mesh), opaque_zero(state.step))
        (new, _), (new_dims, _) = localizer(
            recipe.update,
            (state, grads, state.grad_exponent, None),
            update_arguments(dims, lambda _: -1),
            update_arguments(abstract, lambda x: x),
        )
        return jax.tree.map(localizer.recut, new, new_dims, layout)

    return jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(specs, specs.params),
        out_specs=specs,
        check_vma=False,
    )


@contextlib.contextmanager
def shared_out(is_shared):
    """Has every device do all products while something is compiled, if told so."""
    from shardkit import matrices

    before = matrices.WORTH_SENDING
    if not is_shared:
        matrices.WORTH_SENDING = float("inf")
    yield
    matrices.WORTH_SENDING = before


def measure(tx, shapes, count, rounds):
    import jax

    import shardkit as sk

    mesh = sk.MeshSpec(data=1).build(jax.devices()[:count])
    updates = {
        how: Update(tx, shapes, mesh, how) for how in ("shared", "every device", "jit")
    }
    found = {how: [] for how in updates}
    for turn in range(rounds):
        for how in list(updates) if turn % 2 else list(updates)[::-1]:
            found[how].append(updates[how].go())
    ratios = [
        a / b for a, b in zip(found["every device"], found["shared"], strict=True)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    times = " | ".join(f"{1e3 * statistics.median(x):.1f}" for x in found.values())
    print(f"| {count} | {times} | {middle:.2f} [{low:.2f}, {high:.2f}] |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", default="muon", help="of optax.contrib")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    os.environ.setdefault("PJRT_NPROC", "8")
    import jax
    import optax

    jax.config.update("jax_num_cpu_devices", 8)
    from benchmarks import common

    print(common.describe_machine())
    width = arguments.width
    kinds = {"qkv": 3 * width, "out": width, "up": 4 * width, "down": 4 * width}
    shapes = [
        (f"{layer}_{kind}", (size, width) if kind == "down" else (width, size))
        for layer in range(arguments.layers)
        for kind, size in kinds.items()
    ]
    num = sum(a * b for _, (a, b) in shapes)
    print(f"{arguments.optimizer} of {len(shapes)} matrices, {num:,} parameters")
    print(HEADER)
    tx = getattr(optax.contrib, arguments.optimizer)(1e-2)
    for count in map(int, arguments.counts.split(",")):
        if count <= len(jax.devices()):
            measure(tx, shapes, count, arguments.rounds)


if __name__ == "__main__":
    main()
