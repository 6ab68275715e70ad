"""Curves, steps and marks as SVG that keeps its words legible at any width.

Owns how numbers become places. Its invariant: a plot is drawn once, in shares of its
box, and needs no script: lines are stretched with the box, words and marks are not. It
knows nothing of runs.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from shardkit.report.markup import Markup, tag
from shardkit.report.thin import Point

__all__ = ["Scale", "curve", "grid", "percent", "plot", "short", "staircase", "ticks"]

_UNITS_X, _UNITS_Y = 10_000, 1_000
_NUM_NARROW = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """A range of numbers along a side of a plot.

    Attributes:
        low: At its beginning.
        high: At its end.
    """

    low: float
    high: float

    @classmethod
    def around(cls, values: Iterable[float], *, room: float = 0.06) -> "Scale":
        """Makes one for values, with room on both sides.

        >>> Scale.around([0.0, 10.0], room=0.1)
        Scale(low=-1.0, high=11.0)
        """
        known = [value for value in values if math.isfinite(value)]
        low, high = min(known, default=0.0), max(known, default=1.0)
        margin = ((high - low) or abs(high) or 1.0) * room
        return cls(low - margin, high + margin)

    def share(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)


def percent(share: float) -> str:
    """Writes a share of a side.

    >>> percent(0.25)
    '25%'
    """
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def ticks(scale: Scale, count: int) -> list[float]:
    """Chooses about `count` round numbers of a range.

    >>> ticks(Scale(0, 10), 5)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    raw = (scale.high - scale.low) / count
    if not (math.isfinite(raw) and raw > 0):
        return [scale.low]
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(k * power for k in (1, 2, 5, 10) if k * power >= 0.7 * raw)
    first, last = math.ceil(scale.low / unit), math.floor(scale.high / unit + 1e-6)
    return [float(f"{k * unit:.10g}") for k in range(first, last + 1)]


def short(value: float) -> str:
    """Writes a number for an axis.

    >>> [short(x) for x in (0.25, 1500, 24_000, 3_500_000)]
    ['0.25', '1,500', '24k', '3.5M']
    """
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= (10_000 if power == 3 else 10**power):
            return f"{value / 10**power:.4g}{unit}"
    return f"{value:,.6g}"


def plot(height: int, *inner: Markup | None, label: str) -> Markup:
    """Makes the box of a plot, as wide as there is room and `height` pixels high."""
    size = {"width": "100%", "height": str(height)}
    return tag("svg", *inner, class_="plot", role="img", aria_label=label, **size)


def grid(x: Scale, y: Scale, *, num_x: int, num_y: int, words_x: bool) -> Markup:
    """Draws lines and words of both axes.

    Args:
        x: The steps.
        y: The values.
        num_x: About how many steps are named.
        num_y: About how many values are.
        words_x: Whether steps are named, or another plot below does.
    """
    parts = []
    for value in ticks(y, num_y):
        at = percent(1 - y.share(value))
        parts.append(tag("line", class_="grid", x1="0", x2="100%", y1=at, y2=at))
        words = {"x": "-8", "y": at, "dy": "4", "text_anchor": "end"}
        parts.append(tag("text", short(value), **words))
    for number, step in enumerate(s for s in ticks(x, num_x) if s.is_integer()):
        at = percent(x.share(step))
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1="0", y2="100%"))
        if words_x:
            words = {"x": at, "y": "100%", "dy": "18", "text_anchor": "middle"}
            # Every other one goes where there is no room for all.
            kind = "odd" if number % 2 and num_x > _NUM_NARROW else None
            parts.append(tag("text", f"{step:,.0f}", class_=kind, **words))
    return Markup("".join(parts))


def curve(points: Sequence[Point], x: Scale, y: Scale, class_: str) -> Markup:
    """Draws a line through points, with a gap where a value is not known."""
    words, goes_on = [], False
    for at, value in points:
        if value is None or not math.isfinite(value):
            goes_on = False
            continue
        left, top = _place(at, value, x, y)
        words.append(f"{'L' if goes_on else 'M'}{left} {top}{'' if goes_on else 'h0'}")
        goes_on = True
    return _stretched(tag("path", class_=class_, d="".join(words)))


def staircase(
    counts: Sequence[tuple[float, float]], end: float, x: Scale, y: Scale, class_: str
) -> Markup:
    """Draws values that stay until the next one, and the area under them.

    Args:
        counts: Where each begins, and how much.
        end: Where the last one ends.
        x: Of where.
        y: Of how much.
        class_: Of the line; the area is of the class `area`.
    """
    words, foot = [], _place(0, 0, x, y)[1]
    ends = [*(at for at, _ in counts[1:]), end]
    for (start, value), stop in zip(counts, ends, strict=True):
        left, top = _place(start, value, x, y)
        words.append(f"{'L' if words else 'M'}{left} {top}H{_place(stop, 0, x, y)[0]}")
    if not words:
        return Markup("")
    line, first = "".join(words), _place(counts[0][0], 0, x, y)[0]
    area = tag("path", class_="area", d=f"{line}V{foot}H{first}Z")
    return _stretched(area, tag("path", class_=class_, d=line))


def _place(at: float, value: float, x: Scale, y: Scale) -> tuple[int, int]:
    # Far outside is outside; browsers take no number of any size.
    top = min(max(1 - y.share(value), -1.0), 2.0)
    return round(_UNITS_X * x.share(at)), round(_UNITS_Y * top)


def _stretched(*inner: Markup) -> Markup:
    return tag(
        "svg",
        *inner,
        class_="stretched",
        viewBox=f"0 0 {_UNITS_X} {_UNITS_Y}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
    )
