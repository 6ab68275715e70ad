"""Moves arrays that no process has alone, and checks every shard that it has.

python resharded.py PORT PROCESS_ID NUM_PROCESSES
"""

import sys
from pathlib import Path

from job import join


def check(sk, array, truth, sharding):
    import numpy as np

    moved = sk.reshard({"x": array}, sharding)["x"]
    assert moved.sharding == sharding
    assert moved.dtype == truth.dtype
    assert moved.shape == truth.shape
    for shard in moved.addressable_shards:
        found = np.ascontiguousarray(shard.data)
        assert found.tobytes() == np.ascontiguousarray(truth[shard.index]).tobytes()
    return moved


def main(port, process_id, num_processes):
    sys.path.insert(0, str(Path(__file__).parents[2]))

    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    join(port, process_id, num_processes)
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import shardkit as sk

    devices = jax.devices()
    # The same devices, fewer of every process, another order, another grid.
    meshes = [
        Mesh(np.array(devices), ("a",)),
        Mesh(np.array(devices).reshape(2, 4), ("a", "b")),
        Mesh(np.array([*devices[:2], *devices[4:6]]), ("a",)),
        Mesh(np.array(devices[::-1]), ("a",)),
    ]
    specs = [P("a"), P(None, "a"), P()]
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        truth = np.arange(16 * 24).reshape(16, 24).astype(dtype)
        at = NamedSharding(meshes[0], P("a"))
        array = jax.make_array_from_callback(truth.shape, at, lambda i, x=truth: x[i])
        for mesh in meshes:
            for spec in specs:
                array = check(sk, array, truth, NamedSharding(mesh, spec))
        # What one process has, it moves alone.
        own = Mesh(np.array(jax.local_devices()), ("a",))
        mine = jax.device_put(truth, NamedSharding(own, P("a")))
        check(sk, mine, truth, NamedSharding(own, P(None, "a")))
    print("moved")


if __name__ == "__main__":
    main(*sys.argv[1:])
