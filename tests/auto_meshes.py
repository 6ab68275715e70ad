"""A small problem whose mesh is chosen, and machines that make the choice plain."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shardkit as sk
from shardkit.config import dump_toml
from shardkit.planner.auto_mesh import find_profile
from shardkit.planner.jobs import read_job
from shardkit.planner.mesh_planner import MeshPlanner
from shardkit.planner.profile import LINKS
from shardkit.ramp import BatchRamp

FREE = {
    "name": "eight machines in one",
    "datasheet": {
        "is_shared": False,
        "devices_per_host": 8,
        "memory_bytes": 4e9,
        "memory_bandwidth_bytes_s": 50e9,
        "peak_flops_s": {"float32": 300e9},
        "bandwidth_bytes_s": dict.fromkeys(LINKS, 25e9),
    },
    "measured": {
        "by": "nobody: made up",
        "memory_fraction": 0.5,
        "written_fraction": 0.6,
        "fresh_byte_s": 3e-10,
        "product_overhead_s": 1e-5,
        "step_overhead_s": 1e-6,
        "microbatch_overhead_s": 1e-6,
        "start_s": 0.0,
        "flops_fraction": {"float32": 0.3},
        "alone_fraction": {"products": 0.9, "others": 0.6},
        "link_fraction": dict.fromkeys(LINKS, 0.15),
        "latency_s": dict.fromkeys(LINKS, 0.0),
    },
}
"""A profile by which nothing but work and bytes takes time."""


def changed(**measured):
    """The same, with other figures."""
    return FREE | {"measured": FREE["measured"] | measured}


LATE = changed(latency_s=dict.fromkeys(LINKS, 1e-5), microbatch_overhead_s=1e-3)
"""Microbatches take long, so that devices are used only if they save one."""

APART = changed(latency_s=dict.fromkeys(LINKS, 1.0))
"""A collective takes so long that one device is best."""


def write_profile(directory, table):
    """Writes a profile; returns its path."""
    path = directory / "profile.toml"
    path.write_text(dump_toml(table))
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
