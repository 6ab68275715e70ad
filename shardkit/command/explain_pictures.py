"""Which leaves are drawn, and which of them look alike.

Owns the choice. It draws nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence

from shardkit.errors import ConfigError
from shardkit.explain.leaves import PlacedLeaf
from shardkit.explain.picture import Picture, draw
from shardkit.explain.tables import spell_names
from shardkit.tree import find_rule

__all__ = ["Alike", "choose"]


@dataclasses.dataclass(frozen=True)
class Alike:
    """Leaves of one shape that lie alike.

    Attributes:
        leaves: They.
    """

    leaves: tuple[PlacedLeaf, ...]

    @functools.cached_property
    def picture(self) -> Picture:
        """What they all look like."""
        title = spell_names([leaf.path for leaf in self.leaves], most=1)
        return draw(title, self.leaves[0].layout)


def choose(leaves: Sequence[PlacedLeaf], globs: Sequence[str]) -> list[Alike]:
    """Takes the leaves that globs name, or all; the largest first.

    Raises:
        ConfigError: If a glob fits none.
    """
    unused = [g for g in globs if not any(find_rule(x.path, {g: 1}) for x in leaves)]
    if unused:
        known = spell_names([leaf.path for leaf in leaves], most=6)
        raise ConfigError(
            f"--leaf {', '.join(unused)}: expected paths of leaves, such as {known}"
        )
    found: dict[object, list[PlacedLeaf]] = {}
    for leaf in leaves:
        if not globs or find_rule(leaf.path, dict.fromkeys(globs)):
            key = leaf.layout.shape, leaf.layout.itemsize, leaf.layout.cuts
            found.setdefault(key, []).append(leaf)
    alike = [Alike(tuple(each)) for each in found.values()]
    return sorted(alike, key=lambda x: -x.leaves[0].layout.num_bytes)
