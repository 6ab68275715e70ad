"""A run that is reported without being run."""

import dataclasses
import time

from shardkit.config import from_dict
from shardkit.events import EventLog
from shardkit.report import Report, RunDirectory, read_records, summarize

CONFIG = from_dict(
    {
        "model": {"factory": "m:build"},
        "data": {"factory": "m:data", "global_batch_size": 8, "num_microbatches": 4},
        "optimizer": {"learning_rate": 1.0},
        "train": {"steps": 20},
    }
)
CHANGE = {
    "step": 5,
    "from_devices": 8,
    "to_devices": 3,
    "from_mesh": {"data": 2, "fsdp": 4},
    "to_mesh": {"fsdp": 3},
    "consistency": "exact",
    "bytes_moved": 3 * 2**20,
    "plain_bytes_moved": 5 * 2**20,
    "phases": [
        {"name": "plan", "start_s": 0.0, "end_s": 0.01, "bytes": 0},
        {"name": "move", "start_s": 0.01, "end_s": 0.25, "bytes": 3 * 2**20},
    ],
    "was_ready": False,
    "certified": True,
    "move_certified": True,
}

BEFORE = {
    name: CHANGE[name]
    for name in ("step", "from_devices", "to_devices", "from_mesh", "to_mesh")
} | {"consistency": "exact"}
"""What is known of it before anything is done."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    step: int
    loss: float = 2.5
    loss_bits: str = "40200000"
    num_devices: int = 8
    mesh: dict = dataclasses.field(default_factory=lambda: {"data": 2, "fsdp": 4})
    step_s: float = 0.5
    tokens_per_s: float | None = 12288.0
    metrics: dict = dataclasses.field(default_factory=lambda: {"grad_norm": 1.0})


def open_run(path, config=CONFIG, *, resume=False):
    return RunDirectory.open(path, config, stem="tiny", resume=resume)


def emit_change(log, first_step_s=None):
    """Emits a change that ended a while ago, and the first step if it took any time."""
    start_s = time.monotonic() - 0.25 - (first_step_s or 0)
    log.emit("reconfigure", since_s=start_s, **CHANGE)
    if first_step_s is not None:
        log.emit("first_step", since_s=start_s + 0.25, step=CHANGE["step"])


def train(directory, terminal, steps, *, first=0, bits="40200000", **summary):
    """Reports a run as train.py would."""
    log = EventLog()
    with Report(directory, terminal, extras=False) as report:
        log.subscribe(report.event)
        report.begin(first)
        for step in range(first, steps):
            if step == CHANGE["step"]:
                emit_change(log)
            report.step(Metrics(step, loss_bits=bits))
        records = read_records(directory.metrics)
        given = {"eval_loss": 2.25, "state_digest": "aa", "corpus_digest": None}
        report.finish(summarize(records, steps=steps, **{**given, **summary}))
