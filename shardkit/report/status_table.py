"""The status of a run of several processes, as a terminal shows it.

Owns what `shardkit status` looks like, from 80 columns on. Everything it shows comes
from a `Status`; what is not known is left out or a dash.
"""

import datetime
import itertools
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardkit.cluster.status import HostStatus, Phase, RecoveryStatus, Status
from shardkit.report.terminal import format_bytes, format_mesh, format_time

__all__ = ["render"]

MAX_CELLS = 100
"""Width of the bar of a recovery's phases, where there is room."""

WIDE = 110
"""From so many columns on there is room for what each host has in memory."""

SLOW = 0.8
"""Share of the median speed below which a process is called slow."""

_STYLES = {
    "running": "bold green",
    "alive": "green",
    "recovering": "bold yellow",
    "waiting": "bold yellow",
    "halting": "bold yellow",
    "forming": "bold cyan",
    "returning": "cyan",
    "quarantined": "yellow",
    "lost": "bold red",
    "ended": "bold",
}
# Letters of their own, so that phases are told apart without colours, too.
_PHASES = (
    ("█", "red"),
    ("▓", "yellow"),
    ("▒", "magenta"),
    ("█", "cyan"),
    ("▓", "blue"),
    ("▒", "green"),
)
_UNKNOWN = "–"


def render(
    status: Status, *, max_rows: int | None = None, note: str = ""
) -> RenderableType:
    """Draws a status.

    Args:
        status: What to draw.
        max_rows: How many processes there is room for; hosts in trouble come first
            where that is not enough.
        note: What the viewer has to say, such as that nobody answers.

    >>> import io
    >>> from rich.console import Console
    >>> out = io.StringIO()
    >>> status = Status(run="tiny-001", state="running", step=120, steps=400)
    >>> Console(file=out, width=80).print(render(status))
    >>> out.getvalue().split()[:5]
    ['tiny-001', 'running', 'step', '120', 'of']
    """
    parts: list[RenderableType] = [_head(status), *_facts(status)]
    if status.hosts:
        parts += ["", _Hosts(status, max_rows)]
    if status.recoveries:
        parts += ["", *_recovery(status.recoveries[-1], len(status.recoveries))]
    if status.waits or note:
        parts.append("")
    parts += [Text(f"waits {wait}", style="yellow") for wait in status.waits]
    if note:
        parts.append(Text(note, style="bold red"))
    return Group(*parts)


def _head(status: Status) -> RenderableType:
    words = Text(status.run, style="bold", overflow="ellipsis", no_wrap=True)
    words.append(f"  {status.state}", _STYLES.get(status.state, ""))
    if status.generation is not None:
        words.append(f"  generation {status.generation}", "")
    if status.step is None:
        return words
    words.append(f"  step {status.step}", "")
    if not status.steps:
        return words
    words.append(f" of {status.steps}")
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    bar = ProgressBar(total=status.steps, completed=min(status.step, status.steps))
    grid.add_row(words, bar)
    return grid


def _facts(status: Status) -> Iterator[RenderableType]:
    facts = []
    if status.loss is not None:
        facts.append(("loss", f"{status.loss:.4f}"))
    if status.step_s is not None:
        facts.append(("step", format_time(1000 * status.step_s)))
    if status.devices is not None:
        mesh = f" ({format_mesh(status.mesh)})" if status.mesh else ""
        facts.append(("devices", f"{status.devices}{mesh}"))
    if status.goodput is not None:
        facts.append(("goodput", f"{100 * status.goodput:.1f} %"))
    if facts:
        yield _line(facts)
    snapshot, facts = status.snapshot, []
    if snapshot is not None and snapshot.step is not None:
        age = "" if snapshot.age_s is None else f", {_age(snapshot.age_s)} old"
        facts.append(("snapshot", f"step {snapshot.step}{age}"))
        if snapshot.bytes is not None:
            facts.append(("memory", format_bytes(snapshot.bytes)))
    if status.redundancy is not None:
        facts.append(("redundancy", f"{status.redundancy}{_cost(status)}"))
    if snapshot is not None and snapshot.predicted_bytes:
        most = format_bytes(snapshot.predicted_bytes)
        facts.append(("predicted", f"{most} in all"))
    if facts:
        yield _line(facts)


