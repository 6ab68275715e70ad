"""What a step's collectives are for, written where a profiler and XLA's text show it.

Owns the spelling of labels: a purpose, and the leaves that travel. Invariant: a label
changes no program, only the names of its operations.
"""

import contextlib
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import jax

__all__ = ["PURPOSES", "label", "read_label"]

PURPOSES = {
    "gather": "parameters made whole",
    "sum": "sum of gradients",
    "state": "the model's state made one",
    "metrics": "loss and metrics",
    "range": "range of gradients",
    "update": "optimizer's update",
}
"""What each purpose is in words."""

_LABEL = re.compile(r"shardkit:(\w+)\{([^{}]*)\}")
_RESERVED = re.compile(r"[%{},]|[^ -~]")


def label(
    purpose: str, names: Sequence[str] = ()
) -> contextlib.AbstractContextManager[Any]:
    """Labels the operations that are traced within.

    Args:
        purpose: One of `PURPOSES`.
        names: The leaves that travel, in their order.

    Example:
        >>> with label("gather", ["params/w"]):
        ...     pass
    """
    assert purpose in PURPOSES
    return jax.named_scope(f"shardkit:{purpose}{{{', '.join(map(_escape, names))}}}")


def read_label(op_name: str) -> tuple[str, tuple[str, ...]] | None:
    """Reads the innermost label in the name of an operation; None if it has none.

    Example:
        >>> read_label("jit(step)/shardkit:gather{params/a, params/b%2c}/all_gather")
        ('gather', ('params/a', 'params/b,'))
    """
    found = _LABEL.findall(op_name)
    if not found:
        return None
    purpose, names = found[-1]
    return purpose, tuple(unquote(name) for name in names.split(", ") if name)


def _escape(name: str) -> str:
    def spell(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02x}" for byte in match[0].encode())

    return _RESERVED.sub(spell, name)
