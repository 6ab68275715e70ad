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
from shardkit import config as configs
from shardkit.config import BUILT_IN_DATA, RunConfig
from shardkit.errors import ConfigError, ShardkitError
from shardkit.mesh import BATCH_AXES, GROUP_AXES, MESH_AXES
from shardkit.model import Model
from shardkit.model_state import split_variables
from shardkit.optim import build_optimizer
from shardkit.planner.ledger import Habits
from shardkit.planner.model_facts import ModelFacts
from shardkit.planner.reading import read_model
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
    num_microbatches = max(config.data.ramp.counts)
    rows = config.data.global_batch_size // config.data.num_microbatches
    facts = _read_facts(config, Habits.of(platform))
    wanted = {*(axes or ("data", "fsdp", *_useful_axes(facts)))}
    sizes = configs.to_dict(config)["mesh"]
    own = {axis: 1 if axis in BATCH_AXES else sizes[axis] for axis in MESH_AXES}
    return Job(
        facts={"as configured": facts},
        global_batch_size=rows * num_microbatches,
        # Another number would be another run, with other bits.
        num_microbatches=[num_microbatches],
        exact=consistency == "exact",
        fixed={axis: own[axis] for axis in MESH_AXES if axis not in wanted},
    )


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


def _read_facts(config: RunConfig, habits: Habits) -> ModelFacts:
    model, made = read_configured_model(config)
    facts = read_model(
        model,
        abstract_microbatch(config),
        build_optimizer(config.optimizer, split_variables(made)[0], config.data.ramp),
        **build.placement_rules(config, model),
        habits=habits,
    )
    if config.train.ema is not None:
        # The average is kept like a moment of every parameter.
        average = (dataclasses.replace(x, path=f"ema/{x.path}") for x in facts.params)
        facts = dataclasses.replace(facts, opt_state=(*facts.opt_state, *average))
    return facts
