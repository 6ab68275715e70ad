"""Pictures of leaves as SVG.

Owns places and colours. Invariant: what is drawn needs no script and nothing from
elsewhere, and no name of a leaf can become markup.
"""

import math
from collections.abc import Sequence

from shardkit.explain.picture import Picture, colour, spell_ids
from shardkit.report.markup import Markup, tag

__all__ = ["STYLE", "svg_file", "svg_picture"]

STYLE = (
    ".leaf text{fill:#1f2933;font:12px system-ui,'DejaVu Sans',sans-serif}"
    ".leaf text.muted{fill:#5f6b78}.leaf text.name{font-weight:600;font-size:14px}"
    ".leaf text.held{fill:#111}.leaf .pad{stroke:#8a94a0;fill:none}"
    ".leaf .edge{stroke:#fff;stroke-width:1.5}"
)
"""How it looks where it stands alone; `page.css` has it for pages."""

_WIDTH, _LEFT, _TOP = 900, 74, 62
_SIDE, _HIGH, _LEAST = 340, 200, 92
_TILE = 34
_MOST_PANELS, _MOST_TILES, _MOST_ACROSS = 16, 256, 8


def svg_file(pictures: Sequence[Picture]) -> str:
    """Draws leaves under one another, as a file of its own."""
    drawn = [_drawn(picture) for picture in pictures]
    height, inner = 12.0, []
    for each, size in drawn:
        inner.append(tag("g", each, transform=f"translate(16 {height:.0f})"))
        height += size + 18
    svg = tag(
        "svg",
        Markup(f"<style>{STYLE}</style>"),
        tag("rect", width=_WIDTH + 32, height=f"{height:.0f}", fill="#fff"),
        *inner,
        xmlns="http://www.w3.org/2000/svg",
        class_="leaf",
        width=_WIDTH + 32,
        height=f"{height:.0f}",
        viewBox=f"0 0 {_WIDTH + 32} {height:.0f}",
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n'


def svg_picture(picture: Picture) -> Markup:
    """Draws one leaf, for a page."""
    drawn, height = _drawn(picture)
    return tag(
        "svg",
        drawn,
        class_="leaf",
        viewBox=f"0 0 {_WIDTH} {height:.0f}",
        role="img",
        aria_label=f"{picture.title}: {picture.words}",
    )


def _drawn(picture: Picture) -> tuple[Markup, float]:
    """Draws a leaf from the origin on; returns how high it is."""
    shape = "×".join(map(str, picture.layout.shape)) or "scalar"
    words = [
        _text(0, 14, picture.title, "name"),
        _text(0, 32, f"{shape}: {picture.words}"),
    ]
    width, height = _sides(picture)
    shown = picture.panels[:_MOST_PANELS]
    across = max(1, min(len(shown), int((_WIDTH - 150) // (width + _LEFT + 12))))
    below = float(_TOP + 18 * any(panel.title for panel in shown))
    parts = []
    for number, panel in enumerate(shown):
        at = number % across
        if at == 0 and number:
            below += height + 58
        left = _LEFT + at * (width + _LEFT + 12)
        if panel.title:
            parts.append(_text(left, below - 20, panel.title, "muted"))
        parts += _panel(picture, number, left, below, width, height)
    bottom = below + height + 22
    if len(picture.panels) > len(shown):
        more = f"and {len(picture.panels) - len(shown)} more like these"
        parts.append(_text(_LEFT, bottom + 4, more, "muted"))
        bottom += 18
    left = _LEFT + across * (width + _LEFT + 12)
    tiles, low = _devices(picture, left)
    return tag("g", *words, *parts, *tiles), max(bottom, low)


def _sides(picture: Picture) -> tuple[float, float]:
    """Width and height of a panel, to scale as far as both can be seen."""
    row, column = picture.dims
    sizes = picture.layout.shape
    scale = 1.0 if len(picture.panels) == 1 else 0.55
    most, high = _SIDE * scale, _HIGH * scale
    full = [
        1 if dim is None else sizes[dim] + picture.padding(dim) for dim in (row, column)
    ]
    if row is None:
        return most, 44.0
    ratio = min(3.0, max(0.2, full[0] / (full[1] or 1)))
    width = min(most, high / ratio)
    # Names of devices need room.
    least = min(20.0 * len(picture.rows), 2.0 * _SIDE)
    least_wide = max(_LEAST, min(30.0 * len(picture.columns), 1.6 * most))
    return max(width, least_wide), max(width * ratio, least)


def _panel(
    picture: Picture, number: int, left: float, top: float, width: float, height: float
) -> list[Markup]:
    row, column = picture.dims
    ys = _edges(picture, row, picture.rows, height)
    xs = _edges(picture, column, picture.columns, width)
    parts = []
    for r, line in enumerate(picture.panels[number].rows):
        for c, cell in enumerate(line):
            x, y = left + xs[c], top + ys[r]
            w, h = xs[c + 1] - xs[c], ys[r + 1] - ys[r]
            parts.append(
                tag(
                    "rect",
                    tag("title", f"devices {spell_ids(cell.ids)}"),
                    class_="edge",
                    x=f"{x:.1f}",
                    y=f"{y:.1f}",
                    width=f"{w:.1f}",
                    height=f"{h:.1f}",
                    fill=colour(cell.number),
                )
            )
            parts += _names(spell_ids(cell.ids), x, y, w, h)
    parts += _hatched(left, top, xs[-1], ys[-1], width, height)
    parts += _marks(picture, column, picture.columns, xs, left, top - 6, across=True)
    parts += _marks(picture, row, picture.rows, ys, left - 8, top, across=False)
    return parts


def _edges(
    picture: Picture, dim: int | None, ranges: Sequence[tuple[int, int]], side: float
) -> list[float]:
    """Where the pieces begin and end along a side; padding is behind the last."""
    if dim is None:
        return [0.0, side]
    size = picture.layout.shape[dim]
    full = (size + picture.padding(dim)) or 1
    if size == 0:
        return [0.0, side]
    return [side * start / full for start, _ in ranges] + [side * ranges[-1][1] / full]


def _names(words: str, x: float, y: float, w: float, h: float) -> list[Markup]:
    """Writes who holds a piece, if there is room."""
    if h < 13 or w < 7 * len(words) + 4:
        words = f"{len(words.split())}…" if w >= 18 and h >= 13 else ""
    if not words:
        return []
    return [_text(x + w / 2, y + h / 2 + 4, words, "held", "middle")]


def _hatched(
    left: float, top: float, right: float, low: float, width: float, height: float
) -> list[Markup]:
    """Hatches what lies behind the last piece of each side."""
    found = []
    if height - low > 0.5:
        found.append(_hatch(left, top + low, width, height - low))
    if width - right > 0.5:
        found.append(_hatch(left + right, top, width - right, low))
    return found


def _hatch(x: float, y: float, width: float, height: float) -> Markup:
    lines = [f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"]
    for at in range(5, math.ceil(width + height), 5):
        x1, y1 = (x, y + at) if at < height else (x + at - height, y + height)
        x2, y2 = (x + at, y) if at < width else (x + width, y + at - width)
        lines.append(f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")
    return tag("path", tag("title", "padding"), class_="pad", d="".join(lines))


def _marks(
    picture: Picture,
    dim: int | None,
    ranges: Sequence[tuple[int, int]],
    edges: Sequence[float],
    x: float,
    y: float,
    *,
    across: bool,
) -> list[Markup]:
    """Writes where pieces begin, and where the last ends; fewer if they are many."""
    if dim is None:
        return []
    values = [start for start, _ in ranges] + [ranges[-1][1]]
    room = 7.0 * len(str(values[-1])) + 6 if across else 13.0
    found, last = [], -math.inf
    for value, edge in zip(values, edges, strict=True):
        is_end = value == values[-1]
        if edge - last >= room and (is_end or edges[-1] - edge >= room):
            last = edge
            place = (x + edge, y) if across else (x, y + edge + 4)
            anchor = "middle" if across else "end"
            found.append(_text(*place, str(value), "muted", anchor))
    name = f"dim {dim}"
    if across:
        found.append(_text(x + edges[-1] + 14, y, name, "muted"))
    else:
        found.append(_text(x, y + edges[-1] + 18, name, "muted", "end"))
    return found


def _devices(picture: Picture, left: float) -> tuple[list[Markup], float]:
    """Draws the mesh, every device in the colour of what it holds."""
    places = picture.layout.places
    used = [(a, n) for a, n in places.axis_sizes.items() if n > 1]
    ids = places.ids.ravel().tolist()
    if len(ids) > _MOST_TILES:
        return [_text(left, _TOP, f"{len(ids)} devices", "muted")], _TOP
    columns, inner, outer = _arranged(used)
    tile = min(_TILE, (_WIDTH - left) / columns)
    ways = [f"{outer} ↓"] if outer else []
    ways += [f"{inner} →"] if inner else []
    words = f"devices: {', '.join(ways)}" if ways else "device"
    parts = [_text(left, _TOP - 10, words, "muted")]
    numbers = picture.number_of
    for place, id in enumerate(ids):
        x, y = left + place % columns * tile, _TOP + place // columns * (_TILE - 6)
        size = {"width": f"{tile - 3:.1f}", "height": _TILE - 9}
        if id in numbers:
            fill = colour(numbers[id])
            parts.append(tag("rect", x=f"{x:.1f}", y=y, rx=4, fill=fill, **size))
        else:
            parts.append(_hatch(x, y, tile - 3, _TILE - 9))
        if tile >= 7 * len(str(id)) + 6:
            parts.append(_text(x + tile / 2 - 1.5, y + 17, str(id), "held", "middle"))
    low = _TOP + math.ceil(len(ids) / columns) * (_TILE - 6)
    if picture.padding_ids:
        parts.append(_text(left, low + 14, "hatched: padding only", "muted"))
        low += 18
    return parts, low


def _arranged(used: Sequence[tuple[str, int]]) -> tuple[int, str, str]:
    """Says how many devices stand in a row, and which axes go across and down."""
    columns, across = 1, 0
    for _, size in reversed(used):
        if across and columns * size > _MOST_ACROSS:
            break
        columns, across = columns * size, across + 1
    names = [axis for axis, _ in used]
    at = len(names) - across
    return columns, " × ".join(names[at:]), " × ".join(names[:at])


def _text(
    x: float, y: float, words: str, kind: str = "", anchor: str | None = None
) -> Markup:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
    return tag("text", words, class_=kind or None, text_anchor=anchor, **place)
