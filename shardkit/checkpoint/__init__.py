"""Checkpoints: saved on one mesh, read on any, in any layout, verified to the bit.

The names that users need are loaded when they are first used, so that files can be
checked, and names remapped, without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.checkpoint.config import CheckpointConfig as CheckpointConfig

_HOMES = {"config": "CheckpointConfig"}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = f"shardkit.checkpoint.{_NAMES[name]}"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'shardkit.checkpoint' has no attribute {name!r}")
