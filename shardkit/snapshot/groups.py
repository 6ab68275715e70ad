"""Which hosts protect one another, and against how many losses.

Owns `Redundancy` and the groups. Invariant: a group is of hosts, so nothing ever
protects what is on its own host; every host is in one group, and none is alone if there
are two. What cannot be protected is said. Pure.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from shardkit.errors import ConfigError

__all__ = ["Group", "Redundancy", "describe_limits", "form_groups"]

_TEXT = re.compile(r"(none|mirror|parity)(?::([1-9][0-9]?))?")


@dataclasses.dataclass(frozen=True)
class Redundancy:
    """How what only one host has is kept a second time.

    Attributes:
        kind: `"none"`; `"mirror"`, whole copies in a partner's memory; or `"parity"`.
        num_losses: How many hosts of a group may be lost at once.

    Example:
        >>> Redundancy.parse("parity:2")
        Redundancy(kind='parity', num_losses=2)
    """

    kind: str
    num_losses: int

    @classmethod
    def parse(cls, text: str) -> "Redundancy":
        """Reads `none`, `mirror`, `parity` or `parity:M`.

        Raises:
            ConfigError: If it is none of these.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[2] and match[1] != "parity"):
            raise ConfigError(
                "redundancy: expected none, mirror, parity or parity:M with the number "
                f"of hosts that may be lost at once, found {text!r:.80}."
            )
        return cls(match[1], 0 if match[1] == "none" else int(match[2] or 1))

    def __str__(self) -> str:
        return f"parity:{self.num_losses}" if self.num_losses > 1 else self.kind


@dataclasses.dataclass(frozen=True)
class Group:
    """Hosts that protect one another.

    Attributes:
        hosts: Their names; who is where in a codeword follows their order.
        num_losses: How many of them may be lost at once.
        is_mirror: Whether each keeps whole copies, of the one before it.
    """

    hosts: tuple[str, ...]
    num_losses: int
    is_mirror: bool = False


def form_groups(
    hosts: Iterable[str], redundancy: Redundancy, group_size: int = 8
) -> tuple[Group, ...]:
    """Parts hosts into groups of nearly the same size.

    Hosts that are neighbours by name often share a switch or a power supply, and are
    lost together; so a group takes every n-th.

    Args:
        hosts: All hosts.
        redundancy: What is wanted.
        group_size: The most hosts of a group, where that leaves no group too small for
            `num_losses`; mirrors are pairs. Parity takes M / (size - M) of the memory
            of what it protects.

    Returns:
        The groups; none if nothing is to be protected, or there is but one host.

    Raises:
        ConfigError: If the group size is no more than the losses.

    Example:
        >>> groups = form_groups("abcde", Redundancy.parse("parity"), group_size=4)
        >>> [group.hosts for group in groups]
        [('a', 'c', 'e'), ('b', 'd')]
    """
    hosts, num_losses = sorted(set(hosts)), redundancy.num_losses
    if redundancy.kind == "none" or len(hosts) < 2:
        return ()
    is_mirror = redundancy.kind == "mirror"
    size = 2 if is_mirror else group_size
    if not num_losses < size <= 256:
        raise ConfigError(
            f"redundancy {redundancy}: expected groups of {num_losses + 1} to 256 "
            f"hosts, found group_size = {group_size}."
        )
    num_groups = -(-len(hosts) // size)
    while num_groups > 1 and len(hosts) // num_groups <= num_losses:
        num_groups -= 1
    return tuple(
        Group(group, min(num_losses, len(group) - 1), is_mirror)
        for start in range(num_groups)
        for group in [tuple(hosts[start::num_groups])]
    )


def describe_limits(
    hosts: Sequence[str], redundancy: Redundancy, groups: Sequence[Group]
) -> list[str]:
    """Says what the redundancy that was asked for cannot do with these hosts.

    >>> redundancy = Redundancy.parse("parity:2")
    >>> describe_limits("ab", redundancy, form_groups("ab", redundancy))
    ['parity:2 protects against the loss of 1 of 2 hosts only: a, b. Add hosts.']
    """
    if redundancy.kind == "none":
        return []
    if not groups:
        return [
            f"{redundancy}: nothing can be protected with {len(set(hosts))} host: its "
            "loss takes the run back to the last checkpoint on disk. Add hosts."
        ]
    return [
        f"{redundancy} protects against the loss of {group.num_losses} of "
        f"{len(group.hosts)} hosts only: {', '.join(group.hosts)}. Add hosts."
        for group in groups
        if group.num_losses < redundancy.num_losses
    ]
