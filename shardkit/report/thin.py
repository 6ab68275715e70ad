"""Fewer points of a curve, without losing what it shows.

Owns which points of a long run are drawn. Its invariant: the first and the last point,
and the lowest and the highest of every stretch, are among them, so that no spike goes.

References:
    Jugel et al., M4: A Visualization-Oriented Time Series Data Aggregation (VLDB 2014).
"""

import itertools
from collections.abc import Sequence

import numpy as np

from shardkit.report.picture import smooth

__all__ = ["MAX_POINTS", "Point", "smoothed", "thin"]

MAX_POINTS = 2000
"""How many points of a curve are drawn at most."""

Point = tuple[float, float | None]
"""Where, and how much; None where that is not known, which is a gap."""

_MAX_SMOOTHED = 500


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Keeps the first, last, lowest and highest point, and a gap, of every stretch.

    >>> thin([(x, float(x == 7)) for x in range(100)], most=10)
    [(0, 0.0), (7, 1.0), (49, 0.0), (50, 0.0), (99, 0.0)]
    """
    if len(points) <= most:
        return list(points)
    num = len(points)
    values = np.array([np.nan if y is None else y for _, y in points])
    edges = np.linspace(0, num, max(1, most // 5) + 1).astype(int)
    kept: set[int] = set()
    for start, stop in itertools.pairwise(edges):
        part = values[start:stop]
        kept |= {int(start), int(stop) - 1}
        gaps = np.isnan(part)
        if gaps.any():
            kept.add(int(start + np.argmax(gaps)))
        if not gaps.all():
            kept |= {int(start + np.nanargmin(part)), int(start + np.nanargmax(part))}
    return [points[i] for i in sorted(kept)]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Averages what is known around each point; of a long curve, around stretches.

    Returns:
        At most 500 points; none of fewer than ten.
    """
    known = [(x, y) for x, y in points if y is not None]
    if len(known) < 10:
        return []
    xs, ys = (np.array(column, float) for column in zip(*known, strict=True))
    edges = np.linspace(0, len(known), min(len(known), _MAX_SMOOTHED) + 1).astype(int)
    sizes = np.diff(edges)
    means = [np.add.reduceat(column, edges[:-1]) / sizes for column in (xs, ys)]
    line = smooth(means[1].tolist(), width=max(1.0, len(sizes) / 60))
    return [(float(x), float(y)) for x, y in zip(means[0], line, strict=True)]
