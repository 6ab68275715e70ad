"""The status of a run as metrics that Prometheus scrapes.

Owns the names of the metrics and the text format, version 0.0.4. What is not known has
no sample. Names and units follow Prometheus' conventions: base units, `_total` for what
only grows.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

from shardkit.cluster.status import STATES, HostStatus, Status

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Mapping[str, str], float | None]
Family = tuple[str, str, str, Iterable[Sample]]


def metrics_text(status: Status) -> str:
    r"""Writes a status as Prometheus reads it.

    >>> lines = metrics_text(Status(run="tiny", step=120)).splitlines()
    >>> print(*(line for line in lines if "shardkit_step" in line), sep="\n")
    # HELP shardkit_step The step that was last completed.
    # TYPE shardkit_step gauge
    shardkit_step 120
    """
    lines: list[str] = []
    for name, kind, text, samples in _families(status):
        # By labels: two samples with the same ones would spoil the whole scrape.
        rows = {
            f"shardkit_{name}{_labels(labels)}": _value(value)
            for labels, value in samples
            if value is not None
        }
        if rows:
            lines.append(f"# HELP shardkit_{name} {text}")
            lines.append(f"# TYPE shardkit_{name} {kind}")
            lines += [f"{series} {value}" for series, value in rows.items()]
    return "\n".join(lines) + "\n"


def _families(status: Status) -> Iterator[Family]:
    info = {"run": status.run, "redundancy": status.redundancy or ""}
    yield "run_info", "gauge", "Always 1; says which run it is.", [(info, 1)]
    states = [({"state": name}, float(name == status.state)) for name in STATES]
    yield "state", "gauge", "1 for what the run is doing.", states
    yield from _numbers(status)
    yield from _of_hosts(status.hosts)
    yield from _of_recoveries(status)


def _numbers(status: Status) -> Iterator[Family]:
    def gauge(name: str, text: str, value: float | None) -> Family:
        return name, "gauge", text, [({}, value)]

    yield gauge("generation", "How often processes were started.", status.generation)
    yield gauge("step", "The step that was last completed.", status.step)
    yield gauge("steps_planned", "The step at which the run ends.", status.steps)
    yield gauge("loss", "The loss of that step.", status.loss)
    yield gauge("step_seconds", "How long a step takes.", status.step_s)
    yield gauge("devices", "How many devices compute.", status.devices)
    yield gauge("goodput_ratio", "Useful steps over possible.", status.goodput)
    yield gauge("waits", "How many things are waited for.", len(status.waits))
    found = status.snapshot
    if found is None:
        return
    yield gauge("snapshot_step", "The step of the newest whole snapshot.", found.step)
    yield gauge("snapshot_age_seconds", "How old that snapshot is.", found.age_s)
    yield gauge("snapshot_bytes", "Host memory that it takes.", found.bytes)
    yield gauge(
        "protection_bytes", "Host memory that protects it.", found.protection_bytes
    )


def _of_hosts(hosts: Iterable[HostStatus]) -> Iterator[Family]:
    names = [(host, {"host": host.host}) for host in hosts]
    workers = [
        (worker, {**name, "process": str(worker.process)})
        for host, name in names
        for worker in host.workers
        if worker.process is not None
    ]
    up = [(name, float(host.state == "alive")) for host, name in names]
    yield "host_up", "gauge", "1 if the host is alive.", up
    standbys = [(name, host.standbys) for host, name in names]
    yield "host_standbys", "gauge", "Processes that wait to take over.", standbys
    flaps = [(name, host.flaps) for host, name in names]
    yield "host_flaps_total", "counter", "How often the host went.", flaps
    kept = [(name, host.image_bytes) for host, name in names]
    yield "host_image_bytes", "gauge", "Memory that images take.", kept
    guards = [(name, host.protection_bytes) for host, name in names]
    yield "host_protection_bytes", "gauge", "What protects others' takes.", guards
    most = [(name, host.predicted_bytes) for host, name in names]
    yield "host_predicted_bytes", "gauge", "What both were said to take.", most
    steps = [(name, worker.step) for worker, name in workers]
    yield "worker_step", "gauge", "The step that a process is at.", steps
    ages = [(name, worker.age_s) for worker, name in workers]
    yield "worker_age_seconds", "gauge", "Since a process was heard of.", ages
    speeds = [(name, worker.speed) for worker, name in workers]
    yield "worker_speed_ratio", "gauge", "Speed over that of the median.", speeds


def _of_recoveries(status: Status) -> Iterator[Family]:
    found = status.recoveries
    yield "recoveries_total", "counter", "Recoveries so far.", [({}, len(found))]
    lost = sum(max(0, recovery.lost_steps or 0) for recovery in found)
    yield "lost_steps_total", "counter", "Steps that were computed again.", [({}, lost)]
    if not found:
        return
    last = found[-1]
    yield (
        *("last_recovery_seconds", "gauge", "How long the last recovery took."),
        [({}, last.total_s)],
    )
    spent_s: dict[str, float] = {}
    for phase in last.phases:
        spent_s[phase.name] = spent_s.get(phase.name, 0.0) + phase.s
    yield (
        *("last_recovery_phase_seconds", "gauge", "What its time went to."),
        [({"phase": name}, s) for name, s in spent_s.items()],
    )


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escape(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _value(value: float) -> str:
    """Writes a number as Go reads it.

    >>> [_value(x) for x in (3, 0.25, float("nan"), float("-inf"))]
    ['3', '0.25', 'NaN', '-Inf']
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return (
        str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(value)
    )
