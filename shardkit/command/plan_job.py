"""From a config to what the planner is asked.

Owns the reading of a config's model, optimizer and data as abstract shapes. Invariant:
no device is used, and of the built-in data no file is opened: their shapes follow from
the config.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
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

__all__ = [
    "Choices",
    "abstract_microbatch",
    "find_modules",
    "read_configured_model",
    "read_job",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What may be other than a config says, beside its mesh.

    Attributes:
        remat: The option of the model that is tried on and off; None for none.
        offload: Whether the optimizer's state may be in host memory.
        num_microbatches: Into how many a step may be cut; empty for any number that
            divides it, None for the config's.
    """

    remat: str | None = None
    offload: bool = False
    num_microbatches: Sequence[int] | None = None


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
    choices: Choices | None = None,
    platform: str = "gpu",
) -> Job:
    """Reads what a config trains, without computing any of it.

    Of a ramp the largest batch is taken, which needs most.

    Args:
        config: The run.
        consistency: `"exact"` or `"fast"`, in place of the config's.
        axes: The mesh axes whose sizes are looked for; None for all that the model
            has a use for. Of the others, those of a group keep the config's sizes.
        choices: What else may be other than in the config; its own is first.
        platform: Whose compiler it is to be, `"cpu"` or another one.

    Raises:
        ShardkitError: If the config names what is not there or cannot be traced.
    """
    choices = choices or Choices()
    if config.data.batch_ramp is not None and choices.num_microbatches is not None:
        raise ConfigError(
            "--microbatches: those of a batch_ramp follow from its batches"
        )
    job = _read_as_configured(config, consistency, platform)
    [facts] = job.facts.values()
    job = dataclasses.replace(
        job,
        fixed=_fixed(config, facts, axes),
        may_offload=choices.offload,
        num_microbatches=_numbers(job, choices.num_microbatches),
    )
    if not job.has_choices and choices.remat is None:
        return job
    return _with_choices(config, job, choices, consistency, platform)


def _with_choices(
    config: RunConfig, job: Job, choices: Choices, consistency: str, platform: str
) -> Job:
    """Reads the model for each choice, as none follows from another quite exactly."""
    [(name, own)] = job.facts.items()
    options, read = _remats(config, choices.remat, name), {}
    for (remat, changes), num in itertools.product(
        options.items(), job.num_microbatches
    ):
        changed = _changed(config, changes, num, job.num_microbatches[0])
        facts = own
        if changed != config:
            [facts] = _read_as_configured(changed, consistency, platform).facts.values()
        read[remat, facts.num_rows] = facts
    found = {remat: read[remat, own.num_rows] for remat in options}
    if choices.remat is not None:
        _check_remat(choices.remat, own, [*found.values()])
    names = sorted(found, key=lambda remat: found[remat].work != own.work)
    facts = {remat: found[remat] for remat in names}
    return dataclasses.replace(job, facts=facts, read=read)


def _remats(
    config: RunConfig, option: str | None, name: str
) -> dict[str, dict[str, Any]]:
    """How to keep activations → what the model's options have then."""
    if option is None:
        return {name: {}}
    own = config.model.options.get(option, True)
    values = [own, *(x for x in (True, False) if x != own)]
    return {f"{option}={x}".lower(): {option: x} for x in values}


def _check_remat(option: str, own: ModelFacts, found: Sequence[ModelFacts]) -> None:
    """Refuses what makes another model, or no difference."""
    works = {facts.work.total_flops for facts in found}
    is_same = all(
        facts.params == own.params
        and facts.forward.total_flops == own.forward.total_flops
        for facts in found
    )
    if len(works) == 1 or not is_same:
        raise ConfigError(
            f"--remat {option}: expected an option of [model] by which the gradient "
            "computes anew what it would keep; this one makes "
            + ("no difference to its work" if is_same else "another model")
        )


def _changed(
    config: RunConfig, options: Mapping[str, Any], num: int, own: int
) -> RunConfig:
    options = {**config.model.options, **options}
    model = dataclasses.replace(config.model, options=options)
    changed = dataclasses.replace(config, model=model)
    if num == own:
        # Which a ramp may have more of than the config says.
        return changed
    data = dataclasses.replace(config.data, num_microbatches=num)
    return dataclasses.replace(changed, data=data)


def _numbers(job: Job, asked: Sequence[int] | None) -> list[int]:
    """The numbers of microbatches to choose from, the job's own first."""
    own = list(job.num_microbatches)
    if asked is None:
        return own
    if not asked:
        every = dataclasses.replace(job, num_microbatches=())
        asked = [num for _, num, _ in every.blocks()]
    if wrong := [num for num in asked if job.global_batch_size % num]:
        raise ConfigError(
            f"--microbatches: expected numbers that divide the {job.global_batch_size} "
            f"rows of a step, found {', '.join(map(str, wrong))}"
        )
    return list(dict.fromkeys([*own, *asked]))


def _read_as_configured(config: RunConfig, consistency: str, platform: str) -> Job:
    model, made = read_configured_model(config)
    ramp = config.data.ramp
    return jobs.read_job(
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
