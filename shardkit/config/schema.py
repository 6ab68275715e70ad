"""What a run is made of: sections, keys, defaults and ranges.

Owns which keys exist, what they mean, and which of them make a run the run that it
is. Its invariant: a `RunConfig` that exists is valid. It builds nothing and imports
no JAX; `loader.py` reads it from files and `cli.py` turns it into objects.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shardkit.config.mesh import MeshSection
from shardkit.config.toml import dump_toml
from shardkit.errors import ConfigError
from shardkit.ramp import BatchRamp

__all__ = [
    "BUILT_IN_DATA",
    "CheckpointSection",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "RunConfig",
    "SnapshotSection",
    "TrainSection",
    "differences",
    "identity",
    "to_dict",
    "to_toml",
]

FREE_ON_RESUME = (
    "devices",
    "resize",
    "mesh",
    "snapshot",
    "train.steps",
    "train.log_every",
    "train.noise_scale",
    "train.standby",
    "train.standby_counts",
)
"""Keys that say where a run is evaluated, how far and how it is shown."""

BUILT_IN_DATA = ("text", "tokens", "documents")
"""Words that `data.factory` may be instead of a `"module:attribute"`."""

_USED_BY = {
    "adamw": ("b1", "b2"),
    "lion": ("b1", "b2"),
    "lamb": ("b1", "b2"),
    "lars": ("momentum",),
    "sgd": ("momentum",),
    "adafactor": ("momentum",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """The model, named as a factory that is resolved at run time."""

    factory: str
    """`"module:attribute"`, called with the options; for example `models.gpt:build`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """The corpus and the fixed grid of microbatches that a step is made of."""

    factory: str = "text"
    """`"text"`, bytes as tokens; `"tokens"`, files of token ids; `"documents"`, packed
    into rows; or `"module:attribute"`, called with `global_batch_size`, `seed`, `split`
    and the options."""
    path: str | None = None
    """Not for a factory of your own: a file, a directory or a glob. None is the
    default corpus of `"text"`, the sources of Python's standard library."""
    sequence_length: int | None = None
    """Not for a factory of your own: tokens per row."""
    validation_fraction: float | None = None
    """Not for a factory of your own: the part that is kept for evaluation."""
    global_batch_size: int
    """Rows per step, on any number of devices."""
    num_microbatches: int
    """Equal parts of the global batch, each evaluated at once on one device."""
    batch_ramp: str | None = None
    """Other numbers of such parts by step, `"1000:16,3000:32"`. Parts keep their size,
    so that the batch grows with them; `global_batch_size` is that of step 0."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a factory other than `"text"`; what `"tokens"` and
    `"documents"` take is in `docs/data.md`."""

    def __post_init__(self):
        _at_least(self, 1, "global_batch_size", "num_microbatches", "sequence_length")
        if self.global_batch_size % self.num_microbatches:
            raise ConfigError(
                f"global_batch_size = {self.global_batch_size} is not divisible by "
                f"num_microbatches = {self.num_microbatches}; "
                "change one so that every microbatch has the same rows"
            )
        # Read here, so that one that is none is refused at once.
        assert self.ramp is not None
        _fraction(self, "validation_fraction")
        if self.factory in BUILT_IN_DATA:
            needed = ("sequence_length", "path")[: 1 + (self.factory != "text")]
            for name in needed:
                if getattr(self, name) is None:
                    raise ConfigError(
                        f'{name} is missing; factory = "{self.factory}" needs it'
                    )
            if self.factory == "text" and self.options:
                raise ConfigError('options are of no use to factory = "text"')
            return
        for name in ("path", "sequence_length", "validation_fraction"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is for {', '.join(BUILT_IN_DATA)} alone, and factory = "
                    f"{self.factory!r}; "
                    "move it into [data.options] if that factory takes it"
                )

    @property
    def ramp(self) -> BatchRamp:
        """How many microbatches each step has."""
        if self.batch_ramp is None:
            return BatchRamp({0: self.num_microbatches})
        try:
            return BatchRamp.parse(self.batch_ramp, self.num_microbatches)
        except ConfigError as error:
            raise ConfigError(f"batch_ramp: {error}") from None

    @property
    def rows(self) -> BatchRamp:
        """How many rows each step has."""
        return self.ramp.rows(self.global_batch_size // self.num_microbatches)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSection:
    """The optimizer, its schedule, clipping and weight decay."""

    name: Literal["adamw", "lion", "sgd", "adafactor", "lamb", "lars"] = "adamw"
    """The update rule, from Optax."""
    learning_rate: float
    """The peak of the schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The course after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    horizon_steps: int | None = None
    """The step at which the schedule ends; it does not follow `train.steps`, so that
    a run can be stopped early or prolonged without becoming another run."""
    end_factor: float = 0.0
    """The learning rate at the horizon, as a part of the peak."""
    scale_to_batch: Literal["linear", "sqrt"] | None = None
    """Times k, or √k, where `batch_ramp` makes the batch k times that of step 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate; adafactor's is not."""
    decay_mask: Literal["all", "matrices"] = "matrices"
    """What decays: every leaf, or those of at least two dims, of which a dim that
    stacks layers (its logical axis is `layers`) is not one."""
    b1: float | None = None
    """Decay of the first moment; None is the usual one of the optimizer."""
    b2: float | None = None
    """Decay of the second moment; None is the usual one of the optimizer."""
    momentum: float | None = None
    """Momentum of sgd, adafactor and lars; None is none, and 0.9 for lars."""
    clip_norm: float | None = None
    """Clips the global norm of the gradient."""
    clip_z: float | None = None
    """Clips a norm that is so many standard deviations above what it has been."""
    clip_z_warmup_steps: int | None = None
    """Steps for which norms are only looked at, for `clip_z`; None is 25."""

    def __post_init__(self):
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _at_least(self, 1, "horizon_steps")
        _at_least(self, 2, "clip_z_warmup_steps")
        if self.clip_z_warmup_steps is not None and self.clip_z is None:
            raise ConfigError("clip_z_warmup_steps is of no use without clip_z")
        for name in ("learning_rate", "clip_norm", "clip_z"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: expected more than 0, found {value}")
        if not 0 <= self.end_factor <= 1:
            raise ConfigError(f"end_factor: expected 0 to 1, found {self.end_factor}")
        _fraction(self, "b1", "b2", "momentum")
        for name in ("b1", "b2", "momentum"):
            if getattr(self, name) is not None and name not in _USED_BY[self.name]:
                raise ConfigError(f"{name} is of no use to name = {self.name!r}")
        if self.schedule == "constant":
            return
        if self.horizon_steps is None:
            raise ConfigError(
                f"horizon_steps is missing; schedule = {self.schedule!r} needs the "
                "step at which it ends (it does not follow train.steps)"
            )
        if self.horizon_steps <= self.warmup_steps:
            raise ConfigError(
                f"horizon_steps: expected more than warmup_steps = "
                f"{self.warmup_steps}, found {self.horizon_steps}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How long, from which seed, how exactly, and what is looked at on the way."""

    steps: int
    """The step at which the run ends, also after a resume."""
    seed: int = 0
    """Root of every random stream and of the order of the data."""
    consistency: Literal["exact", "fast"] = "exact"
    """Whether the bits or only the mathematics survive a change of devices."""
    certify: Literal["always", "first", "off"] = "always"
    """Which changes of devices are checked by running one step on both sides."""
    ema: float | None = None
    """Decay of an average of the weights, which evaluation then uses."""
    offload: bool = False
    """Keeps the optimizer's state in host memory but for its update."""
    loss_scale: float | None = None
    """A constant the loss is multiplied by before the gradient is taken."""
    strict: bool = False
    """Turns unused axis rules and unannotated leaves into errors."""
    noise_scale: bool = False
    """Measures the gradient noise scale, a metric of every step."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end alone."""
    eval_batches: int = 8
    """Global batches per evaluation; 0 never evaluates."""
    standby: int = 4
    """How many placements that may come next are compiled in the background."""
    standby_counts: list[int] = field(default_factory=list)
    """Device counts of which to think first for that, after those of `resize`."""
    log_every: int | None = None
    """Steps between lines where there is no terminal; None is a tenth of the run."""

    def __post_init__(self):
        _at_least(self, 1, "steps", "log_every")
        _at_least(self, 0, "seed", "eval_every", "eval_batches", "standby")
        _fraction(self, "ema")
        if min(self.standby_counts, default=1) < 1:
            raise ConfigError(
                "standby_counts: expected device counts of at least 1, found "
                f"{self.standby_counts}"
            )
        if self.loss_scale is not None and self.loss_scale <= 0:
            raise ConfigError(
                f"loss_scale: expected more than 0, found {self.loss_scale}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSection:
    """When the state is saved; the last step always is."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 3
    """Newest checkpoints that are kept; older ones are removed, but for these:"""
    keep_every: int | None = None
    """Checkpoints at multiples of so many steps stay."""
    keep_best: int = 0
    """So many of the best, by the validation loss before each, stay."""
    compress: bool = False
    """Whether arrays are compressed (zstd): a little smaller, slower to read."""

    def __post_init__(self):
        _at_least(self, 1, "every", "keep", "keep_every")
        _at_least(self, 0, "keep_best")


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotSection:
    """When the state is copied to host memory, to go on from after a loss of devices.

    The two newest copies are kept, and a device holds its part of the state twice while
    one is made. A copy is made beside the steps, which hardly wait.
    """

    every: int = 0
    """Steps between snapshots; 0 takes none. With 1 no more is repeated than the step
    in flight, and a change after a loss is certified like any other."""

    def __post_init__(self):
        _at_least(self, 0, "every")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    train: TrainSection
    mesh: MeshSection = field(default_factory=MeshSection)
    axis_rules: dict[str, str] = field(default_factory=dict)
    """Logical axis name to mesh axis, over the rules the model brings along; empty
    text leaves the dim whole."""
    path_rules: dict[str, list[str]] = field(default_factory=dict)
    """Glob over paths of parameters to a logical or mesh axis for every dim, empty text
    for none, for what the model says nothing of; the first that fits counts."""
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    snapshot: SnapshotSection = field(default_factory=SnapshotSection)
    devices: int | None = None
    """Size of the pool; None is 8 emulated devices, or every real one."""
    resize: str = ""
    """Device counts by step, `"0:4,20:8"`; before the first entry, the whole pool."""

    def __post_init__(self):
        _at_least(self, 1, "devices")
        if self.optimizer.scale_to_batch and self.data.ramp.is_constant:
            raise ConfigError(
                "[optimizer] scale_to_batch is of no use without batch_ramp in [data]"
            )


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as nested plain values, every default spelled out."""
    return asdict(config)


def to_toml(config: RunConfig) -> str:
    """Writes the config, every default spelled out, as TOML."""
    return dump_toml(to_dict(config))


def identity(config: RunConfig) -> dict[str, Any]:
    """Returns the values, by dotted key, that may not differ on resume."""
    return {
        key: value
        for key, value in _flatten(to_dict(config))
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)
    }


def differences(saved: RunConfig, asked: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the keys that make two configs two runs, with both values."""
    old, new = identity(saved), identity(asked)
    keys = sorted(old.keys() | new.keys())
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key)
    }


def _at_least(section: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}: expected at least {least}, found {value}")


def _fraction(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{name}: expected 0 to 1, 1 excluded, found {value}")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
