"""What several verbs take on the command line.

Owns the types of options: each says in one sentence what it expects.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardkit.checkpoint.manifest import Manifest
from shardkit.errors import ConfigError, reason

__all__ = [
    "MESH_AXES",
    "MOST_EMULATED",
    "add_compress",
    "add_devices",
    "add_limit",
    "add_maxtext",
    "add_step",
    "can_write",
    "counts",
    "device_count",
    "names",
    "number",
    "numbers",
    "pairs",
    "read_json",
    "recorded_config",
]

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context")
"""Those of `shardkit.mesh`, which needs JAX."""

MOST_EMULATED = 2048
"""How many devices JAX emulates in one process; more count as those of others."""

_MOST = 1 << 32


def add_step(parser: argparse.ArgumentParser) -> None:
    """Adds `--step`."""
    parser.add_argument(
        "--step", metavar="N", type=number(0), help="which step; the newest by default"
    )


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Adds how many devices a config is looked at on: see `device_count`."""
    parser.add_argument(
        "--devices",
        metavar="N",
        type=number(1),
        help="how many there are [devices of the config]",
    )


def device_count(
    arguments: argparse.Namespace, configured: int | None, most: int = _MOST
) -> int:
    """Returns how many devices there are, if not as `arguments.config` has it.

    Raises:
        ConfigError: If neither the command nor the config says so, or there are more
            than `most`.
    """
    if (found := arguments.devices or configured) is None:
        raise ConfigError(
            f"--devices: expected how many there are, as {arguments.config} has no "
            "devices; give --devices N"
        )
    if found > most:
        raise ConfigError(f"--devices: expected at most {most}, found {found}")
    return found


def can_write(path: Path) -> bool:
    """Whether a file can have this path: told before the work that it is for."""
    return path.parent.is_dir() and not path.is_dir()


def add_compress(parser: argparse.ArgumentParser) -> None:
    """Adds how arrays are compressed: see `write_checkpoint`."""
    parser.add_argument(
        "--compress",
        choices=("none", "zstd", "planes"),
        default="none",
        help="how arrays are compressed, losslessly [none]",
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Adds `--limit-mib`."""
    parser.add_argument(
        "--limit-mib",
        metavar="N",
        type=number(1),
        default=256,
        help="about how much memory to take for arrays; 256 by default",
    )


def add_maxtext(parser: argparse.ArgumentParser) -> None:
    """Adds what the arrays of MaxText do not tell."""
    parser.add_argument(
        "--scan-axis",
        metavar="N|none",
        type=_scan_axis,
        default=1,
        help="maxtext: its param_scan_axis, 1 by default; none for separate layers",
    )
    parser.add_argument(
        "--rotates-pairs",
        action="store_true",
        help="maxtext: its rope_type is llama3.1",
    )
    parser.add_argument(
        "--no-normalize-logits",
        action="store_true",
        help="maxtext: its normalize_embedding_logits is false",
    )


def _scan_axis(text: str) -> int | None:
    return None if text == "none" else number(0)(text)


def number(least: int) -> Callable[[str], int]:
    """Makes the type of a whole number."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number, {least} or more, found {text!r}"
            )
        return int(text)

    return parse


def names(text: str) -> list[str]:
    """Reads `a,b`."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[float]:
    """Reads `0.5,0.25`."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(
            f"expected numbers and commas between them, found {text!r}"
        )
    return found


def pairs(text: str) -> dict[str, str]:
    """Reads `a=x,b=y`."""
    parts = [each.partition("=") for each in text.split(",")]
    found = {name: value for name, _, value in parts}
    if not all(found) or not all(found.values()) or len(found) < len(parts):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE,…, found {text!r}")
    return found


def counts(text: str) -> dict[str, int]:
    """Reads the sizes of mesh axes."""
    found = pairs(text)
    bad = [
        f"{axis}={size}"
        for axis, size in found.items()
        if axis not in MESH_AXES or not size.isdecimal() or int(size) < 1
    ]
    if bad:
        raise argparse.ArgumentTypeError(
            f"expected sizes of {', '.join(MESH_AXES)}, found {', '.join(bad)}"
        )
    return {axis: int(size) for axis, size in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a table of JSON.

    Raises:
        ConfigError: If it is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read as JSON: {reason(error):.200}"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    return found


def recorded_config(manifest: Manifest | None) -> dict[str, Any]:
    """Finds the config of the run that saved, by dotted key; empty if unknown."""
    found = manifest.run.get("config") if manifest else None
    return found if isinstance(found, dict) else {}
