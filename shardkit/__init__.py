"""Training on JAX that changes its device count and keeps every bit.

The public names, loaded when they are first used, so that a command line can start
without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit import checkpoint as checkpoint
    from shardkit import data as data
    from shardkit import keys as keys
    from shardkit import nn as nn
    from shardkit import sources as sources
    from shardkit.annotation_table import annotate as annotate
    from shardkit.annotations import Axes as Axes
    from shardkit.annotations import axes as axes
    from shardkit.checkpoint import CheckpointConfig as CheckpointConfig
    from shardkit.clipping import clip_spikes as clip_spikes
    from shardkit.errors import CertificateError as CertificateError
    from shardkit.errors import ConfigError as ConfigError
    from shardkit.errors import DamagedError as DamagedError
    from shardkit.errors import DataError as DataError
    from shardkit.errors import Halted as Halted
    from shardkit.errors import InexactError as InexactError
    from shardkit.errors import LostStateError as LostStateError
    from shardkit.errors import MembershipError as MembershipError
    from shardkit.errors import MeshError as MeshError
    from shardkit.errors import NonFiniteError as NonFiniteError
    from shardkit.errors import PartitionError as PartitionError
    from shardkit.errors import Preempted as Preempted
    from shardkit.errors import RestoreError as RestoreError
    from shardkit.errors import SaveError as SaveError
    from shardkit.errors import ShardkitError as ShardkitError
    from shardkit.evaluation import EvalConfig as EvalConfig
    from shardkit.evaluation import FixedSet as FixedSet
    from shardkit.events import EventLog as EventLog
    from shardkit.explain.program import explain_program as explain_program
    from shardkit.frameworks.equinox import from_equinox as from_equinox
    from shardkit.frameworks.haiku import from_haiku as from_haiku
    from shardkit.frameworks.linen import from_linen as from_linen
    from shardkit.frameworks.nnx import from_nnx as from_nnx
    from shardkit.logical_axes import constrain as constrain
    from shardkit.logical_axes import infer_shardings as infer_shardings
    from shardkit.membership import Lost as Lost
    from shardkit.membership import combine as combine
    from shardkit.membership import scripted as scripted
    from shardkit.membership import signals as signals
    from shardkit.membership import watch_file as watch_file
    from shardkit.mesh import MeshSpec as MeshSpec
    from shardkit.metrics import StepMetrics as StepMetrics
    from shardkit.model import LossOutput as LossOutput
    from shardkit.model import Model as Model
    from shardkit.model_state import Variables as Variables
    from shardkit.planner.auto_mesh import AutoMesh as AutoMesh
    from shardkit.program import Program as Program
    from shardkit.program_cache import use_program_cache as use_program_cache
    from shardkit.ramp import BatchRamp as BatchRamp
    from shardkit.recipe import LossScale as LossScale
    from shardkit.resharding import reshard as reshard
    from shardkit.schedules import scale_to_batch as scale_to_batch
    from shardkit.snapshot.config import SnapshotConfig as SnapshotConfig
    from shardkit.sources.examples import Examples as Examples
    from shardkit.sources.iterables import from_iterable as from_iterable
    from shardkit.sources.mixture import Mixture as Mixture
    from shardkit.trainer import Trainer as Trainer
    from shardkit.verdict import Exactness as Exactness
    from shardkit.verdict import exactness as exactness
    from shardkit.version import __version__ as __version__

_MODULES = ("checkpoint", "data", "keys", "nn", "sources")
_HOMES = {
    "annotation_table": "annotate",
    "annotations": "Axes axes",
    "checkpoint": "CheckpointConfig",
    "clipping": "clip_spikes",
    "errors": "CertificateError ConfigError DamagedError DataError Halted InexactError "
    "LostStateError MembershipError MeshError NonFiniteError PartitionError Preempted "
    "RestoreError SaveError ShardkitError",
    "evaluation": "EvalConfig FixedSet",
    "events": "EventLog",
    "explain.program": "explain_program",
    "frameworks.equinox": "from_equinox",
    "frameworks.haiku": "from_haiku",
    "frameworks.linen": "from_linen",
    "frameworks.nnx": "from_nnx",
    "logical_axes": "constrain infer_shardings",
    "membership": "Lost combine scripted signals watch_file",
    "mesh": "MeshSpec",
    "metrics": "StepMetrics",
    "model": "LossOutput Model",
    "model_state": "Variables",
    "planner.auto_mesh": "AutoMesh",
    "program": "Program",
    "program_cache": "use_program_cache",
    "ramp": "BatchRamp",
    "recipe": "LossScale",
    "resharding": "reshard",
    "schedules": "scale_to_batch",
    "snapshot.config": "SnapshotConfig",
    "sources": "Examples Mixture from_iterable",
    "trainer": "Trainer",
    "verdict": "Exactness exactness",
    "version": "__version__",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted([*_MODULES, *_NAMES])  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"shardkit.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"shardkit.{name}")
    raise AttributeError(f"module 'shardkit' has no attribute {name!r}")
