"""From the names in a config to objects: devices, data, model, `Trainer`.

Owns factories, which a config names as `"module:attribute"` and which are resolved
and checked here, so that shardkit itself never imports a model. It trains nothing.
"""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardkit import config as configs
from shardkit.config import BUILT_IN_DATA, RunConfig, accepts, convert, suggest
from shardkit.errors import ConfigError, DataError, ShardkitError

__all__ = [
    "build_batches",
    "build_mesh",
    "build_sampler",
    "build_trainer",
    "call_factory",
    "check_rows",
    "device_pool",
    "placement_rules",
    "resolve_factory",
]


def device_pool(num_devices: int | None) -> list[Any]:
    """Returns the first `num_devices` devices, or all.

    Raises:
        ConfigError: If there are fewer.
    """
    import jax

    devices = jax.devices()
    if num_devices is not None and num_devices > len(devices):
        raise ConfigError(
            f"--devices: expected at most {len(devices)}, the {devices[0].platform} "
            f"devices that there are, found {num_devices}; "
            "set JAX_PLATFORMS=cpu to emulate more"
        )
    return devices[:num_devices]


def resolve_factory(name: str, *, where: str = "factory") -> Callable[..., Any]:
    """Finds `"module:attribute"`.

    Raises:
        ConfigError: If there is no such module or attribute, or the module needs
            another one that is not installed.

    >>> resolve_factory("math:hypot")(3, 4)
    5.0
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f'{where}: expected "module:attribute", found {name!r}')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            places = list(dict.fromkeys(path or "." for path in sys.path))
            raise ConfigError(
                f"{where}: there is no module {missing!r} for {name!r}; looked in "
                f"{', '.join(places[:2])}, … Put its directory on PYTHONPATH."
            ) from None
        raise ConfigError(
            f"{where}: module {module_name!r} needs {missing!r}; install it"
        ) from None
    if not callable(getattr(module, attribute, None)):
        names = [
            n for n in vars(module) if callable(getattr(module, n)) and n[0] != "_"
        ]
        raise ConfigError(
            f"{where}: {module_name!r} has no {attribute!r} that can be called; "
            + suggest(attribute, names)
        )
    return getattr(module, attribute)


def call_factory(
    name: str, options: Mapping[str, Any], *, where: str, **given: Any
) -> Any:
    """Calls a factory with options from a config, checking them against its signature.

    Args:
        name: `"module:attribute"`.
        options: What the user wrote.
        where: The table of the factory, to name in an error.
        **given: Arguments that do not come from the user.

    Raises:
        ConfigError: If the factory is not found, does not take an option, needs one
            that is missing, or finds a value of the wrong type or range.
    """
    factory = resolve_factory(name, where=f"[{where}] factory")
    parameters = inspect.signature(factory).parameters
    checked = {}
    for key, value in options.items():
        place = f"[{where}.options] {key}"
        if key in parameters and key not in given:
            checked[key] = _check_option(value, parameters[key].annotation, place)
        elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            checked[key] = value
        else:
            raise ConfigError(
                f"{place}: {name} takes no such option; "
                + suggest(key, [p for p in parameters if p not in given])
            )
    try:
        return factory(**given, **checked)
    except ShardkitError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[{where}] {name}: {error}") from error


def import_all(config: RunConfig) -> None:
    """Imports what a run needs; it takes no device.

    Raises:
        ConfigError: If a factory is not there.
    """
    import jax  # noqa: F401

    import shardkit.checkpoint.engine
    import shardkit.optim
    import shardkit.trainer  # noqa: F401

    resolve_factory(config.model.factory, where="[model] factory")
    if config.data.factory not in BUILT_IN_DATA:
        resolve_factory(config.data.factory, where="[data] factory")


def build_batches(config: RunConfig) -> tuple[Any, Any | None, str | None]:
    """Builds the data of a run.

    Returns:
        Training batches by step, validation batches by index or None, and the digest
        of the corpus or None.

    Raises:
        ConfigError, DataError: If there is no such data.
    """
    data, seed = config.data, config.train.seed
    common: dict[str, Any] = {"seed": seed}
    # What is evaluated on does not grow with the batch.
    rows: dict[str, Any] = dict.fromkeys(
        ("train", "validation"), data.global_batch_size
    )
    if data.batch_ramp is not None:
        rows["train"] = data.rows
    evaluates = config.train.eval_batches > 0
    if data.factory == "text":
        from shardkit.data import TextBatches, TextCorpus

        fraction = data.validation_fraction
        corpus = TextCorpus.open(
            data.path, **({} if fraction is None else {"validation_fraction": fraction})
        )
        common |= {"sequence_length": data.sequence_length}

        def cut(split: str) -> Any:
            return TextBatches(
                corpus, split=split, global_batch_size=rows[split], **common
            )

        train, digest = cut("train"), corpus.digest
        valid = cut("validation") if evaluates else None
        _check_vocabulary(train(0), config)
        return train, valid, digest

    factory = data.factory
    if factory in BUILT_IN_DATA:
        factory = f"shardkit.sources.configured:{factory}"
        common |= {
            "path": data.path,
            "sequence_length": data.sequence_length,
            "validation_fraction": data.validation_fraction,
        }

    def build(split: str) -> Any:
        given = {"split": split, "global_batch_size": rows[split], **common}
        return call_factory(factory, data.options, where="data", **given)

    train = build("train")
    valid = build("validation") if evaluates else None
    if data.factory in BUILT_IN_DATA:
        _check_vocabulary(train(0), config)
    else:
        check_rows(train(0), config)
    return train, valid, getattr(train, "digest", None)


def check_rows(batch: Any, config: RunConfig) -> None:
    """Refuses data of a factory that are not as many rows as the config says.

    Raises:
        DataError: If every leaf of the first batch has the same other number.
    """
    import jax

    expected = config.data.rows(0)
    found = {x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "shape", ())}
    # Where leaves differ from one another, each is named later.
    if len(found) == 1 and found != {expected}:
        raise DataError(
            f"[data] {config.data.factory}: expected {expected} rows in a batch, as "
            f"global_batch_size is, found {found.pop()}. Return as many as the factory "
            "is asked for, or give their number to global_batch_size."
        )


def _check_vocabulary(batch: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses ids that the model has no row for; a look at the first batch is cheap."""
    size = config.model.options.get("vocab_size")
    if isinstance(size, int) and (largest := int(batch["tokens"].max())) >= size:
        raise ConfigError(
            f"[model.options] vocab_size: the data have a token {largest}, expected at "
            f"least {largest + 1}, found {size}. Give the size of the tokenizer's "
            "vocabulary."
        )


