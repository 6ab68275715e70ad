"""The notation of sizes of memory, `"80GB"`.

Owns its units: those of ten, and those of two with an i.
"""

import re

from shardkit.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20, "TB": 1e12}


def parse_bytes(text: str) -> float:
    """Reads a size of memory.

    Raises:
        ConfigError: If it is none, or none above 0.

    >>> parse_bytes("80GB"), parse_bytes("1.5 GiB")
    (80000000000.0, 1610612736.0)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = float(match[1]) * units.get(match[2].lower(), 0.0) if match else 0.0
    if not size:
        raise ConfigError(
            f"expected a size above 0 in {', '.join(_UNITS)}, such as 80GB, "
            f"found {text!r}"
        )
    return size
