"""The generation that runs: its workers, how far they are, what they agreed on.

Owns what is known of one generation. Invariants: its members never change; its newest
whole step only grows; a halt is for one step, which no member had begun when it
agreed. What follows from all that is the state machine's business.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from shardkit.cluster.causes import DAMAGE
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.hosts import Host
from shardkit.cluster.records import Assignment
from shardkit.cluster.settings import Limits
from shardkit.cluster.stragglers import Speeds
from shardkit.cluster.watchdog import Watchdog

__all__ = ["Halt", "Live", "Seat"]

_FIRST_MARGIN = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Seat:
    """Who is a process of a generation.

    Attributes:
        worker: The number of the worker on its host.
        assignment: What it was told to be.
    """

    worker: int
    assignment: Assignment

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {"worker": self.worker, "assignment": self.assignment.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Seat":
        """Reads what `to_json` made."""
        return cls(values["worker"], Assignment.from_json(values["assignment"]))


@dataclasses.dataclass(slots=True)
class Halt:
    """A step that all processes are to halt before.

    Attributes:
        why: For people.
        leave: Whether it is for good.
        since_s: When it was first proposed.
        step: The step that is proposed now.
        confirmed: Whether all have agreed.
        margin: By how much the next proposal goes further than what was begun.
    """

    why: str
    leave: bool
    since_s: float
    step: int
    confirmed: bool = False
    margin: int = _FIRST_MARGIN

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


class Live:
    """A generation that was assigned.

    Args:
        seats: Its processes, in their order.
        deadlines: The windows of its watchdog.
        limits: Over how many steps the speeds of its processes are measured.
        now_s: When it begins.

    Attributes:
        speeds: How fast its processes are.
        entries: What was last heard of each process; empty before anything was.
        protected: The newest step that is whole on all hosts; -1 if none.
        resume_step: The step that it began at; None while unknown.
        protected_s: When it was so.
        first_step_s: When its first step was done; None before.
        restored_s: When the last process was ready for it.
        halt: What is being agreed on; None if nothing.
    """

    def __init__(
        self,
        seats: Iterable[Seat],
        deadlines: Deadlines,
        limits: Limits,
        now_s: float,
    ) -> None:
        self.seats = tuple(seats)
        first = self.seats[0].assignment
        self.generation, self.num_devices = first.generation, first.num_devices
        self.resume_step = None if first.resume is None else first.resume.step
        self.leave = first.leave
        self.since_s, self.speeds = now_s, Speeds(limits, len(self.seats))
        self.watchdog = Watchdog(deadlines, len(self.seats), now_s)
        self.entries: list[dict[str, Any]] = [{} for _ in self.seats]
        self.protected, self.protected_s = -1, now_s
        self.first_step_s: float | None = None
        self.restored_s: float | None = None
        self.halt: Halt | None = None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts that take part, in their order."""
        return tuple(dict.fromkeys(seat.assignment.host for seat in self.seats))

    @property
    def resumed(self) -> bool:
        """Whether it was to go on from a snapshot in memory."""
        return self.seats[0].assignment.resume is not None

    @property
    def found_damage(self) -> bool:
        """Whether a process found that snapshot damaged."""
        failed = [entry.get("failed") or {} for entry in self.entries]
        return self.resumed and any(x.get("kind") in DAMAGE for x in failed)

    @property
    def fetched_bytes(self) -> int:
        """What its processes had to fetch of other hosts' images."""
        told = [entry.get("restored") or {} for entry in self.entries]
        return sum(x.get("fetched_bytes", 0) for x in told)

    @property
    def step(self) -> int:
        """How many steps are done."""
        return max(self.watchdog.step, self.resume_step or 0)

    def num_settled(self) -> int:
        """Returns how many steps this generation itself has done."""
        base = self.watchdog.step if self.resume_step is None else self.resume_step
        return max(0, self.watchdog.step - base)

    def read(self, host: Host, now_s: float) -> None:
        """Learns what a host says of its workers."""
        workers = host.workers()
        for process, seat in enumerate(self.seats):
            if seat.assignment.host != host.name:
                continue
            entry = workers.get(seat.worker, {})
            if entry.get("generation") != self.generation:
                continue
            self.entries[process] = entry
            if "exit_age_s" in entry:
                age_s = max(entry["exit_age_s"], entry.get("failed_age_s", 0.0))
                entry["ended_s"] = host.said_s - age_s
            self.watchdog.progress(process, entry["step"], entry["phase"], now_s)
            self.watchdog.heard(process, entry["silent_s"], now_s)
            if entry["state"] == "exited" or "finished" in entry or "halted" in entry:
                self.watchdog.done(process)
            facts = entry["facts"]
            if {"busy_s", "work"} <= facts.keys():
                step = facts.get("busy_step", entry["step"])
                self.speeds.add(process, step, facts["busy_s"], facts["work"])
        self._date(now_s)

    def _date(self, now_s: float) -> None:
        if self.restored_s is None:
            phases = [entry.get("phase", "start") for entry in self.entries]
            if not {"start", "restore"} & set(phases):
                self.restored_s = now_s
        if self.resume_step is None and self.watchdog.step >= 0:
            # Where it began by itself, anew or from disk.
            self.resume_step = self.watchdog.step
        if self.first_step_s is None and self.num_settled() > 0:
            self.restored_s = self.restored_s or now_s
            self.first_step_s = now_s

    def newest_whole(self, images: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
        """Returns the newest step that all processes have committed; -1 if none.

        Args:
            images: The images of this generation, with the hosts that have them.
        """
        steps: dict[int, set[int]] = {p: set() for p in range(len(self.seats))}
        for _, image in images:
            steps[image["process"]].add(image["step"])
        return max(set.intersection(*steps.values()), default=-1)

    def protect(self, step: int, now_s: float) -> bool:
        """Learns that a step is whole and protected; whether that is news."""
        if step <= self.protected:
            return False
        self.protected, self.protected_s = step, now_s
        return True

    def all_have(self, what: str) -> bool:
        """Whether every process has said something."""
        return all(what in entry for entry in self.entries)

    def exited(self) -> list[int]:
        """Returns the processes that have ended."""
        return [p for p, e in enumerate(self.entries) if e.get("state") == "exited"]

    def propose(self, why: str, *, leave: bool, now_s: float) -> Halt:
        """Begins to agree on a halt."""
        self.halt = Halt(why, leave, now_s, max(0, self.step) + _FIRST_MARGIN)
        return self.halt

    def count_answers(self) -> str:
        """Returns what the proposal has come to.

        Returns:
            `"open"`, `"accepted"` by all, or `"refused"` by somebody who had begun
            the step; the proposal is for a later step then, to be made anew.
        """
        halt = self.halt
        assert halt is not None
        is_open = False
        for entry in self.entries:
            answer = entry.get("answered")
            if answer is None or answer["step"] != halt.step:
                # Who is done begins nothing any more.
                is_done = "finished" in entry or entry.get("state") == "exited"
                is_open = is_open or not is_done
            elif not answer["accepted"]:
                halt.margin *= 2
                halt.step = answer["begun"] + halt.margin
                return "refused"
        return "open" if is_open else "accepted"
