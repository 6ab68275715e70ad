"""The pieces that pages are made of: sections, numbers beside one another, tables.

Owns their markup. It knows nothing of runs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from shardkit.report.markup import Markup, tag

__all__ = ["card", "facts_card", "table"]


def card(
    title: str, *inner: Markup | None, note: str = "", wide: bool = True
) -> Markup:
    """Makes a section with a heading."""
    heading = tag("h2", title, tag("span", f" {note}") if note else None)
    return tag("section", heading, *inner, class_="card wide" if wide else "card")


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], classes: Sequence[str]
) -> Markup:
    """Makes a table that scrolls.

    Args:
        header: What each column is called.
        rows: Their cells.
        classes: Of the cells of each column.
    """
    columns = list(zip(header, classes, strict=True))
    kept = {kind: kind for kind in ("right", "when")}
    head = tag(
        "tr", *(tag("th", name, class_=kept.get(kind)) for name, kind in columns)
    )
    lines = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=kind or None)
                for cell, kind in zip(row, classes, strict=True)
            ),
        )
        for row in rows
    ]
    inner = tag("table", tag("thead", head), tag("tbody", *lines))
    return tag("div", inner, class_="scroll")


def facts_card(facts: Iterable[tuple[str, str, str]]) -> Markup:
    """Shows names, values and remarks beside one another."""
    cells = [
        tag("div", tag("small", name), tag("b", value), tag("small", more))
        for name, value, more in facts
    ]
    return tag("section", *cells, id="facts", class_="card wide", aria_label="Numbers")
