"""Checkpoints: saved on one mesh, read on any, in any layout, verified to the bit.

The names that users need are loaded when they are first used, so that files can be
checked, and names remapped, without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.checkpoint.api import restore as restore
    from shardkit.checkpoint.api import save as save
    from shardkit.checkpoint.api import verify as verify
    from shardkit.checkpoint.config import CheckpointConfig as CheckpointConfig
    from shardkit.checkpoint.families import Decoder as Decoder
    from shardkit.checkpoint.families import Layout as Layout
    from shardkit.checkpoint.families import infer_decoder as infer_decoder
    from shardkit.checkpoint.families import infer_layout as infer_layout
    from shardkit.checkpoint.families import model_options as model_options
    from shardkit.checkpoint.huggingface import export_huggingface as export_huggingface
    from shardkit.checkpoint.huggingface import from_huggingface as from_huggingface
    from shardkit.checkpoint.huggingface import import_huggingface as import_huggingface
    from shardkit.checkpoint.huggingface import to_huggingface as to_huggingface
    from shardkit.checkpoint.maxtext import MaxTextLayout as MaxTextLayout
    from shardkit.checkpoint.maxtext import from_maxtext as from_maxtext
    from shardkit.checkpoint.maxtext import infer_maxtext as infer_maxtext
    from shardkit.checkpoint.maxtext import to_maxtext as to_maxtext
    from shardkit.checkpoint.merge import average as average
    from shardkit.checkpoint.merge import average_by_metric as average_by_metric
    from shardkit.checkpoint.merge import decay_weights as decay_weights
    from shardkit.checkpoint.merge import ema as ema
    from shardkit.checkpoint.merge import ema_weights as ema_weights
    from shardkit.checkpoint.merge import metric_weights as metric_weights
    from shardkit.checkpoint.merge import schedule_weights as schedule_weights
    from shardkit.checkpoint.orbax_trees import from_linen as from_linen
    from shardkit.checkpoint.orbax_trees import from_nnx as from_nnx
    from shardkit.checkpoint.orbax_trees import to_linen as to_linen
    from shardkit.checkpoint.orbax_trees import to_nnx as to_nnx
    from shardkit.checkpoint.reader import open_checkpoint as open_checkpoint
    from shardkit.checkpoint.remap import Remap as Remap
    from shardkit.checkpoint.remap import load_rules as load_rules
    from shardkit.checkpoint.remap_ops import Average as Average
    from shardkit.checkpoint.remap_ops import Cast as Cast
    from shardkit.checkpoint.remap_ops import Drop as Drop
    from shardkit.checkpoint.remap_ops import Fuse as Fuse
    from shardkit.checkpoint.remap_ops import Init as Init
    from shardkit.checkpoint.remap_ops import Pad as Pad
    from shardkit.checkpoint.remap_ops import Reshape as Reshape
    from shardkit.checkpoint.remap_ops import Slice as Slice
    from shardkit.checkpoint.remap_ops import Split as Split
    from shardkit.checkpoint.remap_ops import Stack as Stack
    from shardkit.checkpoint.remap_ops import Transpose as Transpose
    from shardkit.checkpoint.remap_ops import Unpad as Unpad
    from shardkit.checkpoint.remap_ops import Unstack as Unstack
    from shardkit.checkpoint.rules import Rule as Rule
    from shardkit.checkpoint.safetensors_files import (
        open_safetensors as open_safetensors,
    )
    from shardkit.checkpoint.safetensors_files import (
        write_safetensors as write_safetensors,
    )
    from shardkit.checkpoint.store import write_checkpoint as write_checkpoint
    from shardkit.checkpoint.views import ArrayView as ArrayView
    from shardkit.checkpoint.views import View as View

_HOMES = {
    "api": "restore save verify",
    "config": "CheckpointConfig",
    "families": "Decoder Layout infer_decoder infer_layout model_options",
    "huggingface": "export_huggingface from_huggingface import_huggingface "
    "to_huggingface",
    "maxtext": "MaxTextLayout from_maxtext infer_maxtext to_maxtext",
    "merge": "average average_by_metric decay_weights ema ema_weights metric_weights "
    "schedule_weights",
    "orbax_trees": "from_linen from_nnx to_linen to_nnx",
    "reader": "open_checkpoint",
    "remap": "Remap load_rules",
    "remap_ops": "Average Cast Drop Fuse Init Pad Reshape Slice Split Stack Transpose "
    "Unpad Unstack",
    "rules": "Rule",
    "safetensors_files": "open_safetensors write_safetensors",
    "store": "write_checkpoint",
    "views": "ArrayView View",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = f"shardkit.checkpoint.{_NAMES[name]}"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'shardkit.checkpoint' has no attribute {name!r}")
