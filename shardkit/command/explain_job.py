"""From a config to what is explained: its step, compiled for emulated devices.

Owns setting JAX up for that, and putting a trainer together without its data.
Invariants: nothing is trained, and nothing that an earlier process has compiled is
used, as it would tell of lines where they were then.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardkit import build
from shardkit.cli import NUM_THREADS
from shardkit.command.plan_job import abstract_microbatch, find_modules
from shardkit.config import RunConfig
from shardkit.events import Event, EventLog
from shardkit.explain.leaves import Idle, PlacedLeaf, idle_slots, place_leaves
from shardkit.explain.program import ProgramExplanation, explain_program
from shardkit.layout import LeafLayout
from shardkit.places import Places
from shardkit.program_report import ProgramReport

__all__ = ["Job", "explain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A step of a config, compiled and explained.

    Attributes:
        num_devices: How many there are.
        platform: What they are.
        mesh: Axis → size.
        program: What the compiler made of the step.
        report: What it costs.
        leaves: How the state lies.
        idle: How the microbatches are dealt.
        notes: What was said when the trainer was put together.
    """

    num_devices: int
    platform: str
    mesh: dict[str, int]
    program: ProgramExplanation
    report: ProgramReport
    leaves: list[PlacedLeaf]
    idle: Idle
    notes: list[str]


def explain(config: RunConfig, num_devices: int) -> Job:
    """Compiles the step of a config for devices that need not be there.

    Where the batch grows in the course of the run, it is the first step.

    Raises:
        ShardkitError: If the config names what is not there, or does not fit together.
    """
    find_modules()
    _emulate(num_devices)
    notes: list[str] = []
    events = EventLog()

    def hear(event: Event) -> None:
        if event.name == "notice":
            notes.append(str(event.fields["message"]))
            # What XLA may end the process for is told before it does.
            if "program" in event.fields:
                logging.getLogger("shardkit").warning("%s", notes[-1])

    events.subscribe(hear)
    with tempfile.TemporaryDirectory() as directory, _compiling_anew():
        trainer, _ = build.build_trainer(
            # Programs of other placements would only be in the way.
            dataclasses.replace(
                config, train=dataclasses.replace(config.train, standby=0)
            ),
            devices=build.device_pool(num_devices),
            checkpoints=Path(directory) / "checkpoints",
            events=events,
            batches=(_blank_batches(config), None, None),
        )
        with trainer:
            report = trainer.inspect(num_devices)["step"]
            leaves = trainer.layout
    model = build.call_factory(
        config.model.factory, config.model.options, where="model"
    )
    mesh = _mesh_of(report.compiled)
    sizes = dict(mesh.shape)
    return Job(
        num_devices=num_devices,
        platform=mesh.devices.flat[0].platform,
        mesh=sizes,
        program=explain_program(
            report.compiled, mesh, names=_names(report.compiled, leaves)
        ),
        report=report,
        leaves=place_leaves(
            leaves,
            Places.of_mesh(mesh),
            build.placement_rules(config, model)["axis_rules"],
        ),
        idle=idle_slots(config.data.ramp(0), sizes),
        notes=notes,
    )


def _emulate(num_devices: int) -> None:
    # As for training, since how a product is cut follows the number of threads.
    os.environ.setdefault("PJRT_NPROC", str(max(NUM_THREADS, num_devices)))
    with contextlib.suppress(RuntimeError):
        # Devices that are there already are too few or not; `device_pool` tells.
        jax.config.update("jax_num_cpu_devices", max(NUM_THREADS, num_devices))


@contextlib.contextmanager
def _compiling_anew() -> Iterator[None]:
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _blank_batches(config: RunConfig) -> Any:
    """Makes batches of the right shapes, with nothing in them."""
    microbatch = abstract_microbatch(config)
    ramp = config.data.ramp

    def batches(step: int) -> Any:
        num = ramp(step)
        return jax.tree.map(
            lambda x: np.zeros((num * x.shape[0], *x.shape[1:]), x.dtype), microbatch
        )

    return batches


def _mesh_of(compiled: jax.stages.Compiled) -> Any:
    shardings: Any = compiled.input_shardings
    return jax.tree.leaves(shardings)[0].mesh


def _names(compiled: jax.stages.Compiled, leaves: list[LeafLayout]) -> dict[str, str]:
    """Pairs JAX's names of a step's arguments with the paths of leaves."""
    found = {}
    flat = jax.tree_util.tree_flatten_with_path(compiled.args_info)[0]
    for number, (path, _) in enumerate(flat):
        name = f"args{jax.tree_util.keystr(path[1:])}"
        if number < len(leaves):
            found[name] = leaves[number].path
        else:
            # After the state come the batch and the key of all randomness.
            inner = jax.tree_util.keystr(path[2:], simple=True, separator="/")
            found[name] = f"batch/{inner}" if inner else "random key"
    return found
