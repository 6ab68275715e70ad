"""What a process computes on and with, as far as bits may depend on it.

Owns the facts that two runs must share to have the same bits. It looks at JAX only if
that is there already; it decides nothing.
"""

import sys
from typing import Any

from shardkit.report.summary import versions

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Returns versions and, where devices are in use, what kind they are of."""
    found: dict[str, Any] = {"versions": versions()}
    # Who has no JAX has computed nothing, and looking must not start a backend.
    if "jax" not in sys.modules:
        return found
    from shardkit.checkpoint.manager import fingerprint

    known = {k: v for k, v in fingerprint().items() if k not in found["versions"]}
    return {**known, **found}
