"""Moving arrays between layouts: shardkit beside what JAX and Orbax offer.

    python benchmarks/reshard.py [--gib 1] [--rounds 5] [--orbax] [--leaves large|many]

Every round makes fresh arrays, since JAX keeps a host copy of an array that it has
once read, and moves them each way in turn. GB/s is the state's bytes over time.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

HEADER = (
    "| case | leaves | | ms, median [quartiles] | GB/s | µs a leaf | / best other |\n"
    + "|---" * 7
    + "|"
)


def cases(num_devices):
    """Names of cases → the two shardings, as (device count, dim that is cut)."""
    if num_devices >= 8:
        return {
            "8 to 6": ((8, 0), (6, 0)),
            "8 to 4": ((8, 0), (4, 0)),
            "8 to 1": ((8, 0), (1, 0)),
            "4 to 8": ((4, 0), (8, 0)),
            "rows to columns": ((8, 0), (8, 1)),
            "columns to rows": ((8, 1), (8, 0)),
        }
    return {
        "2 to 1": ((2, 0), (1, 0)),
        "1 to 2": ((1, 0), (2, 0)),
        "rows to columns": ((2, 0), (2, 1)),
    }


def shapes_of(leaves, num_bytes):
    """Shapes of float32 leaves: few of 64 MiB and more, or GPT-2 XL with AdamW."""
    if leaves == "large":
        rows = 24 * 128
        columns = max(1, (64 << 20) // 4 // rows // 48) * 48
        count = max(1, num_bytes // (rows * columns * 4))
        return [(rows, columns)] * count
    embed, layers = 1600, 48
    layer = [(embed, 3 * embed), (embed, embed), (embed, 4 * embed), (4 * embed, embed)]
    small = [(3 * embed,), (embed,), (4 * embed,), *[(embed,)] * 5]
    params = [*(layer + small) * layers, (50304, embed), (1024, embed), (embed,)]
    scale = max(1, round(sum(4 * 3 * _size(s) for s in params) / num_bytes))
    cut = [(max(48, shape[0] // scale // 48 * 48), *shape[1:]) for shape in params]
    return cut * 3


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size


def sharding(num_devices, dim, ndim):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",))
    if dim is None:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * min(dim, ndim - 1), "fsdp"))


def through_orbax(tree, wanted):
    """Saves, and restores to the new layout: what a restart does."""
    import jax
    import orbax.checkpoint as ocp

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
            checkpointer.wait_until_finished()
            like = [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
                for x, s in zip(tree, wanted, strict=True)
            ]
            return checkpointer.restore(path, like)


def ways(old, new, with_orbax):
    """Name → a function of arrays and shardings."""
    import jax

    import shardkit as sk

    found = {"shardkit": sk.reshard, "device_put": jax.device_put}
    if old[0] == new[0]:
        compiled = {}

        def jitted(tree, wanted):
            if "fn" not in compiled:
                compiled["fn"] = jax.jit(lambda tree: tree, out_shardings=wanted)
            return compiled["fn"](tree)

        found["jitted identity"] = jitted
    if with_orbax:
        found["Orbax"] = through_orbax
    return found


def measure(name, old, new, shapes, arguments):
    import jax
    import jax.numpy as jnp
    import numpy as np

    sources = [sharding(*old, len(shape)) for shape in shapes]
    wanted = [sharding(*new, len(shape)) for shape in shapes]
    make = jax.jit(
        lambda seed: [
            (jax.lax.iota(jnp.float32, _size(s)) + seed + i).reshape(s)
            for i, s in enumerate(shapes)
        ],
        out_shardings=sources,
    )
    found = {way: [] for way in ways(old, new, arguments.orbax)}
    movers = ways(old, new, arguments.orbax)
    num_bytes = sum(4 * _size(shape) for shape in shapes)
    for turn in range(arguments.rounds + 1):
        for way, move in movers.items():
            tree = jax.block_until_ready(make(float(turn)))
            start_s = time.perf_counter()
            moved = jax.block_until_ready(move(tree, wanted))
            spent_s = time.perf_counter() - start_s
            if turn == 0:
                for a, b in ((moved[0], tree[0]), (moved[-1], tree[-1])):
                    assert np.array_equal(np.asarray(a), np.asarray(b)), (name, way)
            else:
                found[way].append(spent_s)
            del tree, moved
            gc.collect()
    medians = {way: statistics.median(times) for way, times in found.items()}
    others = min(s for way, s in medians.items() if way != "shardkit")
    for way, times in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        ratio = f"{medians[way] / others:.3f}" if way == "shardkit" else ""
        print(
            f"| {name} | {len(shapes)} | {way} | {1e3 * middle:.1f} "
            f"[{1e3 * low:.1f}, {1e3 * high:.1f}] | {num_bytes / middle / 1e9:.1f} "
            f"| {1e6 * middle / len(shapes):.0f} | {ratio} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--orbax", action="store_true")
    parser.add_argument("--leaves", choices=["large", "many"], default="large")
    parser.add_argument("--case")
    arguments = parser.parse_args()
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from benchmarks import common

    print(common.describe_machine())
    print(HEADER)
    shapes = shapes_of(arguments.leaves, int(arguments.gib * 2**30))
    for name, (old, new) in cases(len(jax.devices())).items():
        if arguments.case in (None, name):
            measure(name, old, new, shapes, arguments)


if __name__ == "__main__":
    main()
