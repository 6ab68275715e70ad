"""What a cluster is started with, and what survives its supervisor.

Owns `Settings` with its JSON, and the files of the cluster's directory. Invariants:
files that hold the token are readable by their owner alone, and every file is written
whole or not at all.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.split import HostPlan

__all__ = ["Limits", "Settings", "read_private", "write_private"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a cluster puts up with.

    Attributes:
        same_crashes: So many crashes at the same step with the same error are the
            program's own.
        recoveries_without_progress: So many recoveries in a row that bring no newer
            snapshot end the run, whatever their causes.
        failed_starts: So many standbys in a row of one host that end before they are
            ready, and it gets no more.
        flaps: A host lost more often than this within `flap_window_s` is quarantined.
        flap_window_s: For how long a loss is remembered.
        first_quarantine_s: For how long at first; twice as long every time after.
        longest_quarantine_s: And never longer than this.
        settle_steps: After so many steps of a generation, standbys are started.
        straggler_steps: Over so many measurements of each process speeds are compared.
        straggler_gain: A change for the sake of stragglers must save this part of a
            step.
        straggler_rest_s: After such a change there is no other for so long at first;
            twice as long every time after, up to `longest_quarantine_s`.
        leave_out_speed: A process slower than this part of the median is left out.
    """

    same_crashes: int = 2
    recoveries_without_progress: int = 8
    failed_starts: int = 3
    flaps: int = 2
    flap_window_s: float = 300.0
    first_quarantine_s: float = 10.0
    longest_quarantine_s: float = 640.0
    settle_steps: int = 2
    straggler_steps: int = 20
    straggler_gain: float = 0.15
    straggler_rest_s: float = 60.0
    leave_out_speed: float = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a cluster is started with.

    Attributes:
        run: The run's id: hex digits.
        token: The run's secret.
        argv: The user's command.
        directory: Where the cluster keeps its state and the workers' output.
        hosts: What each host has.
        min_devices: With fewer, the run waits.
        redundancy: How snapshots are protected.
        stragglers: What is done about slow processes: `"balance"` or `"ignore"`.
        standbys: How many warm processes a host keeps; None for as many as it runs.
        deadlines: How long things may take.
        limits: What is put up with.
        address: Where the supervisor listens: `"ip:port"`.
    """

    run: str
    token: str
    argv: tuple[str, ...]
    directory: str
    hosts: tuple[HostPlan, ...]
    min_devices: int = 1
    redundancy: str = "none"
    stragglers: str = "balance"
    standbys: int | None = None
    deadlines: Deadlines = dataclasses.field(default_factory=Deadlines)
    limits: Limits = dataclasses.field(default_factory=Limits)
    address: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values, the token among them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Reads what `to_json` made."""
        return cls(
            **{
                **values,
                "argv": tuple(values["argv"]),
                "hosts": tuple(HostPlan(**host) for host in values["hosts"]),
                "deadlines": Deadlines.read(values["deadlines"]),
                "limits": Limits(**values["limits"]),
            }
        )


def write_private(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON that its owner alone can read, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(values, file, separators=(",", ":"))
    draft.replace(path)


def read_private(path: Path) -> dict[str, Any] | None:
    """Reads it again; None if it is not there, or not JSON."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
