"""What changes and recoveries took, phase by phase, as a report shows it.

Owns those bars. As in the picture of `timeline.py`, all but compiling is drawn once
more where that takes most of the time.
"""

from shardkit.report.cards import card
from shardkit.report.markup import Markup, tag
from shardkit.report.page_events import Timeline
from shardkit.report.terminal import format_time
from shardkit.report.timeline import COLOURS

__all__ = ["timelines_card"]

_MAX_TIMELINES = 40
_PHASES = {*COLOURS, "detect", "end", "choose", "form"}


def timelines_card(timelines: list[Timeline]) -> Markup:
    """Makes the card."""
    shown = timelines[-_MAX_TIMELINES:]
    note = "" if len(shown) == len(timelines) else f"(the last of {len(timelines)})"
    if not shown:
        return card("Changes of devices", tag("p", "none", class_="muted"))
    has_compiled = any(_spent(t, "compile") > 0.3 * t.end_s for t in shown)
    short = [_without(t, "compile") for t in shown]
    longest_s = max(t.end_s for t in shown)
    longest_short_s = max(t.end_s for t in short)
    parts = []
    for timeline, rest in zip(shown, short, strict=True):
        bars = [_bar(timeline, longest_s)]
        if has_compiled:
            bars = [
                _bar_row("all of it", _bar(timeline, longest_s)),
                _bar_row("without compiling", _bar(rest, longest_short_s)),
            ]
        title = tag("b", timeline.title)
        note_kind = "bad" if timeline.is_bad else "muted"
        words = tag("p", title, " ", tag("span", timeline.note, class_=note_kind))
        parts.append(tag("div", words, *bars, _phase_legend(timeline)))
    inner = tag("div", *parts, id="timelines")
    return card("Changes of devices and recoveries, phase by phase", inner, note=note)


def _bar_row(name: str, bar: Markup) -> Markup:
    return tag("div", tag("span", name), bar, class_="bar-row")


def _spent(timeline: Timeline, name: str) -> float:
    return sum(end_s - start_s for n, start_s, end_s in timeline.phases if n == name)


def _without(timeline: Timeline, name: str) -> Timeline:
    """Takes phases out, and closes the gaps."""
    phases, skipped_s = [], 0.0
    for each, start_s, end_s in timeline.phases:
        if each == name:
            skipped_s += end_s - start_s
        else:
            phases.append((each, start_s - skipped_s, end_s - skipped_s))
    return Timeline(timeline.title, timeline.note, phases)


def _bar(timeline: Timeline, longest_s: float) -> Markup:
    pieces = []
    for name, start_s, end_s in timeline.phases:
        share = max(0.0, end_s - start_s) / (longest_s or 1.0)
        at = max(0.0, start_s) / (longest_s or 1.0)
        spent = format_time(1e3 * (end_s - start_s))
        words = tag("title", f"{_words(name)} {spent}")
        place = {"x": f"{100 * at:.3f}%", "width": f"{100 * share:.3f}%"}
        kind = {"class_": _phase_class(name), "height": "100%"}
        pieces.append(tag("rect", words, **place, **kind))
    return tag("svg", *pieces, class_="bar", width="100%", height="14")


def _phase_legend(timeline: Timeline) -> Markup:
    spent: dict[str, float] = {}
    for name, start_s, end_s in timeline.phases:
        spent[name] = spent.get(name, 0.0) + end_s - start_s
    parts = [
        tag(
            "span",
            tag("i", class_=_phase_class(name)),
            f"{_words(name)} ",
            tag("b", format_time(1e3 * spent_s)),
        )
        for name, spent_s in spent.items()
    ]
    return tag("div", *parts, class_="legend")


def _phase_class(name: str) -> str:
    return f"p-{name}" if name in _PHASES else "p-other"


def _words(name: str) -> str:
    return name.replace("_", " ")
