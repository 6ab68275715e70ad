"""What happened to a run, in words: marks over its steps, timelines, certificates.

Owns those words. Its invariant: a certificate that was not made is never called one.
The numbers between are `page_data.py`'s business.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.report.stored_run import StoredRun
from shardkit.report.terminal import (
    format_bytes,
    format_mesh,
    format_time,
    format_verdict,
)
from shardkit.report.timeline import changes_of

__all__ = ["Mark", "Timeline", "certificates", "marks", "timelines"]

_CERTIFIED = {True: "certified", None: "not certified"}


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened before a step.

    Attributes:
        step: Which.
        kind: `"change"`, `"recovery"`, `"checkpoint"`, `"start"` or `"notice"`.
        text: What happened.
        unix_s: When; None if that was not recorded.
    """

    step: int
    kind: str
    text: str
    unix_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """What a change of devices, or a recovery, took.

    Attributes:
        title: Which.
        note: What is known of it besides.
        phases: Name, start and end of each, in seconds.
        is_bad: Whether a certificate failed.
    """

    title: str
    note: str
    phases: list[tuple[str, float, float]]
    is_bad: bool = False

    @property
    def end_s(self) -> float:
        """When the last phase ended."""
        return max((end_s for _, _, end_s in self.phases), default=0.0)


def marks(run: StoredRun) -> list[Mark]:
    """Lists what happened, by its step."""
    times = {event["step"]: _time(event) for event in run.happened("reconfigure")}
    found = [_change_mark(x, times.get(x["step"])) for x in run.of_kind("reconfigure")]
    for recovery in run.recoveries:
        text = f"{recovery['cause']}; going on from step {recovery['step']}"
        when = _time(recovery, "started_s")
        found.append(Mark(recovery["step"], "recovery", text, when))
    begun = False
    for event in run.events:
        step, when = event["step"], _time(event)
        match event["event"]:
            case "checkpoint":
                there = "" if step in run.saved_steps else ", and removed since"
                found.append(Mark(step, "checkpoint", f"saved{there}", when))
            case "begin":
                words = f"going on in a new process from step {step}"
                found.append(Mark(step, "start", words if begun else "begun", when))
                begun = True
            case "rewind":
                text = (
                    f"devices were lost: back to step {step} by a {event.get('source')}"
                )
                text += f", {event.get('repeats')} steps again"
                found.append(Mark(step, "recovery", text, when))
            case "plan":
                text = _plan_words(event)
                found.append(Mark(step, "notice", text, when))
            case "notice":
                found.append(Mark(step, "notice", str(event.get("message")), when))
    # Steps that were repeated have told some of it twice; what came last is so.
    newest = {(mark.step, mark.kind, mark.text): mark for mark in found}
    return sorted(newest.values(), key=lambda mark: mark.step)


def _plan_words(event: Mapping[str, Any]) -> str:
    mesh, notes = event.get("mesh"), event.get("notes")
    words = [f"mesh chosen: {format_mesh(mesh) if isinstance(mesh, dict) else mesh}"]
    return "; ".join([*words, *map(str, notes if isinstance(notes, list) else [])])


def _time(record: Mapping[str, Any], name: str = "unix_s") -> float | None:
    found = record.get(name)
    return found if isinstance(found, int | float) else None


def _change_mark(change: Mapping[str, Any], when: float | None) -> Mark:
    meshes = [format_mesh(change[name]) for name in ("from_mesh", "to_mesh")]
    text = f"{_counts(change)} devices ({' → '.join(meshes)}), {_of_change(change)}"
    return Mark(change["step"], "change", text, when)


def _counts(change: Mapping[str, Any]) -> str:
    return f"{change['from_devices']} → {change['to_devices']}"


def _of_change(change: Mapping[str, Any]) -> str:
    own = [p["end_s"] for p in change["phases"] if p["name"] != "first_step"]
    moved = f"{format_bytes(change['bytes_moved'])} moved"
    verdict = format_verdict(change, _CERTIFIED)
    return f"{format_time(1e3 * max(own, default=0))}, {moved}, {verdict}"


def timelines(run: StoredRun) -> Iterator[Timeline]:
    """Yields what changes took, and then what recoveries did."""
    for change in changes_of(run.records):
        phases = [(p["name"], p["start_s"], p["end_s"]) for p in change["phases"]]
        title = f"step {change['step']}: {_counts(change)} devices"
        failed = change.get("certified") is False
        yield Timeline(title, _of_change(change), phases, failed)
    for recovery in run.recoveries:
        phases, at_s = [], 0.0
        for phase in recovery["phases"]:
            phases.append((phase["name"], at_s, at_s + phase["s"]))
            at_s += phase["s"]
        note = f"{format_time(1e3 * at_s)}, {recovery['cause']}"
        yield Timeline(f"step {recovery['step']}: recovery", note, phases)


def certificates(run: StoredRun) -> Iterator[tuple[bool | None, str]]:
    """Yields whether a change was proven to keep all bits, and that in words."""
    leaves = f" and {len(run.leaves)} leaves" if run.leaves else " and of the state"
    for change in run.of_kind("reconfigure"):
        step, certified = change["step"], change.get("certified")
        where = f"step {step}, {_counts(change)} devices"
        both = f"computed on {format_mesh(change['from_mesh'])} and on "
        both += format_mesh(change["to_mesh"])
        if certified is True:
            text = f"{both}: every bit of the loss{leaves} is the same"
        elif certified is False:
            text = f"{both}: bits differ"
        elif change.get("consistency") == "equivalent":
            text = (
                f"{format_mesh(change['to_mesh'])} rounds otherwise, so that no step "
            )
            text += "is compared"
            if change.get("move_certified"):
                text += "; every bit of the state was moved as it was"
        else:
            text = "nothing was computed twice, so that nothing is proven of it"
        yield certified if certified in (True, False) else None, f"{where}: {text}"
    twin = run.summary.get("twin")
    if isinstance(twin, dict):
        same: bool | None = twin.get("identical") is True
        what = "the same bits" if same else "OTHER BITS"
        if not same and twin.get("is_promised") is False:
            same, what = None, "equal to rounding, as groups of devices differ in size"
        yield (
            same,
            f"beside an uninterrupted twin, {twin.get('num_steps')} steps: {what}",
        )
