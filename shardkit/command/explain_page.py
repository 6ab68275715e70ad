"""An explanation as one HTML file.

Owns the order of the page. Its style and its policy are those of reports, and like them
it needs nothing from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

from shardkit.command.explain_job import Job
from shardkit.command.explain_pictures import Alike
from shardkit.command.explain_rows import argument_rows, facts, held_rows, padded_rows
from shardkit.command.output import clean
from shardkit.explain.exchanges import Exchanged
from shardkit.explain.forbid import Rule
from shardkit.explain.picture_svg import svg_picture
from shardkit.explain.tables import (
    exchange_rows,
    memory_facts,
    resharding_rows,
    spell_names,
    temporary_rows,
)
from shardkit.report.cards import card, table
from shardkit.report.jsonl import write_atomically
from shardkit.report.markup import Markup, tag
from shardkit.report.page import document
from shardkit.report.terminal import format_bytes

__all__ = ["render_page", "write_page"]

Broken = Sequence[tuple[Rule, list[Exchanged]]]


def write_page(
    path: Path, title: str, job: Job, groups: Sequence[Alike], broken: Broken
) -> None:
    """Writes the page.

    Args:
        path: Where to.
        title: The config.
        job: What was found.
        groups: The leaves to draw.
        broken: The rules that are broken.
    """
    write_atomically(path, render_page(title, job, groups, broken))


def render_page(title: str, job: Job, groups: Sequence[Alike], broken: Broken) -> str:
    """Makes the page."""
    num = len(job.program.reshardings)
    state = _counted(num, "resharding") if num else "no resharding"
    kind = "warn" if num else "good"
    if broken:
        state, kind = _counted(len(broken), "rule") + " broken", "bad"
    heading = f"{title} on {job.num_devices} devices"
    main = tag(
        "main",
        tag(
            "header",
            tag("h1", heading),
            tag("span", state, class_=f"badge {kind}"),
        ),
        card("A step", _facts(job)),
        *([_broken_card(broken)] if broken else []),
        _exchanges_card(job),
        *([_reshardings_card(job)] if num else []),
        _held_card(job),
        _memory_card(job),
        *([_padding_card(job)] if padded_rows(job.leaves) else []),
        _pictures_card(groups),
    )
    return document(heading, main, {})


def _counted(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _facts(job: Job) -> Markup:
    pairs = [(tag("dt", name), tag("dd", value)) for name, value in facts(job).items()]
    notes = [(tag("dt", "note"), tag("dd", note)) for note in job.notes]
    return tag("dl", *(each for pair in [*pairs, *notes] for each in pair))


def _broken_card(broken: Broken) -> Markup:
    rows = [
        (
            rule.text,
            row.kind,
            row.axis,
            format_bytes(row.num_bytes),
            row.words,
            clean(row.source),
        )
        for rule, offending in broken
        for row in exchange_rows(offending)
    ]
    header = ["rule", "collective", "axis", "bytes", "for", "source"]
    classes = ["name", "name", "name", "right", "text", "text"]
    return card("Forbidden", table(header, rows, classes))


def _exchanges_card(job: Job) -> Markup:
    rows = [
        (
            row.kind,
            row.axis,
            row.count or "",
            format_bytes(row.num_bytes),
            row.words,
            clean(row.source),
            _folded(row.names),
        )
        for row in exchange_rows(job.program.exchanged)
    ]
    header = ["collective", "axis", "count", "bytes", "for", "source", "of what"]
    classes = ["name", "name", "right", "right", "name", "name", "name"]
    inner = table(header, rows, classes) if rows else tag("p", "nothing")
    words = "+ travels with another in one collective"
    is_joined = any(not row.count for row in exchange_rows(job.program.exchanged))
    more = tag("p", words, class_="caption") if is_joined else None
    return card("What devices exchange", inner, more, note="in a step, on a device")


def _folded(names: Sequence[str]) -> Markup | str:
    if len(names) < 3:
        return ", ".join(names)
    items = (tag("li", name) for name in names)
    return tag("details", tag("summary", f"{len(names)} leaves"), tag("ul", *items))


def _reshardings_card(job: Job) -> Markup:
    rows = [
        (row.size, clean(row.like.what), clean(row.like.remedy))
        for row in resharding_rows(job.program.reshardings)
    ]
    header = ["collective", "what", "what would remove it"]
    classes = ["name", "text", "text"]
    return card("Resharding that nobody asked for", table(header, rows, classes))


def _held_card(job: Job) -> Markup:
    rows = [
        (
            row.reason,
            row.num_copies,
            format_bytes(row.num_bytes),
            format_bytes(row.extra_bytes),
            _folded([leaf.path for leaf in row.leaves]),
        )
        for row in held_rows(job.leaves)
    ]
    header = ["why", "copies", "of a device", "of it redundant", "leaves"]
    classes = ["text", "right", "right", "right", "text"]
    inner = table(header, rows, classes) if rows else tag("p", "nothing")
    return card("What is held several times", inner)


def _memory_card(job: Job) -> Markup:
    memory = job.program.memory
    arguments = [
        (row.name, row.count, format_bytes(row.num_bytes), row.largest.name)
        for row in argument_rows(memory.arguments)
    ]
    temporaries = [
        (
            row.like.shape,
            row.count,
            format_bytes(row.num_bytes),
            row.like.operation,
            clean(row.like.source),
        )
        for row in temporary_rows(memory)
    ]
    told = ", ".join(f"{n} {format_bytes(size)}" for n, size in memory_facts(memory))
    words = (
        "temporaries, side by side where XLA has put them"
        if memory.is_assigned
        else "the largest results in the program's text, which can share memory"
    )
    return card(
        "What memory is for",
        table(
            ["arguments", "arrays", "of a device", "the largest"],
            arguments,
            ["text", "right", "right", "text"],
        ),
        tag("p", words, class_="caption"),
        table(
            ["array", "how many", "of a device", "made by", "source"],
            temporaries,
            ["text", "right", "right", "text", "text"],
        ),
        note=f"XLA tells: {told}" if told else "",
    )


def _padding_card(job: Job) -> Markup:
    rows = [
        (
            _folded([leaf.path for leaf in row.leaves]),
            *row.shapes,
            format_bytes(row.lost_bytes),
            f"{row.part:.1%}",
        )
        for row in padded_rows(job.leaves)
    ]
    header = ["leaves", "shape", "lies as", "on all devices", "part of each"]
    classes = ["text", "text", "text", "right", "right"]
    return card("Padding", table(header, rows, classes))


def _pictures_card(groups: Sequence[Alike]) -> Markup:
    inner = []
    for alike in groups:
        inner.append(svg_picture(alike.picture))
        if len(alike.leaves) > 1:
            inner.append(_folded_alike([leaf.path for leaf in alike.leaves]))
    return card("Which device holds what", *inner, note="leaves of one shape together")


def _folded_alike(paths: Sequence[str]) -> Markup:
    items = (tag("li", path) for path in paths)
    summary = tag("summary", f"{spell_names(paths, 1)} lie like this")
    return tag("details", summary, tag("ul", *items))
