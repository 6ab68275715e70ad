"""The section `[mesh]` of a config.

Owns its keys, and which of them go together. Which sizes fit how many devices, and
which mesh is best, it does not know.
"""

from dataclasses import dataclass, field

from shardkit.config.sizes import parse_bytes
from shardkit.errors import ConfigError

__all__ = ["MeshSection"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshSection:
    """Sizes of the mesh axes; `data` or `fsdp` may be -1 and takes what is left.

    What fits which number of devices is decided, and refused, by `MeshSpec`. With
    `auto` the planner chooses, at the start and at every change of devices.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    auto: bool = False
    """Chooses `data` and `fsdp` for the devices that there are."""
    axes: list[str] = field(default_factory=list)
    """With `auto`: which of `tensor`, `expert` and `context` are chosen too, once."""
    allow_equivalent: bool = False
    """With `axes`: a change of devices may choose them anew, and round otherwise."""
    profile: str | None = None
    """With `auto`: what a device can do, a name as for `shardkit plan` or a TOML file;
    None is that of its kind."""
    memory: str | None = None
    """With `auto`: the memory of a device, such as `"80GB"`; None is what it has."""

    def __post_init__(self):
        # Read here, so that one that is none is refused at once.
        assert self.memory_bytes != 0
        given = {
            "axes": self.axes,
            "allow_equivalent": self.allow_equivalent,
            "profile": self.profile,
            "memory": self.memory,
        }
        useless = [name for name, value in given.items() if value]
        if useless and not self.auto:
            raise ConfigError(f"{', '.join(useless)}: of no use without auto = true")
        if self.auto and (self.data, self.fsdp) != (1, -1):
            raise ConfigError(
                "data and fsdp are chosen with auto = true; leave them out, or auto"
            )

    @property
    def memory_bytes(self) -> float | None:
        """The memory of a device, if it is given."""
        try:
            return None if self.memory is None else parse_bytes(self.memory)
        except ConfigError as error:
            raise ConfigError(f"memory: {error}") from None
