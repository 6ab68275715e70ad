"""What the command says: one JSON document, or tables for people.

Owns the two streams. Invariants: what is asked for goes to standard output, and
progress and notes to standard error; with `--json` standard output is one document.
A terminal gets tables that fit its width, a pipe aligned columns that are never cut.
"""

import contextlib
import json
import math
import os
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from shardkit.command.tree_rows import tree_rows
from shardkit.errors import ShardkitError

__all__ = ["Interrupted", "Output", "clean"]


_NARROW = 100


class Interrupted(ShardkitError):
    """What ends the threads of a command that was interrupted."""


class Output:
    """Where a command speaks.

    Args:
        as_json: Whether a machine listens.

    Attributes:
        as_json: The same.
        stopped: Set when the command is to end; what reports progress then raises.
        is_reporting: Whether something reports progress.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.stopped = as_json, threading.Event()
        self.is_reporting = False
        self.console = Console(highlight=False)
        self._errors = Console(stderr=True, highlight=False)

    def document(self, fields: Mapping[str, Any]) -> None:
        """Writes the one document."""
        print(json.dumps(_finite(fields), indent=1, allow_nan=False), flush=True)

    def line(self, text: str = "", *, style: str = "") -> None:
        """Writes a line."""
        self.console.print(Text(clean(text), style=style), soft_wrap=True)

    def note(self, text: str) -> None:
        """Writes a line beside what is asked for."""
        self._errors.print(Text(clean(text), style="dim"), soft_wrap=True)

    def prose(self, text: str) -> None:
        """Writes a sentence, on a terminal without breaking words."""
        lines = [text]
        if self.console.is_terminal:
            width = self.console.width - 2
            lines = textwrap.wrap(clean(text), width, break_on_hyphens=False)
        for line in lines:
            self.line(f"  {line}", style="dim")

    def remark(self, text: str) -> None:
        """Writes what somebody should know; a name that it begins with stays as it is.

        >>> Output(as_json=False).remark("axis_rules: no array has an axis 'emebd'")
          axis_rules: no array has an axis 'emebd'.
        """
        if not re.match(r"\w+:", text):
            text = text[0].upper() + text[1:]
        for line in (text if text.endswith((".", "?")) else f"{text}.").splitlines():
            self.prose(line)

    @property
    def is_narrow(self) -> bool:
        """Whether it is a terminal that has room for few columns only."""
        return self.console.is_terminal and self.console.width < _NARROW

    def facts(self, rows: Mapping[str, str]) -> None:
        """Writes names and values."""
        width = max(map(len, rows), default=0)
        for name, value in rows.items():
            text = Text(f"  {name:<{width}}  ", style="dim")
            self.console.print(text + Text(clean(value), style=""), soft_wrap=True)

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        right: Sequence[int] = (),
        is_tree: bool = False,
    ) -> None:
        """Writes columns, without those in which no row has anything.

        Args:
            header: What each is called.
            rows: Their cells.
            right: The columns that end at their right.
            is_tree: Whether the first column has paths, which a terminal gets as a
                tree.
        """
        if is_tree and self.console.is_terminal:
            empty = [""] * (len(header) - 1)
            rows = [
                [text, *(empty if number is None else rows[number][1:])]
                for text, number in tree_rows([row[0] for row in rows])
            ]
        kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
        lines = [
            [clean(row[i]).replace("\n", "\\n") for i in kept]
            for row in [header, *rows]
        ]
        ends = {kept.index(i) for i in right if i in kept}
        if not self.console.is_terminal:
            self._plain(lines, ends)
            return
        # Numbers and short paths stay whole on a narrow terminal; the rest is folded.
        whole = {*ends}
        if max(len(line[0]) for line in lines) <= self.console.width // 2:
            whole.add(0)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for number, name in enumerate(lines[0]):
            table.add_column(
                Text(name, style="bold"),
                justify="right" if number in ends else "left",
                overflow="fold",
                no_wrap=number in whole,
            )
        for line in lines[1:]:
            table.add_row(*map(Text, line))
        self.console.print(table)

    def _plain(self, lines: Sequence[Sequence[str]], ends: set[int]) -> None:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (
                cell.rjust(width) if number in ends else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            self.line("  ".join(cells).rstrip())

    @contextlib.contextmanager
    def progress(self, what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Shows how far something is, on a terminal.

        Yields:
            What is to be told of bytes that are done, from any thread. It raises
            `Interrupted` if the command is to end, or has gone on.
        """
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=self._errors,
            transient=True,
            disable=not self._errors.is_terminal,
        )
        with bar:
            task = bar.add_task(clean(what), total=num_bytes)

            is_over = threading.Event()

            def tell(done: int) -> None:
                if self.stopped.is_set() or is_over.is_set():
                    raise Interrupted("interrupted")
                bar.advance(task, done)

            self.is_reporting = True
            try:
                yield tell
            finally:
                self.is_reporting = False
                is_over.set()


def clean(text: str) -> str:
    r"""Spells out what a terminal would obey: paths come from files of others.

    Paths below the working directory are written as seen from there.

    >>> clean("params/\x1b[2Jw")
    'params/\\x1b[2Jw'
    """
    here = f"{os.getcwd()}/"
    text = text if here == "//" else text.replace(here, "")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    """Spells numbers that JSON does not have as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