def build_sampler(config: RunConfig) -> Callable[..., Any]:
    """Returns what makes text of the parameters of a config's model.

    Raises:
        ConfigError: If the model makes none, or none of bytes.
    """
    name, data = config.model.factory, config.data
    if data.factory == "tokens" or (
        data.factory == "documents" and data.options.get("tokenizer") is not None
    ):
        raise ConfigError(
            f"--sample: it takes and prints bytes, and the data of factory = "
            f"{data.factory!r} are ids of a tokenizer. Leave the flag out."
        )
    sample = call_factory(name, config.model.options, where="model").sample
    if sample is None:
        raise ConfigError(
            f"--sample: the model of {name!r} has no `sample`: it makes no text. Leave "
            "the flag out, or give sk.Model(…, sample=…)."
        )
    return sample


def build_mesh(section: configs.MeshSection) -> Any:
    """Returns the `MeshSpec` that is asked for, or the `AutoMesh`.

    Raises:
        ShardkitError: If it is none.
    """
    import shardkit as sk

    groups = {a: getattr(section, a) for a in ("tensor", "expert", "context")}
    if not section.auto:
        return sk.MeshSpec(data=section.data, fsdp=section.fsdp, **groups)
    return sk.AutoMesh(
        axes=tuple(section.axes),
        profile=section.profile,
        memory_bytes=section.memory_bytes,
        allow_equivalent=section.allow_equivalent,
        **groups,
    )


def placement_rules(config: RunConfig, model: Any) -> dict[str, Any]:
    """Returns `axis_rules`, the model's with the config's over them, and `path_rules`.

    Empty text is None in both.
    """
    own = {name: axis or None for name, axis in config.axis_rules.items()}
    paths = {
        glob: tuple(name or None for name in names)
        for glob, names in config.path_rules.items()
    }
    return {"axis_rules": {**model.axis_rules, **own}, "path_rules": paths}


def _loss_scale(scale: float | None) -> Any:
    from shardkit.recipe import LossScale

    return scale and LossScale(initial=scale, growth_interval=None)


def build_trainer(
    config: RunConfig,
    *,
    devices: list[Any],
    checkpoints: Path,
    events: Any,
    snapshot: Any = None,
    speeds: Mapping[int, float] | None = None,
    probe: Any = None,
    batches: tuple[Any, Any | None, str | None] | None = None,
) -> tuple[Any, str | None]:
    """Builds everything that a config names.

    Args:
        config: What to build.
        devices: The pool.
        checkpoints: Where to save.
        events: Where events are sent.
        snapshot: An `sk.SnapshotConfig`; None for what the config says.
        speeds: Device id → how fast it is beside the others.
        probe: What measures how fast this process is; None for nothing.
        batches: What stands for the data of the config, as `build_batches` returns it.

    Returns:
        A `Trainer` that has not begun, and the digest of its corpus or None.

    Raises:
        ShardkitError: If any part of the config cannot be built.
    """
    import jax

    import shardkit as sk
    from shardkit.model_state import split_variables
    from shardkit.optim import build_optimizer

    train, valid, digest = batches or build_batches(config)
    model = call_factory(config.model.factory, config.model.options, where="model")
    evaluation = None
    if valid is not None:
        evaluation = sk.EvalConfig(
            data=valid,
            every=config.train.eval_every or config.train.steps,
            num_batches=min(
                config.train.eval_batches,
                getattr(valid, "num_batches", config.train.eval_batches),
            ),
        )
    if snapshot is None and config.snapshot.every:
        snapshot = sk.SnapshotConfig(every=config.snapshot.every)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    params, _ = split_variables(made)
    trainer = sk.Trainer(
        init=model.init,
        loss=model.loss,
        eval_loss=model.eval_loss,
        tx=build_optimizer(config.optimizer, params, config.data.ramp),
        data=train,
        mesh=build_mesh(config.mesh),
        combine=model.combine,
        **placement_rules(config, model),
        num_microbatches=config.data.ramp,
        seed=config.train.seed,
        consistency=config.train.consistency,
        certify=config.train.certify,
        checkpoint=sk.CheckpointConfig(
            directory=checkpoints, **dataclasses.asdict(config.checkpoint)
        ),
        snapshot=snapshot,
        speeds=speeds,
        probe=probe,
        eval=evaluation,
        ema=config.train.ema,
        loss_scale=_loss_scale(config.train.loss_scale),
        noise_scale=config.train.noise_scale,
        offload=config.train.offload,
        strict=config.train.strict,
        standby=config.train.standby,
        standby_counts=config.train.standby_counts,
        devices=devices,
        events=events,
        manifest={"config": configs.identity(config), "corpus_digest": digest},
    )
    return trainer, digest


def _check_option(value: Any, annotation: Any, place: str) -> Any:
    """Checks an option where the factory's annotation says something TOML can."""
    return convert(value, annotation, place) if accepts(annotation) else value
