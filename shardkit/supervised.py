"""A run whose processes a supervisor starts, watches and replaces.

Owns what `train.py` does otherwise there: it joins, takes its part of the devices,
keeps its snapshots where they outlive it, and halts when all others do. Invariant: all
processes decide alike, since all of it follows from what the supervisor has said.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shardkit.chaos.deeds import Deeds, kill_supervisor
from shardkit.chaos.faults import FaultPoints, parse_fault
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.jax_job import start_jax
from shardkit.cluster.joining import join
from shardkit.cluster.member import Member
from shardkit.cluster.records import Assignment
from shardkit.cluster.source import Supervised
from shardkit.cluster.store import MemberStore
from shardkit.cluster.watching import Watch
from shardkit.errors import ConfigError
from shardkit.events import EventLog
from shardkit.report.run_dir import claim
from shardkit.snapshot.config import SnapshotConfig
from shardkit.snapshot.groups import Redundancy

__all__ = ["Part", "Supervision", "join_supervisor", "leave"]

_POLL_S = 0.01


class Part:
    """What a process has of a supervised run, or would have if it were needed.

    Args:
        assignment: What the supervisor says that it is.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.store = MemberStore(assignment, os.environ["SHARDKIT_RUN"])
        # It may be preparing, and is told of no others then.
        self._meet_s = Deadlines.of_environment(os.environ).meet_s

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all of them."""
        return self.assignment.process_index == 0

    def directory(self, out: Path | None, stem: str) -> Path:
        """Returns the run's directory, the same in all processes of all generations.

        Args:
            out: What the user asked for.
            stem: What to call it otherwise.

        Raises:
            ConfigError: If the first process does not say in time which it is.
        """
        if out is not None:
            return out
        shared = _shared() / "out"
        if self.is_first and not shared.exists():
            draft = shared.with_name(f".out-{os.getpid()}")
            draft.write_text(str(claim(stem).absolute()), encoding="utf-8")
            draft.replace(shared)
        end_s = time.monotonic() + self._meet_s
        while not shared.exists():
            if time.monotonic() > end_s:
                raise ConfigError(
                    f"{shared}: process 0 did not say for {self._meet_s:g} s (meet_s) "
                    "where the run is kept; name it with --out DIR"
                )
            time.sleep(_POLL_S)
        return Path(shared.read_text(encoding="utf-8"))

    def start_jax(self) -> None:
        """Joins JAX of this process to that of the others; before devices are used."""
        start_jax(self.assignment, timeout_s=self._meet_s)

    def snapshots(self, every: int) -> SnapshotConfig:
        """Keeps them with the agent of this host.

        Args:
            every: Steps between two; 0 for every step.
        """
        return SnapshotConfig(every=every or 1, store=self.store)

    def speeds(self, devices: Sequence[Any]) -> dict[int, float]:
        """Device id → speed, from how much each process is to do."""
        quotas = self.assignment.quotas
        if quotas is None:
            return {}
        processes = [device.process_index for device in devices]
        return {
            device.id: max(quotas[process], 0.01) / processes.count(process)
            for device, process in zip(devices, processes, strict=True)
        }

    def probe(self, devices: Sequence[Any]) -> Any:
        """What measures how fast this process is; None if nobody asks for that."""
        from shardkit.probe import SpeedProbe

        is_asked = os.environ.get("SHARDKIT_STRAGGLERS") == "balance"
        if not is_asked or self.assignment.num_processes < 2:
            return None
        mine = self.assignment.process_index
        return SpeedProbe([x for x in devices if x.process_index == mine])


class Supervision:
    """What a process is in a supervised run.

    Args:
        member: The process, as its cluster knows it.
    """

    def __init__(self, member: Member) -> None:
        self.member, self.assignment = member, member.assignment
        self._watch, self._probe = Watch(member), None
        self._faults = FaultPoints(
            [parse_fault(x) for x in os.environ.get("SHARDKIT_FAULTS", "").split()],
            self.assignment.process_index,
            self.assignment.generation,
            Deeds(
                os.environ["SHARDKIT_RUN"],
                self.assignment.host,
                disturb=member.disturb,
                kill_supervisor=lambda: kill_supervisor(_shared()),
            ),
        )
        self._faults.begin("join")

    def own_directory(self) -> Path:
        """Where a process that does not speak for all keeps its own record."""
        index = self.assignment.process_index
        return _shared() / f"generation-{self.assignment.generation}-process-{index}"

    def membership(self, script: Mapping[int, int], num_pool: int) -> Supervised:
        """Follows a script, as far as the devices allow, and the supervisor."""
        return Supervised(
            self.member, script, num_pool, least=self.assignment.num_processes
        )

    def watch(self, events: EventLog, steps: int, probe: Any = None) -> None:
        """Tells the supervisor from now on what the run is doing.

        Args:
            events: Of the run.
            steps: Where it ends.
            probe: What `Part.probe` returned.
        """
        self._probe, self._watch.steps = probe, steps
        # A fault may be that nothing is told any more.
        events.subscribe(begins=self._faults.begin)
        events.subscribe(self._watch.event, begins=self._watch.begin)

    def step(self, metrics: Any) -> None:
        """Tells that a step is done."""
        facts = {} if self._probe is None else self._probe.facts
        self._watch.step(metrics, **facts)
        self._faults.stepped(metrics.step + 1, metrics.step_s or 0.0)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tells that the run is."""
        self.member.finished(summary)

    def halt(self, step: int) -> NoReturn:
        """Tells that this process has halted, and ends it.

        A host may be on its way out, so what protects the last snapshot is made first,
        as far as that can be in half the time that a halt has.

        Args:
            step: Before which; the state is in a snapshot.
        """
        if Redundancy.parse(self.assignment.redundancy).num_losses:
            self.member.wait_protected(step, self.member.deadlines.halt_s / 2)
        self.member.halted(step)
        leave(0)


def _shared() -> Path:
    return Path(os.environ["SHARDKIT_DIRECTORY"])


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for others, which may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join_supervisor(
    preload: Callable[[], Any], prepare: Callable[[Assignment], Any]
) -> Supervision | None:
    """Joins the supervisor that started this process, if one did.

    Args:
        preload: Imports what the run needs; it must not touch a device.
        prepare: Does all that can be done before it is known what to go on from. Only
            where devices are emulated: others are taken by those that train.
    """
    member = join(preload, None if _has_accelerators() else prepare)
    return None if member is None else Supervision(member)


def _has_accelerators() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(
        list(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "accel*")
    )
