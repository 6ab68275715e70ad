"""What of a state each process keeps in its image.

Owns the way from a state on a mesh to the layout of images. Invariant: all processes
find the same, without asking one another. Who of several holders keeps a piece is
`assignment`'s choice.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

from shardkit.layout import Box
from shardkit.snapshot.assignment import Claim, assign
from shardkit.snapshot.layout import ImageLayout, MeshRecord, SnapshotLeaf
from shardkit.snapshot.store import Store
from shardkit.staging import Staging

__all__ = ["image_layout", "list_claims"]


def image_layout(staging: Staging, store: Store) -> ImageLayout:
    """Decides what this process keeps, and where in its image."""
    places = staging.places
    ids = places.ids.ravel().tolist()
    processes = [places.host(id) for id in ids]
    host_of = {process: store.host(process) for process in processes}
    mesh = MeshRecord(
        places.axes,
        places.ids.shape,
        tuple(ids),
        tuple(processes),
        tuple(host_of[process] for process in processes),
    )
    leaves = [
        SnapshotLeaf(
            leaf.path, leaf.shape, np.dtype(leaf.dtype).name, leaf.dim, leaf.group
        )
        for leaf in staging.leaves
    ]
    me = jax.process_index()
    return ImageLayout.plan(
        run=store.run,
        host=host_of[me],
        process=me,
        num_processes=jax.process_count(),
        leaves=leaves,
        mesh=mesh,
        pieces=assign(list_claims(staging), host_of, store.num_losses)[me],
    )


def list_claims(staging: Staging) -> Iterator[Claim]:
    """Lists all distinct pieces of a state, each with all who hold it."""
    places = staging.places
    # Many leaves share a layout, which is looked at once.
    known: dict[int, dict[Box, list[tuple[int, int]]]] = {}
    for number, leaf in enumerate(staging.leaves):
        layout = staging.layouts[leaf.path]
        if id(layout) not in known:
            holders = known.setdefault(id(layout), {})
            for device in places.slots:
                holder = places.host(device), device
                holders.setdefault(layout.box(device), []).append(holder)
        for box, found in known[id(layout)].items():
            num_bytes = math.prod(b - a for a, b in box) * layout.itemsize
            yield Claim(number, box, num_bytes, tuple(found))
