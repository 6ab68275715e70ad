"""How a leaf lies over a mesh, arranged to be drawn.

Owns what a picture shows of a layout: two dims side by side, a panel for every piece of
the others, a number for every different piece. Invariant: boxes are those of
`shardkit.layout`, whatever cuts the leaf and however many devices hold the same.
"""

import colorsys
import dataclasses
import itertools
from collections.abc import Sequence

from shardkit.layout import Box, Layout

__all__ = ["Cell", "Panel", "Picture", "colour", "draw", "spell_ids"]

_GOLDEN = 0.381966


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece.

    Attributes:
        number: Of the piece, counted in the order of its box.
        ids: The devices that hold it.
    """

    number: int
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """The pieces that share their place in all dims but two.

    Attributes:
        title: Where they are in the others; `""` if nothing else is cut.
        rows: The pieces, row by row.
    """

    title: str
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn of a leaf.

    Attributes:
        title: What the leaf is called.
        layout: Its layout.
        words: Its layout in words.
        dims: Which dims are rows and columns; None for a leaf that has none.
        rows: The ranges of the first.
        columns: The ranges of the second.
        panels: The pieces.
        padding_ids: Devices that hold padding only.
    """

    title: str
    layout: Layout
    words: str
    dims: tuple[int | None, int | None]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    panels: tuple[Panel, ...]
    padding_ids: tuple[int, ...]

    @property
    def number_of(self) -> dict[int, int]:
        """Device → the number of the piece that it holds, if it holds any."""
        cells = (c for p in self.panels for row in p.rows for c in row)
        return {id: cell.number for cell in cells for id in cell.ids}

    def padding(self, dim: int | None) -> int:
        """How far the physical array goes beyond a dim."""
        if dim is None:
            return 0
        layout = self.layout
        full = layout.piece_shape[dim] * layout.counts[dim]
        return full - layout.shape[dim]


def draw(title: str, layout: Layout) -> Picture:
    """Arranges a leaf.

    Args:
        title: What to call it.
        layout: How it lies.

    Example:
        >>> from shardkit.places import Places
        >>> places = Places(("data", "fsdp"), [[0, 1], [2, 3]], 0)
        >>> found = draw("w", Layout(places, (5, 4), 4, (("fsdp",), ())))
        >>> found.words
        '2 pieces of 3×4 over fsdp, 2 copies over data, padded from 5 to 6'
        >>> [[cell.ids for cell in row] for row in found.panels[0].rows]
        [[(0, 2)], [(1, 3)]]
    """
    holders: dict[Box, list[int]] = {}
    for id in layout.places.ids.ravel().tolist():
        holders.setdefault(layout.box(id), []).append(id)
    empty = [box for box in holders if any(a == b for a, b in box)]
    # Of an empty leaf all pieces are.
    empty = empty if len(empty) < len(holders) else []
    padding_ids = sorted(id for box in empty for id in holders.pop(box))
    boxes = sorted(holders)
    cells = {box: Cell(n, tuple(holders[box])) for n, box in enumerate(boxes)}
    row, column = _shown(layout)
    others = [
        d for d, n in enumerate(layout.counts) if n > 1 and d not in (row, column)
    ]
    ranges = [_ranges(boxes, dim) for dim in range(len(layout.shape))]
    panels = []
    for chosen in itertools.product(*(ranges[d] for d in others)):
        fixed = dict(zip(others, chosen, strict=True))
        title_words = ", ".join(f"dim {d}: {a} to {b}" for d, (a, b) in fixed.items())
        grid = []
        for r in [(0, 1)] if row is None else ranges[row]:
            line = []
            for c in [(0, 1)] if column is None else ranges[column]:
                at = {**fixed, row: r, column: c}
                box = tuple(at.get(d, each[0]) for d, each in enumerate(ranges))
                line.append(cells[box])
            grid.append(tuple(line))
        panels.append(Panel(title_words, tuple(grid)))
    return Picture(
        title=title,
        layout=layout,
        words=_words(layout),
        dims=(row, column),
        rows=() if row is None else tuple(ranges[row]),
        columns=() if column is None else tuple(ranges[column]),
        panels=tuple(panels),
        padding_ids=tuple(padding_ids),
    )


def colour(number: int) -> str:
    """Returns the colour of a piece, under which black words are legible.

    >>> colour(0), colour(1)
    ('#e98b8b', '#8ba7e9')
    """
    hue = number * (1 - _GOLDEN) % 1
    light = 0.73 if number // 8 % 2 == 0 else 0.83
    red, green, blue = colorsys.hls_to_rgb(hue, light, 0.68)
    return "#" + "".join(f"{round(255 * x):02x}" for x in (red, green, blue))


def spell_ids(ids: Sequence[int]) -> str:
    """Writes ids of devices, with ranges of them.

    >>> spell_ids([0, 1, 2, 3, 6, 8, 9])
    '0-3 6 8 9'
    """
    runs: list[list[int]] = []
    for id in sorted(ids):
        if runs and runs[-1][-1] == id - 1:
            runs[-1].append(id)
        else:
            runs.append([id])
    words = [
        f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run))
        for run in runs
    ]
    return " ".join(words)


def _shown(layout: Layout) -> tuple[int | None, int | None]:
    """Chooses rows and columns: first what is cut, then what is long."""
    cut = [d for d, n in enumerate(layout.counts) if n > 1]
    whole = [d for d, n in enumerate(layout.counts) if n <= 1]
    whole.sort(key=lambda d: -layout.shape[d])
    chosen = sorted([*cut, *whole][:2])
    if len(chosen) == 2:
        return chosen[0], chosen[1]
    return None, (chosen[0] if chosen else None)


def _ranges(boxes: Sequence[Box], dim: int) -> list[tuple[int, int]]:
    return sorted({box[dim] for box in boxes})


def _words(layout: Layout) -> str:
    sizes = layout.places.axis_sizes
    pieces = 1
    for count in layout.counts:
        pieces *= count
    cutting = [a for cut in layout.cuts for a in cut if sizes[a] > 1]
    copies = [a for a, n in sizes.items() if n > 1 and a not in cutting]
    num = layout.places.ids.size // pieces
    over = " and ".join(copies)
    if pieces == 1:
        return f"whole on {'every device' if num > 1 else 'the device'}"
    shape = "×".join(map(str, layout.piece_shape))
    words = [f"{pieces} pieces of {shape} over {' and '.join(cutting)}"]
    words += [f"{num} copies over {over}"] if num > 1 else []
    full = [p * c for p, c in zip(layout.piece_shape, layout.counts, strict=True)]
    words += [
        f"padded from {size} to {padded}"
        for size, padded in zip(layout.shape, full, strict=True)
        if padded > size
    ]
    return ", ".join(words)
