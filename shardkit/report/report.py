"""One run, reported to everything that shows or keeps it."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shardkit.events import Event
from shardkit.report.environment import environment
from shardkit.report.events_file import EventsFile
from shardkit.report.jsonl import (
    MetricsFile,
    StepLike,
    eval_record,
    first_step_record,
    read_records,
    reconfigure_record,
    step_record,
)
from shardkit.report.layout_file import write_layout
from shardkit.report.page import write_report
from shardkit.report.picture import write_picture
from shardkit.report.run_dir import RunDirectory
from shardkit.report.summary import summary_rows
from shardkit.report.tensorboard import TensorBoard
from shardkit.report.terminal import (
    Terminal,
    format_announced,
    format_reconfigure,
    format_reconfiguring,
)
from shardkit.report.timeline import write_timeline
from shardkit.report.trace import TraceFile
from shardkit.snapshot.recent import LastStep
from shardkit.words import format_plan

__all__ = ["Report"]

_OPTIONAL = {"tensorboardX": "TensorBoard events", "matplotlib": "pictures"}


class Report:
    """Hands steps and events to the terminal, the run's directory and TensorBoard.

    A context manager; leaving it closes every file, after an error too.

    Args:
        directory: Where the run writes.
        terminal: Where it speaks.
        label: What to call the run.
        extras: Whether to write TensorBoard events and pictures.
    """

    def __init__(
        self,
        directory: RunDirectory,
        terminal: Terminal,
        *,
        label: str = "train",
        extras: bool = True,
    ):
        self.directory = directory
        self.terminal = terminal
        self.label = label
        self.saved_step: int | None = None
        """The step of the newest checkpoint of this process."""
        self.evals: dict[int, float] = {}
        """Losses of the evaluations of this process, by step."""
        self._extras = extras
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoard | None = None
        self._trace: TraceFile | None = None
        self._events = EventsFile()
        self._change: Event | None = None
        self._source: Path | None = None
        self._is_waiting = False

    def begin(
        self, first_step: int, *, is_read: bool = True, source: Path | None = None
    ) -> None:
        """Opens the files, once it is sure that the run can start.

        Args:
            first_step: Where this process begins; what was written of that step and
                later ones is cut.
            is_read: Whether that is certain. Else it begins where an event says that
                a state was restored.
            source: Of which other run it has the state; None for its own.
        """
        self.directory.prepare()
        self._source = source
        self._metrics = MetricsFile(self.directory.metrics)
        self._metrics.truncate(first_step)
        name = self.directory.path.name
        self._trace = TraceFile(self.directory.trace, label=name)
        self._events.open(self.directory.events)
        if self._extras:
            self._say_what_is_missing()
        self._is_waiting = not is_read
        if is_read:
            self._say_begin(first_step)

    def describe(self, leaves: Iterable[Any], *, corpus_digest: str | None) -> None:
        """Writes what is computed on what, for whoever looks at the run.

        Args:
            leaves: Of the state, as `Trainer.layout` gives them.
            corpus_digest: Of the data; None if it has none.
        """
        write_layout(self.directory.layout, leaves)
        found = {"facts": environment(), "corpus_digest": corpus_digest}
        self._events.append("environment", **found)

    def step(self, metrics: StepLike) -> None:
        """Reports a step."""
        if self._trace is not None:
            self._trace.step(metrics)
        self._events.step(metrics)
        self._tell(metrics)

    def _tell(self, metrics: StepLike) -> None:
        assert self._metrics is not None, "begin comes first"
        self._metrics.append(step_record(metrics))
        self.terminal.step(metrics)
        if self._tensorboard:
            self._tensorboard.step(metrics)

    def event(self, event: Event) -> None:
        """Reports an event; subscribe it to the run's log.

        Programs are compiled in other threads too, so `compile` is for the trace only,
        which may be written to from any.
        """
        trace = self._trace
        if trace is not None:
            trace.event(event)
        self._events.event(event)
        fields = event.fields
        is_exact = self.directory.config.train.consistency == "exact"
        if event.name == "notice":
            self.terminal.line(fields["message"], style="yellow")
        elif event.name == "checkpoint":
            self.saved_step = fields["step"]
        elif event.name == "announced":
            self.terminal.line(format_announced(fields), style="cyan")
        elif event.name == "plan":
            self.terminal.line(format_plan(fields), style="cyan")
        elif event.name == "reconfiguring":
            if fields["consistency"] == "equivalent" and is_exact:
                self.terminal.line(format_reconfiguring(fields), style="yellow")
            counts = f"{fields['from_devices']} -> {fields['to_devices']}"
            self.terminal.busy(f"{counts} devices: compiling")
        elif event.name == "reconfigure":
            self.terminal.moved(fields["to_mesh"])
            self.terminal.line(format_reconfigure(fields), style="bold cyan")
            self._keep(reconfigure_record(fields))
            self._change = event
            if self._tensorboard:
                self._tensorboard.reconfigure(fields, event.duration_s)
        elif event.name == "first_step" and self._change is not None:
            begin_s, step = self._change.start_s, fields["step"]
            start_s, end_s = event.start_s - begin_s, event.end_s - begin_s
            self._keep(first_step_record(step, start_s, end_s))
            if self._tensorboard:
                self._tensorboard.first_step(step, event.duration_s)
        elif event.name == "restored" and self._is_waiting:
            self._is_waiting = False
            assert self._metrics is not None, "begin comes first"
            self._metrics.truncate(fields["step"])
            self._say_begin(fields["step"])
        elif event.name == "rewind" and self._metrics is not None:
            self._metrics.truncate(fields["step"])
        elif event.name == "last_steps" and self._metrics is not None:
            for step in map(LastStep.from_json, fields["recent"]):
                # What the process before this one told is here already.
                if step.step > self._metrics.last_step:
                    self._tell(step)
        elif event.name == "eval":
            step, loss = fields["step"], fields["loss"]
            self.evals[step] = loss
            self.terminal.line(f"step {step}: validation loss {loss:.4f}")
            self._keep(eval_record(step, loss))
            if self._tensorboard:
                self._tensorboard.evaluation(step, loss)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary, then all that can be drawn from the run."""
        self.directory.write_summary(summary)
        self.terminal.end()
        if self._extras:
            self.draw()
        rows = {**summary_rows(summary), "directory": str(self.directory.path)}
        self.terminal.table(self.label, rows | self.picture_row())

    def draw(self, twin: Path | None = None) -> None:
        """Draws the page and the pictures, over the loss of a twin if there is one."""
        try:
            write_report(self.directory.path)
        except Exception as error:  # as below
            self.terminal.line(f"no report: {error}", style="yellow")
        if not importlib.util.find_spec("matplotlib"):
            return
        records, title = read_records(self.directory.metrics), self.directory.path.name
        try:
            write_picture(
                self.directory.picture,
                records,
                twin=read_records(twin) if twin else (),
                title=title,
            )
            write_timeline(self.directory.timeline, records, title=title)
        except Exception as error:  # the run is whole and saved; this is decoration
            self.terminal.line(f"no picture: {error}", style="yellow")

    def picture_row(self) -> dict[str, str]:
        """Returns what a table shows of the pictures, if there are any."""
        paths = {
            "report": self.directory.report,
            "picture": self.directory.picture,
            "changes": self.directory.timeline,
        }
        return {
            name: str(path)
            for name, path in paths.items()
            if self._extras and path.is_file()
        }

    def close(self) -> None:
        """Closes everything; a second call does nothing."""
        self.terminal.end()
        self._events.close()
        for file in (self._metrics, self._tensorboard, self._trace):
            if file is not None:
                file.close()
        self._metrics = self._tensorboard = self._trace = None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say_begin(self, first_step: int) -> None:
        if self._trace is not None:
            self._trace.mark("begin", step=first_step)
        source = None if self._source is None else str(self._source)
        self._events.append("begin", step=first_step, source=source)
        if self._extras and importlib.util.find_spec("tensorboardX"):
            self._tensorboard = TensorBoard(self.directory.tensorboard, first_step)
        train = self.directory.config.train
        self.terminal.begin(
            first_step, train.steps, label=self.label, every=train.log_every
        )

    def _keep(self, record: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.append(record)

    def _say_what_is_missing(self) -> None:
        missing = [n for n in _OPTIONAL if importlib.util.find_spec(n) is None]
        if missing:
            self.terminal.line(
                f"without {' and '.join(_OPTIONAL[name] for name in missing)}; "
                f"these need {' and '.join(missing)}",
                style="yellow",
            )
