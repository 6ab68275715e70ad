"""The report of a run as one HTML file.

Owns the order of the page and what holds it together: style and script in the file
itself, a policy that lets nothing else in, no word of a run that could be markup. Its
invariant: all but the hovering and the pictures of leaves is there without a script.
What is on it is `page_data.py`'s business.
"""

import base64
import datetime
import hashlib
from pathlib import Path
from typing import Any

from shardkit.report.cards import card, facts_card, table
from shardkit.report.jsonl import write_atomically
from shardkit.report.markup import Markup, data_block, tag
from shardkit.report.page_curves import curve_cards, curve_data
from shardkit.report.page_data import PageData, page_data
from shardkit.report.page_events import Mark
from shardkit.report.page_layout import layout_card, layout_data
from shardkit.report.page_timelines import timelines_card
from shardkit.report.stored_run import StoredRun

__all__ = ["document", "render_page", "write_report"]

MAX_ROWS = 300
"""How many rows of a table are written at most."""


def write_report(path: Path, out: Path | None = None) -> Path:
    """Writes the report of a run from what is in its directory, and says where.

    Args:
        path: The directory of the run.
        out: Where to; `report.html` in that directory by default.

    Raises:
        ConfigError: If it is no directory of a run, or files of it are damaged.
    """
    out = out or path / "report.html"
    write_atomically(out, render_page(page_data(StoredRun.read(path))))
    return out


def render_page(data: PageData) -> str:
    """Writes the page."""
    kind = "good" if data.is_finished else "warn"
    main = tag(
        "main",
        tag(
            "header",
            tag("h1", data.title),
            tag("span", data.state, class_=f"badge {kind}"),
        ),
        facts_card(data.facts),
        *curve_cards(data),
        timelines_card(data.timelines),
        layout_card(data),
        _certificates_card(data),
        _events_card(data.marks),
        _details_card(data),
    )
    values = {**curve_data(data), **layout_data(data)}
    return document(f"{data.title}: {data.state}", main, values)


def document(title: str, main: Markup, values: dict[str, Any]) -> str:
    """Makes a whole file of what is in it.

    Args:
        title: Of the window.
        main: What is shown.
        values: What the script reads, as JSON values.
    """
    style, script = (_read(name) for name in ("page.css", "page.js"))
    policy = _policy(style, script)
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        tag("title", title),
        '<link rel="icon" href="data:,">',
        f"<style>{style}</style>",
    ]
    body = [main, data_block("data", values), f"<script>{script}</script>"]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>"]
    return "\n".join([*lines, "<body>", *body, "</body>", "</html>"]) + "\n"


def _certificates_card(data: PageData) -> Markup:
    kinds = {True: "good", False: "bad", None: "muted"}
    rows = [
        tag("li", words, class_=kinds[is_proven])
        for is_proven, words in data.certificates[-MAX_ROWS:]
    ]
    inner = tag("ul", *rows) if rows else tag("p", "nothing to prove", class_="muted")
    return card("Certificates", tag("div", inner, class_="scroll"))


def _events_card(marks: list[Mark]) -> Markup:
    # Changes and recoveries are rare, and what is said is; saves may be very many.
    kept = marks
    for kind in ("checkpoint", "notice", "change"):
        if len(kept) > MAX_ROWS:
            of_kind = [mark for mark in kept if mark.kind == kind]
            least = max(0, len(kept) - MAX_ROWS)
            dropped = {id(mark) for mark in of_kind[:least]}
            kept = [mark for mark in kept if id(mark) not in dropped]
    note = "" if len(kept) == len(marks) else f"({len(kept)} of {len(marks)})"
    rows = [(mark.step, mark.kind, mark.text, _moment(mark.unix_s)) for mark in kept]
    classes = ["right", "name", "text", "when"]
    header = ["before step", "what", "", "when (UTC)"]
    inner = table(header, rows, classes) if rows else tag("p", "none", class_="muted")
    return card("Events", inner, note=note)


def _moment(unix_s: float | None) -> str:
    if unix_s is None:
        return ""
    try:
        found = datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return ""
    return f"{found:%Y-%m-%d %H:%M:%S}"


def _details_card(data: PageData) -> Markup:
    rows = []
    for name, value in data.details:
        rows += [tag("dt", name), tag("dd", value)]
    config = tag(
        "details", tag("summary", "the resolved config"), tag("pre", data.config)
    )
    return card("What was run", tag("dl", *rows), tag("p"), config)


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Allows the file its own style and script, by their hashes, and nothing else."""

    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