def _cost(status: Status) -> str:
    snapshot = status.snapshot
    if snapshot is None or not snapshot.bytes or snapshot.protection_bytes is None:
        return ""
    share = 100 * snapshot.protection_bytes / snapshot.bytes
    return f", + {format_bytes(snapshot.protection_bytes)} ({share:.0f} %)"


def _line(facts: Sequence[tuple[str, str]]) -> "_Flow":
    return _Flow(
        [Text.assemble((name, "dim"), " ", value) for name, value in facts], "   "
    )


class _Flow:
    """Pieces side by side; lines are broken between them only."""

    def __init__(self, pieces: Sequence[Text], gap: str) -> None:
        self.pieces, self.gap = pieces, gap

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        line = Text()
        for piece in self.pieces:
            is_full = line.cell_len + len(self.gap) + piece.cell_len > options.max_width
            if line and is_full:
                yield line
                line = Text()
            if line:
                line.append(self.gap)
            line.append_text(piece)
        yield line


class _Bar:
    """What a recovery's time went to, as wide as there is room."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = phases

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        num_cells = max(1, min(MAX_CELLS, options.max_width) - len(self.phases))
        widths = _widths([phase.s for phase in self.phases], num_cells)
        bar, legend = Text(no_wrap=True, overflow="crop"), []
        for number, (phase, width) in enumerate(zip(self.phases, widths, strict=True)):
            letter, style = _PHASES[number % len(_PHASES)]
            bar.append(letter * width, style)
            name, spent = phase.name.replace("_", " "), format_time(1000 * phase.s)
            legend.append(
                Text.assemble((letter, style), " ", (name, "dim"), " ", spent)
            )
        yield bar
        yield _Flow(legend, "  ")


class _Hosts:
    """The table of hosts and processes, with as many columns as there is room for."""

    def __init__(self, status: Status, max_rows: int | None) -> None:
        self.status, self.max_rows = status, max_rows

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield _hosts(self.status, self.max_rows, is_wide=options.max_width >= WIDE)


def _hosts(status: Status, max_rows: int | None, *, is_wide: bool) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("host", overflow="ellipsis", no_wrap=True, min_width=6)
    table.add_column("state", no_wrap=True)
    for name in ("process", "pid", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("doing", no_wrap=True)
    for name in ("heard", "speed", "standby"):
        table.add_column(name, justify="right", no_wrap=True)
    if is_wide:
        table.add_column("images + protection", justify="right", no_wrap=True)
    hosts = _most_telling(status.hosts, max_rows)
    for host in hosts:
        for number, row in enumerate(_rows(host)):
            memory = [_memory(host) if number == 0 else ""] if is_wide else []
            table.add_row(*row, *memory)
    parts: list[RenderableType] = [table]
    num_left = len(status.hosts) - len(hosts)
    if num_left:
        parts.append(Text(f"… and {num_left} more hosts", style="dim"))
    return Group(*parts, *(Text(x, style="yellow") for x in map(_absence, hosts) if x))


def _memory(host: HostStatus) -> str:
    """Says what snapshots take of a host's memory, and what they were said to.

    >>> sizes = {"image_bytes": 2 << 20, "protection_bytes": 1 << 20}
    >>> _memory(HostStatus(**sizes, predicted_bytes=3_200_000))
    '2 MiB + 1 MiB of 3.05 MiB'
    """
    if host.image_bytes is None:
        return _UNKNOWN
    text = format_bytes(host.image_bytes)
    if host.protection_bytes:
        text += f" + {format_bytes(host.protection_bytes)}"
    if host.predicted_bytes is not None:
        text += f" of {format_bytes(host.predicted_bytes)}"
    return text


def _absence(host: HostStatus) -> str:
    """Says how long a host is kept out, and why."""
    if host.until_s is None:
        return ""
    times = f"went {host.flaps} times and " if host.flaps else ""
    return f"{host.host} {times}is kept out for {_age(host.until_s)}"


def _most_telling(
    hosts: Sequence[HostStatus], max_rows: int | None
) -> Sequence[HostStatus]:
    ends = list(itertools.accumulate(max(1, len(host.workers)) for host in hosts))
    if max_rows is None or not ends or ends[-1] <= max_rows:
        return hosts
    hosts = sorted(hosts, key=_is_well)
    ends = itertools.accumulate(max(1, len(host.workers)) for host in hosts)
    return hosts[: max(1, sum(end <= max_rows for end in ends))]


def _is_well(host: HostStatus) -> bool:
    return host.state == "alive" and all(
        worker.speed is None or worker.speed >= SLOW for worker in host.workers
    )


def _rows(host: HostStatus) -> Iterator[list[RenderableType]]:
    state = Text(host.state, style=_STYLES.get(host.state, ""))
    standbys = "" if host.standbys is None else str(host.standbys)
    first: Sequence[RenderableType] = [Text(host.host), state]
    for worker in host.workers:
        slow = worker.speed is not None and worker.speed < SLOW
        yield [
            *first,
            _number(worker.process),
            _number(worker.pid),
            _number(worker.step),
            worker.phase or _UNKNOWN,
            _UNKNOWN if worker.age_s is None else _age(worker.age_s),
            Text(
                "" if worker.speed is None else f"{worker.speed:.2f}×",
                style="yellow" if slow else "",
            ),
            standbys,
        ]
        first, standbys = [Text(), Text()], ""
    if not host.workers:
        dash = Text(_UNKNOWN, style="dim")
        yield [*first, dash, "", "", "", "", "", standbys]


def _number(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)


def _recovery(recovery: RecoveryStatus, number: int) -> Iterator[RenderableType]:
    words = Text("recovery " if number == 1 else f"recovery {number}, the last: ")
    words.stylize("dim")
    words.append(recovery.cause or "no cause is known", "not dim")
    yield words
    facts = []
    if recovery.started_s is not None:
        facts.append(("at", _clock(recovery.started_s)))
    took_s = recovery.total_s
    took = "not over yet" if took_s is None else format_time(1000 * took_s)
    facts.append(("took", took))
    if recovery.step is not None:
        facts.append(("back at step", str(recovery.step)))
    if recovery.lost_steps is not None:
        facts.append(("lost steps", str(recovery.lost_steps)))
    if recovery.rebuilt_bytes:
        facts.append(("rebuilt", format_bytes(recovery.rebuilt_bytes)))
    if recovery.fetched_bytes:
        facts.append(("fetched", format_bytes(recovery.fetched_bytes)))
    yield _line(facts)
    if recovery.phases:
        yield _Bar(recovery.phases)


def _widths(parts: Sequence[float], num_cells: int) -> list[int]:
    """Shares cells out in proportion; what is not 0 gets at least one.

    >>> _widths([0.01, 1.0, 2.0], 60), _widths([0, 0], 60)
    ([1, 20, 40], [0, 0])
    """
    # What is not finite or below 0 comes from a clock that was set.
    parts = [part if 0 < part < float("inf") else 0.0 for part in parts]
    total = sum(parts) or 1.0
    return [max(1, round(num_cells * part / total)) if part else 0 for part in parts]


def _age(age_s: float) -> str:
    """Writes how long ago, as short as a column is narrow.

    >>> [_age(age_s) for age_s in (0.213, 42.0, 300, 9000)]
    ['0.2 s', '42 s', '5 min', '2.5 h']
    """
    if age_s < 10:
        return f"{max(0.0, age_s):.1f} s"
    if age_s < 120:
        return f"{age_s:.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.1f} h"


def _clock(at_s: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(at_s).strftime("%H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return _UNKNOWN
