"""The curves of a report: loss over devices and events, and the speed of steps.

Owns what is drawn where, and the words for it. What the numbers are is
`page_data.py`'s business, how they become places that of `charts.py`.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from shardkit.report.cards import card
from shardkit.report.charts import Scale, curve, grid, percent, plot, staircase
from shardkit.report.markup import Markup, tag
from shardkit.report.page_data import PageData
from shardkit.report.page_events import Mark
from shardkit.report.thin import Point

__all__ = ["curve_cards", "curve_data"]

MAX_GLYPHS = 200
"""How many marks of a kind are drawn at most; a table has more of them."""

_ROW_PX = 15
_KINDS = {"change": "change", "recovery": "recovery", "checkpoint": "save"}
_KINDS |= {"start": "start", "notice": "notice"}
# Shapes of their own, so that they are told apart without colours, too.
_GLYPHS = {
    "change": "M0 -6L6 0L0 6L-6 0Z",
    "recovery": "M-6 -3L-3 -6L0 -3L3 -6L6 -3L3 0L6 3L3 6L0 3L-3 6L-6 3L-3 0Z",
    "checkpoint": "M-4.5 4.5L0 -5L4.5 4.5Z",
    "start": "M-4 -5.5L6 0L-4 5.5Z",
    "notice": "M-4 -4H4V4H-4Z",
}


def curve_cards(data: PageData) -> Iterator[Markup]:
    """Draws the cards."""
    if not data.losses:
        yield card("Loss", tag("p", "no step yet", class_="muted"), wide=True)
        return
    x = _steps_scale(data)
    loss = _loss_chart(data, x), _loss_legend(data)
    yield card("Loss", *loss, note="over steps", wide=True)
    times = _speed_chart(data.step_ms, x, "time", "ms")
    yield card("Time of a step", times, note="in ms, over steps", wide=False)
    rates = _speed_chart(data.rates, x, "rate", f"{data.rate_unit} per second")
    title, note = data.rate_unit.capitalize(), "per second, over steps"
    yield card(title, rates, note=note, wide=False)


def curve_data(data: PageData) -> dict[str, Any]:
    """Returns what a script needs to say what is under the pointer."""
    scale = _steps_scale(data)
    curves = [
        ("loss", "loss", data.losses),
        ("loss", "validation loss", data.evals),
        ("time", "ms", data.step_ms),
        ("rate", f"{data.rate_unit}/s", data.rates),
    ]
    return {
        "low": scale.low,
        "high": scale.high,
        "counts": data.num_devices,
        "curves": [
            {
                "chart": chart,
                "name": name,
                "points": [[x, _digits(y)] for x, y in points],
            }
            for chart, name, points in curves
        ],
    }


def _digits(value: float | None) -> float | None:
    # More would not be shown, and take room.
    return None if value is None else float(f"{value:.7g}")


def _steps_scale(data: PageData) -> Scale:
    return Scale(data.steps[0] - 0.5, data.steps[1] + 0.5)


def _known(*series: Sequence[Point]) -> list[float]:
    return [y for points in series for _, y in points if y is not None]


def _loss_chart(data: PageData, x: Scale) -> Markup:
    y = Scale.around(_known(data.losses, data.evals))
    cuts = [m for m in data.marks if m.kind in ("change", "recovery")]
    thin = " thin" if data.means else ""
    loss = plot(
        260,
        grid(x, y, num_x=10, num_y=5, words_x=False),
        *(_cut(mark, x) for mark in _some(cuts)),
        curve(data.losses, x, y, f"line loss{thin}"),
        curve(data.means, x, y, "line mean") if data.means else None,
        *(_dot(step, value, x, y) for step, value in data.evals),
        label="Loss over steps",
    )
    counts = [(step - 0.5, float(num)) for step, num in data.num_devices]
    most = max(num for _, num in counts)
    over = Scale(0, most * 1.15)
    devices = plot(
        70,
        grid(x, Scale(0, most * 1.15), num_x=10, num_y=2, words_x=True),
        *(_cut(mark, x) for mark in _some(cuts)),
        staircase(counts, x.high, x, over, "count-line"),
        *_count_words(counts, x, over),
        label="Devices over steps",
    )
    return tag(
        "div",
        loss,
        tag("div", "events", class_="caption"),
        _strip(data.marks, x),
        tag("div", "devices", class_="caption"),
        devices,
        id="loss",
        class_="chart",
    )


def _some(marks: Sequence[Mark]) -> Sequence[Mark]:
    """Takes so many that they can be drawn, spread evenly."""
    every = -(-len(marks) // MAX_GLYPHS)
    return marks[::every] if every > 1 else marks


def _cut(mark: Mark, x: Scale) -> Markup | None:
    share = x.share(mark.step - 0.5)
    if not 0 <= share <= 1:
        return None
    at = percent(share)
    return tag("line", class_=f"cut {mark.kind}", x1=at, x2=at, y1="0", y2="100%")


def _dot(step: float, value: float | None, x: Scale, y: Scale) -> Markup | None:
    if value is None:
        return None
    place = {"cx": percent(x.share(step - 0.5)), "cy": percent(1 - y.share(value))}
    words = tag("title", f"validation loss {value:.6g} before step {step}")
    return tag("circle", words, class_="eval", r="4.5", **place)


def _strip(marks: Sequence[Mark], x: Scale) -> Markup:
    """Draws a row of marks for each kind that there is."""
    kinds = [kind for kind in _KINDS if any(mark.kind == kind for mark in marks)]
    parts = []
    for row, kind in enumerate(kinds):
        middle = row * _ROW_PX + _ROW_PX / 2
        words = {"x": "-8", "y": f"{middle:g}", "dy": "4", "text_anchor": "end"}
        parts.append(tag("text", _KINDS[kind], **words))
        line = {"x1": "0", "x2": "100%", "y1": f"{middle:g}", "y2": f"{middle:g}"}
        parts.append(tag("line", class_="grid", **line))
        for mark in _some([mark for mark in marks if mark.kind == kind]):
            share = min(1.0, max(0.0, x.share(mark.step - 0.5)))
            shape = tag(
                "path",
                tag("title", f"step {mark.step}: {mark.text}"),
                class_=f"glyph {kind}",
                d=_GLYPHS[kind],
            )
            place = {"x": percent(share), "y": f"{middle:g}"}
            parts.append(tag("svg", shape, class_="loose", **place))
    height = max(1, len(kinds)) * _ROW_PX
    return plot(height, *parts, label="Events over steps")


def _count_words(
    counts: Sequence[tuple[float, float]], x: Scale, y: Scale
) -> Iterator[Markup]:
    ends = [*(start for start, _ in counts[1:]), x.high]
    for (start, num), end in zip(counts, ends, strict=True):
        # A short stretch has no room for a number.
        if x.share(end) - x.share(start) < 0.035:
            continue
        is_low = y.share(num) < 0.45
        yield tag(
            "text",
            f"{num:g}",
            class_="count",
            x=percent((x.share(start) + x.share(end)) / 2),
            y=percent(1 - y.share(num)),
            dy="-5" if is_low else "16",
            text_anchor="middle",
        )


def _loss_legend(data: PageData) -> Markup:
    parts = [_key("stroke thin-loss", "loss of each step")]
    if data.means:
        parts.append(_key("stroke mean-loss", "averaged"))
    if data.evals:
        parts.append(_key("dot", "validation"))
    if any(mark.kind == "change" for mark in data.marks):
        parts.append(_key("stroke dashed", "the device count changed"))
    lost = sum(y is None for _, y in data.losses)
    if lost:
        parts.append(tag("span", f"some losses are not finite: {lost}", class_="bad"))
    return tag("div", *parts, class_="legend")


def _key(kind: str, words: str) -> Markup:
    return tag("span", tag("i", class_=kind), words)


def _speed_chart(points: Sequence[Point], x: Scale, name: str, unit: str) -> Markup:
    known = _known(points)
    if not known:
        return tag("p", "no step was timed", class_="muted")
    # One slow step would press all others flat; it is named instead.
    usual = statistics.quantiles(known, n=50)[-1] if len(known) > 1 else known[0]
    top = min(max(known), 1.5 * usual)
    y = Scale(0, 1.08 * top)
    above = [(step, value) for step, value in points if (value or 0) > y.high]
    words = None
    if above:
        step, value = max(above, key=lambda point: point[1] or 0)
        what = "1 step is" if len(above) == 1 else f"{len(above)} steps are"
        text = f"{what} above, at most {value:,.4g} {unit} (step {step})"
        words = tag("div", text, class_="muted caption")
    lines = plot(
        170,
        grid(x, y, num_x=6, num_y=4, words_x=True),
        curve(points, x, y, f"line {name}"),
        label=f"{unit} over steps",
    )
    chart = tag("div", lines, id=name, class_="chart")
    return tag("div", chart, words)
