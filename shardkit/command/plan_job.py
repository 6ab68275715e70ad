"""From a config to what the planner is asked.

Owns the reading of a config's model, optimizer and data as abstract shapes. Invariant:
no device is used, and of the built-in data no file is opened: their shapes follow from
the config.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shardkit import build
from shardkit.config import BUILT_IN_DATA, RunConfig
from shardkit.errors import ConfigError, ShardkitError
from shardkit.mesh import BATCH_AXES, GROUP_AXES, MESH_AXES
from shardkit.model import Model
from shardkit.model_state import split_variables
from shardkit.optim import build_optimizer
from shardkit.planner import jobs
from shardkit.planner.auto_mesh import AutoMesh
from shardkit.planner.ledger import Habits
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.search import Job

__all__ = ["abstract_microbatch", "find_modules", "read_configured_model", "read_job"]


def find_modules() -> None:
    """Lets factories be found below the working directory, as `train.py` finds them."""
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.append(here)


def read_job(
    config: RunConfig,
    consistency: str,
    *,
    axes: Sequence[str] | None = None,
    platform: str = "gpu",
) -> Job:
    """Reads what a config trains, without computing any of it.

    Of a ramp the largest batch is taken, which needs most.

    Args:
        config: The run.
        consistency: `"exact"` or `"fast"`, in place of the config's.
        axes: The mesh axes whose sizes are looked for; None for all that the model
            has a use for. Of the others, those of a group keep the config's sizes.
        platform: Whose compiler it is to be, `"cpu"` or another one.

    Raises:
        ShardkitError: If the config names what is not there or cannot be traced.
    """
    model, made = read_configured_model(config)
    ramp = config.data.ramp
    job = jobs.read_job(
        model,
        abstract_microbatch(config),
        build_optimizer(config.optimizer, split_variables(made)[0], ramp),
        ramp,
        **build.placement_rules(config, model),
        ema=config.train.ema,
        exact=consistency == "exact",
        offload=config.train.offload,
        habits=Habits.of(platform),
    )
    [facts] = job.facts.values()
    return dataclasses.replace(job, fixed=_fixed(config, facts, axes))


def _fixed(
    config: RunConfig, facts: ModelFacts, axes: Sequence[str] | None
) -> dict[str, int]:
    """Returns the axes whose sizes are not looked for, with these."""
    mesh = build.build_mesh(config.mesh)
    if isinstance(mesh, AutoMesh) and not axes:
        return dict(mesh.fixed)
    wanted = {*(axes or (*BATCH_AXES, *_useful_axes(facts)))}
    own = {axis: getattr(config.mesh, axis) for axis in GROUP_AXES}
    sizes = {**dict.fromkeys(BATCH_AXES, 1), **own}
    return {axis: sizes[axis] for axis in MESH_AXES if axis not in wanted}


def _useful_axes(facts: ModelFacts) -> Iterator[str]:
    """The axes of a group that the rules of a model name, or that it asks for.

    Rows of a microbatch are asked for, too, to be cut by `expert`; where there are no
    experts, `data` does that without an exchange in each microbatch.
    """
    for axis in GROUP_AXES:
        is_cut = any(axis in leaf.cuts for leaf in facts.params)
        if is_cut or (axis == "context" and facts.divisors[axis] > 1):
            yield axis


def abstract_microbatch(config: RunConfig) -> Any:
    """Returns the shapes of one microbatch.

    Built-in data have those that `sequence_length` says; a factory is asked for its
    first batch.

    Raises:
        ShardkitError: If a factory cannot make it here.
    """
    data = config.data
    rows = data.global_batch_size // data.num_microbatches
    if data.factory in BUILT_IN_DATA:
        length = data.sequence_length or 1
        widths = {"tokens": (length + 1, np.int32)}
        if data.factory == "documents":
            widths |= dict.fromkeys(("segments", "positions"), (length + 1, np.int32))
            widths |= {"weights": (length, np.float32)}
        return {
            name: jax.ShapeDtypeStruct((rows, width), dtype)
            for name, (width, dtype) in widths.items()
        }
    try:
        batch = build.call_factory(
            data.factory,
            data.options,
            where="data",
            split="train",
            global_batch_size=data.global_batch_size,
            seed=config.train.seed,
        )(0)
        build.check_rows(batch, config)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch
        )
    except ShardkitError as error:
        raise type(error)(f"{_needed(config)}: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{_needed(config)}: {type(error).__name__}: {error}"
        ) from error


def _needed(config: RunConfig) -> str:
    return (
        f"[data] {config.data.factory}: its first batch is needed for the shapes, and "
        "cannot be made here"
    )


def read_configured_model(config: RunConfig) -> tuple[Model, Any]:
    """Makes the model that a config names; returns it with the shapes of its `init`.

    Raises:
        ShardkitError: If there is no such factory, or its parameters cannot be traced.
    """
    model = build.call_factory(
        config.model.factory, config.model.options, where="model"
    )
    try:
        return model, jax.eval_shape(lambda: model.init(jax.random.key(0)))
    except ShardkitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"[model] {config.model.factory}: its parameters cannot be traced: {error}"
        ) from error
