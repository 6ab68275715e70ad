"""The notation of device counts by step, `"0:4,20:8"`.

Owns its syntax and the limits of the pool; what happens at a change does not live
here.
"""

import re

from shardkit.errors import ConfigError

__all__ = ["parse_resize"]


def parse_resize(text: str, pool: int, *, where: str = "resize") -> dict[int, int]:
    """Reads device counts by step.

    Args:
        text: `STEP:N` entries between commas, steps from 0 and rising; empty, or
            `none`, for no change.
        pool: Number of devices that there are.
        where: What to name in an error.

    Returns:
        The number of devices from the beginning of each step named.

    Raises:
        ConfigError: If the text cannot be read, a step is repeated or falls back,
            or a count is below 1 or above the pool.

    >>> parse_resize("0:4,20:8", pool=8)
    {0: 4, 20: 8}
    >>> parse_resize("", pool=8)
    {}
    """
    schedule: dict[int, int] = {}
    entries = [] if text.strip() in ("", "none") else text.split(",")
    for entry in entries:
        match = re.fullmatch(r"\s*([0-9]+)\s*:\s*(-?[0-9]+)\s*", entry)
        if match is None:
            raise ConfigError(
                f"{where}: expected STEP:N entries between commas, such as "
                f"0:4,20:8 with steps from 0, found {entry.strip()!r} in {text!r}"
            )
        step, count = int(match[1]), int(match[2])
        if step in schedule:
            raise ConfigError(f"{where}: step {step} stands twice in {text!r}")
        if schedule and step < max(schedule):
            raise ConfigError(
                f"{where}: expected rising steps, found {step} after {max(schedule)} "
                f"in {text!r}"
            )
        if not 1 <= count <= pool:
            raise ConfigError(
                f"{where}: expected 1 to {pool} devices, the pool, found {count} at "
                f"step {step}; change it (--resize) or the pool (--devices)"
            )
        schedule[step] = count
    return schedule
