"""From the mesh that a trainer is asked for to what chooses its meshes.

Owns that step. Invariant: a run whose mesh is given neither imports the planner nor
traces anything for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from shardkit.mesh import MeshSpec
from shardkit.mesh_choice import FixedMesh, MeshChooser
from shardkit.model import Model
from shardkit.planner.auto_mesh import AutoMesh, find_profile
from shardkit.recipe import Recipe

__all__ = ["mesh_chooser"]


def mesh_chooser(
    mesh: MeshSpec | AutoMesh,
    recipe: Recipe,
    batch: Any,
    pool: Sequence[Any],
    rules: Mapping[str, Any],
) -> MeshChooser:
    """Returns what says which mesh a number of devices means.

    Only for a mesh that is to be chosen is the model read, which traces its loss.

    Args:
        mesh: What was asked for.
        recipe: What is trained.
        batch: The global batch of step 0, abstractly.
        pool: All devices there are.
        rules: `axis_rules` and `path_rules`, as `read_job` takes them.

    Raises:
        ConfigError: If nothing is known of the devices, or the model cannot be traced.
    """
    if isinstance(mesh, MeshSpec):
        return FixedMesh(mesh)
    from shardkit.planner.jobs import read_job
    from shardkit.planner.ledger import Habits
    from shardkit.planner.mesh_planner import MeshPlanner

    first = recipe.ramp(0)
    microbatch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // first, *x.shape[1:]), x.dtype),
        batch,
    )
    profile = find_profile(mesh, pool)
    job = read_job(
        Model(init=recipe.init, loss=recipe.loss),
        microbatch,
        recipe.tx,
        recipe.ramp,
        ema=recipe.ema,
        exact=recipe.exact,
        offload=recipe.offload,
        habits=Habits.of("cpu" if profile.is_shared else "gpu"),
        **rules,
    )
    num_processes = len({device.process_index for device in pool})
    return MeshPlanner(job, profile, mesh, num_processes=num_processes)
