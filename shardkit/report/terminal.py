"""What a run says on the terminal.

Owns the live progress bar, the lines of changes, and the closing table. Where the
output is not a terminal it writes plain lines, about one per tenth of the run. It
decides nothing and keeps nothing.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from shardkit.report.jsonl import StepLike, phase_ms
from shardkit.words import format_bytes, format_mesh, format_time

__all__ = [
    "Terminal",
    "format_announced",
    "format_bytes",
    "format_mesh",
    "format_reconfigure",
    "format_reconfiguring",
    "format_time",
    "format_verdict",
]

NUM_RECENT = 10
"""Steps over which the speed is averaged."""


def format_reconfigure(fields: Mapping[str, Any]) -> str:
    """Writes one change of devices in a line."""
    verdict = format_verdict(fields, {None: "uncertified", True: "certified"})
    return (
        f"step {fields['step']}: {fields['from_devices']} -> {fields['to_devices']} "
        f"devices ({format_mesh(fields['from_mesh'])} -> "
        f"{format_mesh(fields['to_mesh'])}), "
        f"{format_bytes(fields['bytes_moved'])} moved, "
        f"{_format_phases(fields['phases'])}, {verdict}"
    )


def format_verdict(fields: Mapping[str, Any], words: Mapping[Any, str]) -> str:
    """Writes what is proven of a change.

    Args:
        fields: Of the event `reconfigure`; of an older run, not all of them.
        words: What to say where a step was computed on both sides, and where not.

    >>> format_verdict({"certified": True}, {True: "certified"})
    'certified'
    >>> found = {"certified": None, "consistency": "equivalent", "move_certified": True}
    >>> format_verdict(found, {None: "uncertified"})
    'equivalent, the move certified'
    """
    certified = fields.get("certified")
    if certified is False:
        return "NOT CERTIFIED"
    if fields.get("consistency") != "equivalent":
        return words.get(certified, words.get(None, ""))
    proven = "the move certified" if fields.get("move_certified") else words.get(None)
    return f"equivalent, {proven}" if proven else "equivalent"


def format_reconfiguring(fields: Mapping[str, Any]) -> str:
    """Writes a change after which a run is equal to rounding only, before it is made.

    >>> meshes = {"from_mesh": {"tensor": 4}, "to_mesh": {"fsdp": 3}}
    >>> format_reconfiguring({"step": 5, "from_devices": 4, "to_devices": 3, **meshes})
    'step 5: 4 -> 3 devices (tensor=4 -> fsdp=3): equivalent, to rounding'
    """
    return (
        f"step {fields['step']}: {fields['from_devices']} -> {fields['to_devices']} "
        f"devices ({format_mesh(fields['from_mesh'])} -> "
        f"{format_mesh(fields['to_mesh'])}): equivalent, to rounding"
    )


def format_announced(fields: Mapping[str, Any]) -> str:
    """Writes a change that waits for its program, or one that was taken back.

    >>> format_announced({"step": 5, "from_devices": 8, "to_devices": 6})
    'step 5: 8 -> 6 devices asked for; going on with 8 while that is compiled'
    >>> format_announced({"step": 7, "from_devices": 8, "to_devices": 8})
    'step 7: 8 devices are to stay'
    """
    old, new = fields["from_devices"], fields["to_devices"]
    if old == new:
        return f"step {fields['step']}: {old} devices are to stay"
    return (
        f"step {fields['step']}: {old} -> {new} devices asked for; going on with {old} "
        "while that is compiled"
    )


def _format_phases(phases: Sequence[Mapping[str, Any]]) -> str:
    """Writes how long a change took, and what took most of it."""
    spent_ms = phase_ms(phases)
    total = format_time(1000 * max((phase["end_s"] for phase in phases), default=0))
    if len(spent_ms) < 2:
        return total
    longest = max(spent_ms, key=lambda name: spent_ms[name])
    return f"{total} ({longest.replace('_', ' ')} {format_time(spent_ms[longest])})"


class Terminal:
    """Shows a run from `begin` to `end`.

    Args:
        console: Where to; standard output if None.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._shown: dict[str, Any] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=NUM_RECENT)
        self._num_steps = 0
        self._every = 1

    def begin(
        self, first_step: int, num_steps: int, *, label: str, every: int | None = None
    ) -> None:
        """Starts the progress bar.

        Args:
            first_step: Where this process begins.
            num_steps: The step at which the run ends.
            label: What is running.
            every: Steps between plain lines; None is a tenth of what is to be done.
        """
        self._num_steps = num_steps
        self._recent.clear()
        self._every = every or max(1, (num_steps - first_step) // 10)
        if not self.console.is_terminal:
            self.line(f"{label}: steps {first_step} to {num_steps}")
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[green]{task.fields[mesh]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._shown = {"loss": "compiling", "speed": "", "mesh": ""}
        self._progress.add_task(
            label, total=num_steps, completed=first_step, **self._shown
        )
        self._progress.start()

    def step(self, metrics: StepLike) -> None:
        """Shows a step."""
        self._shown = {
            "loss": f"loss {metrics.loss:.4f}",
            "speed": self._speed(metrics),
            "mesh": format_mesh(metrics.mesh),
        }
        done = metrics.step + 1
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=done, **self._shown)
        elif done % self._every == 0 or done == self._num_steps:
            width = len(str(self._num_steps))
            words = [word for word in self._shown.values() if word]
            self.line(f"{done:>{width}}/{self._num_steps}  " + "  ".join(words))

    def busy(self, text: str) -> None:
        """Says in the progress bar what holds the steps up, until the next step."""
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, loss=text, speed="", mesh="")

    def moved(self, mesh: Mapping[str, int]) -> None:
        """Shows another mesh; the speed and the time remaining are measured anew."""
        self._recent.clear()
        if self._progress is not None:
            self._shown |= {"speed": "", "mesh": format_mesh(mesh)}
            task = self._progress.tasks[0]
            done = int(task.completed)
            # Its rate would count the change as a slow step.
            self._progress.reset(task.id, completed=done, **self._shown)

    def line(self, text: str, *, style: str = "") -> None:
        """Writes a line, above the progress bar if there is one."""
        # soft_wrap: a pipe has no width to break lines at.
        self.console.print(Text(text, style=style), soft_wrap=True)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Writes names and values, in a table where there is a terminal."""
        if not self.console.is_terminal:
            width = max(map(len, rows), default=0)
            self.line(title)
            for name, value in rows.items():
                self.line(f"  {name:<{width}}  {value}")
            return
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.console.print(table)

    def end(self) -> None:
        """Takes the progress bar away; a second call does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _speed(self, metrics: StepLike) -> str:
        if metrics.step_s and metrics.tokens_per_s:
            num_tokens = metrics.tokens_per_s * metrics.step_s
            self._recent.append((num_tokens, metrics.step_s))
        if not self._recent:
            return ""
        num_tokens, spent_s = map(sum, zip(*self._recent, strict=True))
        return f"{num_tokens / spent_s:,.0f} tokens/s"
