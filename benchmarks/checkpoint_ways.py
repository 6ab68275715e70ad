"""The ways to save and to restore that `checkpoint.py` compares, and what they save.

Each is made for a directory and leaves; it saves step 1, waits, and restores it onto
the first so many devices.
"""

import functools
import math
import time
import types


def num_devices():
    """Of how many devices the meshes are that save: all that there are."""
    import jax

    return len(jax.devices())


def shapes_of(leaves, num_bytes):
    """Path → shape of float32 leaves, and the dim of each that is cut."""
    if leaves == "many":
        from benchmarks import reshard

        shapes = reshard.shapes_of("many", num_bytes)
        return {f"state/x{i}": (shape, 0) for i, shape in enumerate(shapes)}
    # 256 MiB, half of it stacked layers.
    group = {
        "layers/up": ((8, 1024, 2048), 1),
        "layers/down": ((8, 2048, 1024), 1),
        "table": ((4096, 4096), 0),
        **{f"wide{i}": ((1024, 4096), 0) for i in range(3)},
        **{f"square{i}": ((512, 512), 0) for i in range(15)},
        **{f"vector{i}": ((16384,), 0) for i in range(16)},
    }
    count = max(1, round(num_bytes / (256 << 20)))
    return {
        f"state/{name}_{n}": shape
        for n in range(count)
        for name, shape in group.items()
    }


def size_of(leaves):
    return sum(4 * math.prod(shape) for shape, _ in leaves.values())


def on(count, leaves):
    """What ours takes for a placement: a mesh, and the layout of every leaf."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from shardkit.layout import LeafLayout

    mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",))
    layout = {
        path: LeafLayout(path, shape, np.dtype(np.float32), dim)
        for path, (shape, dim) in leaves.items()
    }
    return types.SimpleNamespace(mesh=mesh, layout=layout)


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


class Ours:
    """shardkit's own, as the trainer uses it."""

    def __init__(self, directory, leaves):
        import shardkit as sk
        from shardkit.checkpoint.manager import Checkpoints

        self.leaves = leaves
        config = sk.CheckpointConfig(directory=directory, keep=None)
        self.checkpoints = Checkpoints(config)
        self.wait, self.close = self.checkpoints.wait, self.checkpoints.close

    def save(self, state):
        """Starts to save a state."""
        from shardkit.checkpoint.manager import Facts

        self.checkpoints.save(1, state, on(num_devices(), self.leaves), Facts(run={}))

    def restore(self, count):
        """Restores onto the first devices, verified."""
        from shardkit.checkpoint.manager import load

        return load(self.checkpoints.open(1), on(count, self.leaves))

    def remap(self):
        """Files verified, leaves transposed, and stacked ones unstacked."""
        import numpy as np

        from shardkit.checkpoint.placing import Target, place

        views = remapping().apply(self.checkpoints.open(1).verified().views)
        leaves = {
            path: (view.shape, len(view.shape) - 1) for path, view in views.items()
        }
        placement = on(num_devices(), leaves)
        assert sum(view.nbytes for view in views.values()) == size_of(self.leaves)
        assert all(view.dtype == np.float32 for view in views.values())
        targets = [
            Target.of_leaf(leaf, placement.mesh) for leaf in placement.layout.values()
        ]
        return list(place(views, targets))

    def verify(self):
        """Reads all files, and compares their checksums."""
        assert self.checkpoints.open(1).check_files() == []


def remapping():
    from shardkit.checkpoint.remap import Remap
    from shardkit.checkpoint.remap_ops import Transpose, Unstack
    from shardkit.checkpoint.rules import Rule

    flat = ("table", "wide", "square")
    return Remap(
        [
            Rule(
                "state/layers/{name}",
                "state/{i}/{name}",
                Unstack("i"),
                Transpose(1, 0),
            ),
            *(
                Rule(f"state/{x}{{n}}", f"state/{x}{{n}}", Transpose(1, 0))
                for x in flat
            ),
        ],
        keep_rest=True,
    )


class Orbax:
    """CheckpointManager with StandardSave and StandardRestore, as they come."""

    def __init__(self, directory, leaves):
        import orbax.checkpoint as ocp

        self.leaves = leaves
        self.manager = self.make(ocp, directory)
        self.wait, self.close = self.manager.wait_until_finished, self.manager.close

    def make(self, ocp, directory):
        """Makes the manager."""
        return ocp.CheckpointManager(directory)

    def save(self, state):
        """Starts to save a state."""
        import orbax.checkpoint as ocp

        self.manager.save(1, args=ocp.args.StandardSave(nested(state)))

    def like(self, count):
        """Padded where the mesh does not divide: Orbax cannot cut it otherwise."""
        placement = on(count, self.leaves)
        return nested(
            {
                path: leaf.physical(placement.mesh)
                for path, leaf in placement.layout.items()
            }
        )

    def restore(self, count):
        """Restores onto the first devices."""
        import orbax.checkpoint as ocp

        # Only then it fills up what the target has more.
        args = ocp.args.StandardRestore(self.like(count), strict=count != 3)
        return self.manager.restore(1, args=args)


class RawOrbax(Orbax):
    """The same without compression."""

    def make(self, ocp, directory):
        """Makes the manager."""
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        return ocp.CheckpointManager(directory, item_handlers=handler)

    def save(self, state):
        """Starts to save a state."""
        import orbax.checkpoint as ocp

        self.manager.save(1, args=ocp.args.PyTreeSave(nested(state)))

    def restore(self, count):
        """Restores onto the first devices."""
        import dataclasses

        import jax
        import orbax.checkpoint as ocp

        like = self.like(count)
        how = ocp.checkpoint_utils.construct_restore_args(like)
        how = jax.tree.map(lambda x: dataclasses.replace(x, strict=count != 3), how)
        args = ocp.args.PyTreeRestore(item=like, restore_args=how)
        return self.manager.restore(1, args=args)


class Training:
    """A state, and a step that updates it in its own memory."""

    def __init__(self, leaves):
        import jax

        placement = on(num_devices(), leaves)
        shardings = {
            path: leaf.sharding(placement.mesh)
            for path, leaf in placement.layout.items()
        }
        shapes = {path: shape for path, (shape, _) in leaves.items()}

        # A program for each shape: one for thousands of leaves takes minutes to make.
        made = {
            (shape, shardings[path]): jax.jit(
                functools.partial(jax.random.normal, shape=shape),
                out_shardings=shardings[path],
            )
            for path, shape in shapes.items()
        }
        self._make = {
            path: made[shape, shardings[path]] for path, shape in shapes.items()
        }

        def step(state):
            return jax.tree.map(lambda x: 0.999 * x + 1e-3, state)

        self.step = jax.jit(step, donate_argnums=0)

    def start(self, seed):
        """Makes a state."""
        import jax

        self.state = {
            path: make(jax.random.fold_in(jax.random.key(seed), number))
            for number, (path, make) in enumerate(self._make.items())
        }
        jax.block_until_ready(self.state)

    def timed_step(self):
        """Updates the state; returns the seconds that it took."""
        import jax

        start_s = time.perf_counter()
        self.state = jax.block_until_ready(self.step(self.state))
        return time.perf_counter() - start_s
