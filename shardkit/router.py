"""The routes that the leaves of a state share.

Owns `Router`, which finds what leaves have in common: which dims are cut, how, over
which grids, and which sources come into question. Invariant: leaves get the same route
just if the same choices serve both. It chooses no senders.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from shardkit.layout import Layout
from shardkit.places import Places
from shardkit.routes import Level, Route
from shardkit.senders import Pattern, is_lost_in

__all__ = ["Router"]


class Router:
    """Makes routes, one for all leaves that are alike.

    Attributes:
        has_losses: Whether any place is lost.
    """

    def __init__(
        self,
        trees: Sequence[Mapping[str, Layout]],
        lost: frozenset[int],
        lost_hosts: frozenset[int],
    ) -> None:
        """Looks over all grids.

        Args:
            trees: All sources and the target.
            lost: Devices whose memory is gone.
            lost_hosts: Hosts of which everything is gone.
        """
        grids = {layout.places for tree in trees for layout in tree.values()}
        hosts = [places.hosts.ravel() for places in grids]
        self._hosts = np.unique(np.concatenate(hosts)) if hosts else np.zeros(0, int)
        self._is_lost = is_lost_in(lost, lost_hosts)
        self.has_losses = any(self._is_lost(places).any() for places in grids)
        self._patterns: dict[tuple[Places, tuple[tuple[str, ...], ...]], Pattern] = {}
        self._routes: dict[object, Route] = {}

    @property
    def routes(self) -> Iterable[Route]:
        """All that were made."""
        return self._routes.values()

    def find(
        self, sources: Sequence[tuple[int, Layout]], target: Layout
    ) -> tuple[Route, tuple[int, ...]]:
        """Finds a leaf's route, and the dims of the leaf that the route is about.

        Args:
            sources: Where the leaf is, with the numbers of the sources.
            target: Where it is wanted.
        """
        found = sorted(sources, key=lambda source: source[1].places.medium)
        if found and not self.has_losses:
            last = max(found[0][1].places.medium, target.places.medium)
            found = [source for source in found if source[1].places.medium <= last]
        layouts = [target, *(layout for _, layout in found)]
        counts = [layout.counts for layout in layouts]
        dims = tuple(
            dim for dim, _ in enumerate(target.shape) if any(c[dim] > 1 for c in counts)
        )
        sizes = tuple(target.shape[dim] for dim in dims)
        cuts = [(x.places, tuple(x.cuts[dim] for dim in dims)) for x in layouts]
        key = sizes, tuple(cuts), tuple(index for index, _ in found)
        if key not in self._routes:
            first, *rest = (self._pattern(*cut) for cut in cuts)
            numbered = [(i, p) for (i, _), p in zip(found, rest, strict=True)]
            self._routes[key] = Route(sizes, first, _levels(first, numbered))
        return self._routes[key], dims

    def _pattern(self, places: Places, cuts: tuple[tuple[str, ...], ...]) -> Pattern:
        key = places, cuts
        if key not in self._patterns:
            self._patterns[key] = Pattern(places, cuts, self._is_lost, self._hosts)
        return self._patterns[key]


def _levels(target: Pattern, found: Sequence[tuple[int, Pattern]]) -> tuple[Level, ...]:
    """Groups sources by medium, up to the first that has everything."""
    levels: list[Level] = []
    above: tuple[Pattern, ...] = ()
    # What is already in host memory is cheaper there than what a device has, so media
    # up to the target's are looked at together.
    by_medium = itertools.groupby(
        found, lambda f: max(f[1].places.medium, target.places.medium)
    )
    for _, group in by_medium:
        numbers, members = zip(*group, strict=True)
        levels.append(Level(members, numbers, above))
        above += members
        if any(member.available.all() for member in members):
            break
    return tuple(levels)
