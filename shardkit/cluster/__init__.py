"""Processes and hosts: who is there, what each is, and how a run survives them.

The names that programs need are loaded when they are first used. Nothing in here
imports JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.cluster.joining import join as join
    from shardkit.cluster.member import Member as Member
    from shardkit.cluster.records import Assignment as Assignment
    from shardkit.cluster.records import ImageRef as ImageRef
    from shardkit.cluster.records import Resume as Resume
    from shardkit.cluster.slot import Slot as Slot

_HOMES = {
    "joining": "join",
    "member": "Member Slot",
    "records": "Assignment ImageRef Resume",
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        home = f"shardkit.cluster.{_NAMES[name]}"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'shardkit.cluster' has no attribute {name!r}")
