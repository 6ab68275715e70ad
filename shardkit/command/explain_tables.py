"""How an explanation is shown on a terminal.

Owns the words and the order. It computes nothing.
"""

from collections.abc import Sequence

from shardkit.command.explain_job import Job
from shardkit.command.explain_pictures import Alike
from shardkit.command.explain_rows import argument_rows, facts, held_rows, padded_rows
from shardkit.command.output import Output
from shardkit.explain.exchanges import Exchanged
from shardkit.explain.forbid import Rule
from shardkit.explain.picture_text import text_picture
from shardkit.explain.tables import (
    ExchangeRow,
    exchange_rows,
    memory_facts,
    resharding_rows,
    spell_names,
    temporary_rows,
)
from shardkit.report.terminal import format_bytes

__all__ = ["show", "show_broken"]

_MOST_ROWS, _MOST_NAMES = 12, 40


def show(title: str, job: Job, drawn: Sequence[Alike], output: Output) -> None:
    """Writes all of it.

    Args:
        title: The config.
        job: What was found.
        drawn: The leaves to draw.
        output: Where to.
    """
    output.line(f"{title} on {job.num_devices} devices", style="bold")
    output.facts(facts(job))
    for note in job.notes:
        output.remark(note)
    output.line()
    _show_exchanges(job, output)
    _show_reshardings(job, output)
    output.line()
    _show_held(job, output)
    output.line()
    _show_memory(job, output)
    _show_padding(job, output)
    for alike in drawn:
        output.line()
        console = output.console
        colours = console.is_terminal and not console.no_color
        for line in text_picture(alike.picture, console.width, is_coloured=colours):
            console.print(line, soft_wrap=True)


def show_broken(
    broken: Sequence[tuple[Rule, list[Exchanged]]], num_rules: int, output: Output
) -> None:
    """Names every collective that a rule forbids."""
    if num_rules:
        output.line()
    if num_rules and not broken:
        output.line(f"--forbid: none of {num_rules} rules is broken")
    for rule, offending in broken:
        output.line(f"--forbid {rule.text!r} is broken:", style="bold red")
        for row in exchange_rows(offending):
            place = f" at {row.source}" if row.source else ""
            size = format_bytes(row.num_bytes)
            output.line(f"  {row.kind} over {row.axis}, {size}{place}")
            names = f", of {spell_names(row.names, _MOST_NAMES)}" if row.names else ""
            output.prose(f"{row.words}{names}")


def _show_exchanges(job: Job, output: Output) -> None:
    rows = exchange_rows(job.program.exchanged)
    if not rows:
        output.line("Nothing is exchanged in a step.")
        return
    # Where there is little room, lists of names stand below.
    most = 0 if output.is_narrow else 2
    several = list(dict.fromkeys(row.names for row in rows if len(row.names) > most))
    output.table(
        ["collective", "axis", "count", "bytes", "for", "source", "of what"],
        [
            (
                row.kind,
                row.axis,
                f"{row.count}" if row.count else "",
                format_bytes(row.num_bytes),
                row.words,
                _place(row.source, output),
                _names(row, several),
            )
            for row in rows
        ],
        right=[2, 3],
    )
    if any(not row.count for row in rows):
        output.prose("+ travels with another in one collective")
    for number, names in enumerate(several, start=1):
        output.prose(f"[{number}] {spell_names(names, _MOST_NAMES)}")


def _place(source: str, output: Output) -> str:
    """Names a line, where there is little room without its directory."""
    return source.rpartition("/")[2] if output.is_narrow else source


def _names(row: ExchangeRow, several: list[tuple[str, ...]]) -> str:
    if row.names not in several:
        return ", ".join(row.names)
    num = len(row.names)
    what = "leaf" if num == 1 else "leaves"
    return f"{num} {what} [{several.index(row.names) + 1}]"


def _show_reshardings(job: Job, output: Output) -> None:
    for row in resharding_rows(job.program.reshardings):
        output.line()
        remedy = row.like.remedy
        output.line(f"Resharding, {row.size}: {row.like.what}", style="bold yellow")
        output.remark(remedy)


def _show_held(job: Job, output: Output) -> None:
    rows = held_rows(job.leaves)
    if not rows:
        output.line("No device holds what another one holds.")
        return
    output.table(
        ["held several times", "leaves", "copies", "of a device", "redundant", ""],
        [
            (
                row.reason,
                f"{len(row.leaves)}",
                f"{row.num_copies}",
                format_bytes(row.num_bytes),
                format_bytes(row.extra_bytes),
                spell_names([x.path for x in row.leaves], 1),
            )
            for row in rows[:_MOST_ROWS]
        ],
        right=[1, 2, 3, 4],
    )


def _show_memory(job: Job, output: Output) -> None:
    memory = job.program.memory
    rows = [
        (row.name, f"{row.count}", format_bytes(row.num_bytes), row.largest.name)
        for row in argument_rows(memory.arguments)
    ]
    header = ["arguments", "arrays", "of a device", "the largest"]
    output.table(header, rows, right=[1, 2])
    output.line()
    output.table(
        ["temporaries", "", "of a device", "made by", "source", "shared with"],
        [
            (
                row.like.shape,
                f"{row.count} ×" if row.count > 1 else "",
                format_bytes(row.num_bytes),
                row.like.operation,
                _place(row.like.source, output),
                _sharing(row.like.num_sharing),
            )
            for row in temporary_rows(memory)[:_MOST_ROWS]
        ],
        right=[1, 2],
    )
    told = ", ".join(f"{n} {format_bytes(size)}" for n, size in memory_facts(memory))
    if told:
        output.prose(f"XLA tells: {told}.")
    if memory.is_assigned:
        words = (
            "These temporaries lie side by side, where XLA has put them. Others use "
        )
        words += "the same memory before or after."
    else:
        words = "XLA does not tell where temporaries lie here: these are the largest "
        words += "results in the program's text, of which several can share memory."
    output.prose(words)


def _sharing(num: int | None) -> str:
    return "" if num is None else f"{num} others" if num else "none"


def _show_padding(job: Job, output: Output) -> None:
    rows = padded_rows(job.leaves)
    if not rows:
        return
    output.line()
    output.table(
        ["padded", "shape", "lies as", "on all devices", "part"],
        [
            (
                spell_names([leaf.path for leaf in row.leaves], 1),
                *row.shapes,
                format_bytes(row.lost_bytes),
                f"{row.part:.1%}",
            )
            for row in rows[:_MOST_ROWS]
        ],
        right=[3, 4],
    )
    if len(rows) > _MOST_ROWS:
        output.prose(f"and {len(rows) - _MOST_ROWS} more; --json has all")
