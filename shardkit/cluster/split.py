"""Devices over processes, and processes over hosts: contiguous and even.

Owns that arithmetic. Invariant: a split depends on counts alone, and its parts differ
by one at most, the larger ones first.
"""

import dataclasses

from shardkit.errors import ConfigError

__all__ = ["HostPlan", "plan_hosts", "split"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostPlan:
    """What one host has when it is there.

    Attributes:
        host: Its name.
        num_processes: How many workers of a generation run on it.
        num_devices: How many devices these have together.
    """

    host: str
    num_processes: int
    num_devices: int


def split(count: int, parts: int) -> list[int]:
    """Cuts a count into parts, as evenly as possible.

    Example:
        >>> split(7, 3)
        [3, 2, 2]
    """
    least, more = divmod(count, parts)
    return [least + (index < more) for index in range(parts)]


def plan_hosts(
    num_processes: int, num_hosts: int, num_devices: int
) -> tuple[HostPlan, ...]:
    """Plans emulated hosts.

    Args:
        num_processes: How many workers run when all hosts are there.
        num_hosts: How many hosts there are.
        num_devices: How many devices all of them have.

    Raises:
        ConfigError: If a host would have no process, or a process no device.

    Example:
        >>> [(x.host, x.num_processes, x.num_devices) for x in plan_hosts(3, 2, 7)]
        [('host-0', 2, 5), ('host-1', 1, 2)]
    """
    bad = []
    if num_processes < 1:
        bad.append(f"--processes: expected at least 1, found {num_processes}")
    if not 1 <= num_hosts <= max(num_processes, 1):
        bad.append(
            f"--hosts: expected 1 to {max(num_processes, 1)}, one process each at "
            f"least, found {num_hosts}"
        )
    if num_devices < num_processes:
        bad.append(
            f"--devices: expected at least {num_processes}, one a process, found "
            f"{num_devices}"
        )
    if bad:
        raise ConfigError("; ".join(bad))
    devices = iter(split(num_devices, num_processes))
    return tuple(
        HostPlan(
            host=f"host-{index}",
            num_processes=count,
            num_devices=sum(next(devices) for _ in range(count)),
        )
        for index, count in enumerate(split(num_processes, num_hosts))
    )
