"""A small problem whose mesh is chosen, and machines that make the choice plain."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk
from shardkit.planner import profile as profiles
from shardkit.planner.auto_mesh import find_profile
from shardkit.planner.jobs import read_job
from shardkit.planner.mesh_planner import MeshPlanner
from shardkit.ramp import BatchRamp

FREE = {
    "is_shared = true": "is_shared = false",
    "start_s = 5.0": "start_s = 0.0",
    "step_overhead_s = 2e-3": "step_overhead_s = 1e-6",
    "microbatch_overhead_s = 2e-4": "microbatch_overhead_s = 1e-6",
    "inside = 1e-4": "inside = 0.0",
    "between = 1e-4": "between = 0.0",
}
"""Changes to the profile of emulated devices: each computes as fast as all together,
and nothing but work and bytes takes time."""

LATE = FREE | {
    "inside = 1e-4": "inside = 1e-5",
    "microbatch_overhead_s = 2e-4": "microbatch_overhead_s = 1e-3",
}
"""And microbatches take long, so that devices are used only if they save one."""

APART = FREE | {"inside = 1e-4": "inside = 1.0"}
"""And a collective takes so long that one device is best."""


def write_profile(directory, changes):
    """Writes the profile of emulated devices with changes; returns its path."""
    folder = Path(profiles.__file__).parent / "profiles"
    text = (folder / "cpu.toml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = directory / "profile.toml"
    path.write_text(text)
    return path


WIDTH, ROWS = 16, 60


def mlp(num_microbatches=12, **options):
    """`Trainer` arguments of a layer and back, which `tensor` can cut."""

    def init(key):
        up, down = jax.random.split(key)
        shapes = {"up": (up, (WIDTH, 4 * WIDTH)), "down": (down, (4 * WIDTH, WIDTH))}
        names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
        return {
            name: sk.axes(jax.random.normal(key, shape) * 0.1, *names[name])
            for name, (key, shape) in shapes.items()
        }

    def loss(params, microbatch, key):
        hidden = jnp.tanh(microbatch["x"] @ params["up"])
        return jnp.mean((hidden @ params["down"] - microbatch["x"]) ** 2)

    def data(step):
        x = np.random.default_rng(step).normal(size=(ROWS, WIDTH))
        return {"x": x.astype(np.float32)}

    return {
        "init": init,
        "loss": loss,
        "data": data,
        "tx": optax.sgd(0.1, momentum=0.9),
        "axis_rules": {"embed": "fsdp", "mlp": "tensor"},
        "num_microbatches": num_microbatches,
        "certify": "off",
        **options,
    }


def planner(auto, *, num_microbatches=12, num_processes=1, **options):
    """What chooses meshes for that problem."""
    problem = mlp(num_microbatches)
    rows = jax.ShapeDtypeStruct((ROWS // num_microbatches, WIDTH), "float32")
    model = sk.Model(init=problem["init"], loss=problem["loss"])
    job = read_job(
        model,
        {"x": rows},
        problem["tx"],
        BatchRamp({0: num_microbatches}),
        axis_rules=problem["axis_rules"],
        **options,
    )
    found = find_profile(auto, jax.devices())
    return MeshPlanner(job, found, auto, num_processes=num_processes)


def used(fields):
    return math.prod(fields["mesh"].values())


def groups(mesh):
    return {a: n for a, n in mesh.items() if n > 1 and a not in ("data", "fsdp")}
