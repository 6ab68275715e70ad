"""What people see of a cluster: one JSON object.

Owns what of a run is remembered for people: losses, facts that workers told, how much
of the time was useful. Invariant: its size is bounded, however long the run is.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from shardkit.cluster.generations import Machine
from shardkit.cluster.hosts import Host
from shardkit.cluster.settings import Settings

__all__ = ["History", "make_status"]

_MOST_LOSSES = 500
_MOST_RECOVERIES = 200


class History:
    """What was told so far.

    Args:
        memory: What `to_json` gave in an earlier life.

    Example:
        >>> history = History()
        >>> for step in range(2000):
        ...     history.read({"loss": 1.0}, step)
        >>> len(history.losses) <= 500, history.losses[-1]
        (True, [1999, 1.0])
    """

    def __init__(self, memory: Mapping[str, Any] | None = None) -> None:
        memory = memory or {}
        self.facts: dict[str, Any] = dict(memory.get("facts", {}))
        self.losses: list[list[float]] = list(memory.get("losses", []))
        self.began_unix_s: float = memory.get("began_unix_s", time.time())
        self._every: int = memory.get("every", 1)

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember, as JSON values."""
        return {
            "facts": self.facts,
            "losses": self.losses,
            "began_unix_s": self.began_unix_s,
            "every": self._every,
        }

    def read(self, record: Mapping[str, Any], step: int | None = None) -> None:
        """Learns what a worker told: `loss` with its step, or facts of the run."""
        step = record.get("step", step)
        loss = record.get("loss")
        if isinstance(loss, int | float) and isinstance(step, int):
            while self.losses and self.losses[-1][0] >= step:
                self.losses.pop()
            self.losses.append([step, float(loss)])
            self._thin()
        for key in ("steps", "out", "mesh"):
            if key in record:
                self.facts[key] = record[key]

    def _thin(self) -> None:
        while len(self.losses) > _MOST_LOSSES:
            self._every *= 2
            *older, last = self.losses
            self.losses = [x for x in older if x[0] % self._every == 0] + [last]
            if len(self.losses) > _MOST_LOSSES:
                self.losses = self.losses[::2]


def make_status(
    settings: Settings, machine: Machine, history: History, now_s: float
) -> dict[str, Any]:
    """Says all there is to say.

    Args:
        settings: What the cluster was started with.
        machine: Where it stands.
        history: What was told.
        now_s: The time, as the machine has it.
    """
    live, offset_s = machine.live, time.time() - now_s
    losses = history.losses
    waits = [] if machine.waiting.until_s is None else [machine.waiting.spell(now_s)]
    if machine.state == "choosing" and (text := machine.salvage.spell()):
        waits.append(text)
    if live is not None and live.halt is not None:
        waits.append(f"for all processes to halt before step {live.halt.step}")
    recoveries = machine.recoveries[-_MOST_RECOVERIES:]
    return {
        "run": settings.run,
        "out": history.facts.get("out"),
        "state": spell_state(machine),
        "generation": machine.generation,
        "step": None if live is None else live.step,
        "steps": history.facts.get("steps"),
        "loss": losses[-1][1] if losses else None,
        "step_s": None if live is None else live.watchdog.step_s,
        "devices": 0 if live is None else live.num_devices,
        "mesh": history.facts.get("mesh"),
        "redundancy": settings.redundancy,
        "snapshot": _snapshot(machine, now_s),
        "hosts": [_host(host, machine, now_s) for host in machine.hosts.values()],
        "recoveries": [recovery.record(offset_s) for recovery in recoveries],
        "losses": losses,
        "goodput": goodput(machine, history, now_s + offset_s),
        "waits": waits,
    }


def spell_state(machine: Machine) -> str:
    """Returns `forming`, `running`, `recovering`, `waiting`, `halting` or `ended`."""
    live = machine.live
    if machine.state == "ended":
        return "ended"
    if machine.waiting.until_s is not None:
        return "waiting"
    if machine.state == "running" and live is not None:
        if live.first_step_s is None:
            return "forming" if not machine.recoveries else "recovering"
        return "running" if live.halt is None else "halting"
    return "forming" if machine.generation == 0 else "recovering"


def goodput(machine: Machine, history: History, now_unix_s: float) -> float | None:
    """Returns useful steps over those that were possible in the time since the start.

    None before a step was measured.
    """
    live = machine.live
    if live is None or live.watchdog.step_s is None:
        return None
    lost_s = 0.0
    for recovery in machine.recoveries:
        lost_s += sum(s for _, s in recovery.phases())
        lost_s += recovery.lost_steps * live.watchdog.step_s
    total_s = max(now_unix_s - history.began_unix_s, 1e-9)
    return round(min(1.0, max(0.0, 1 - lost_s / total_s)), 4)


def _snapshot(machine: Machine, now_s: float) -> dict[str, Any] | None:
    live = machine.live
    if live is None or live.protected < 0:
        return None
    images = [
        image
        for host in machine.hosts.values()
        for image in host.report.get("images", ())
        if (image["generation"], image["step"]) == (live.generation, live.protected)
    ]
    return {
        "step": live.protected,
        "age_s": round(now_s - live.protected_s, 3),
        "bytes": sum(image["num_bytes"] for image in images),
        "protection_bytes": sum(
            host.report.get("protection_bytes", 0) for host in machine.hosts.values()
        ),
        "predicted_bytes": sum(
            cost.total_bytes for cost in machine.protecting.costs.values()
        ),
    }


def _memory(host: Host, machine: Machine) -> dict[str, Any]:
    """What snapshots take of a host's memory; nothing is known of one that is gone."""
    report, cost = host.report, machine.protecting.costs.get(host.name)
    images = [image["num_bytes"] for image in report.get("images", ())]
    return {
        "image_bytes": sum(images) if report else None,
        "protection_bytes": report.get("protection_bytes"),
        "predicted_bytes": None if cost is None else cost.total_bytes,
    }


def _host(host: Host, machine: Machine, now_s: float) -> dict[str, Any]:
    live, state = machine.live, "lost"
    if host.until_s is not None:
        state = "quarantined"
    elif host.is_alive:
        is_in = live is None or host.name in live.hosts
        state = "alive" if is_in else "returning"
    elif host.state in ("starting", "unknown"):
        state = "returning"
    workers = []
    if live is not None:
        speeds = live.speeds.speeds()
        middle = statistics.median(speeds.values()) if speeds else 1.0
        for process, seat in enumerate(live.seats):
            if seat.assignment.host == host.name:
                entry, seen = live.entries[process], live.watchdog.seen(process)
                workers.append(
                    {
                        "process": process,
                        "pid": entry.get("pid"),
                        "step": seen.step,
                        "phase": seen.phase,
                        "age_s": round(now_s - seen.since_s, 3),
                        "speed": round(speeds.get(process, middle) / middle, 3),
                    }
                )
    return {
        "host": host.name,
        "state": state,
        "workers": workers,
        "standbys": host.count_standbys(),
        "flaps": len(host.losses),
        **_memory(host, machine),
        "until_s": None if host.until_s is None else round(host.until_s - now_s, 3),
        "why": host.why,
    }
