"""What the ends of processes mean for their generation.

Owns the reading of a generation's members: who failed, who is done, who has halted.
Invariant: an end that was ordered is never taken for a failure.
"""

from shardkit.cluster.causes import Cause, cause_of_exit
from shardkit.cluster.deadlines import Deadlines
from shardkit.cluster.live import Live
from shardkit.cluster.roster import Roster

__all__ = ["LEFT", "find_deaths", "find_failures", "find_frozen", "find_halt"]

LEFT = 75
"""The exit code of a process that has saved and left."""


def find_failures(live: Live, roster: Roster) -> list[Cause]:
    """Returns why a generation cannot go on, as far as its members show it."""
    found = []
    for process, seat in enumerate(live.seats):
        entry, host = live.entries[process], roster[seat.assignment.host]
        if host.state in ("absent", "waiting", "starting"):
            found.append(Cause(kind="lost", text=f"{host.name} is gone"))
        elif entry.get("state") == "exited":
            if entry["code"] not in (0, LEFT):
                found.append(
                    cause_of_exit(process, host.name, entry, resumed=live.resumed)
                )
        elif not entry and host.is_alive:
            known = host.workers().get(seat.worker, {"state": "exited"})
            if known["state"] == "exited":
                text = f"process {process} on {host.name} ended before it began"
                found.append(Cause(kind="killed", text=text))
    return found


def find_deaths(live: Live) -> list[Cause]:
    """Returns how members ended that nobody had ordered to, once all have ended."""
    found = []
    for process, seat in enumerate(live.seats):
        entry = live.entries[process]
        is_ended = entry.get("state") == "exited"
        if is_ended and (entry.get("failed") or not entry["ended_by_us"]):
            host = seat.assignment.host
            found.append(cause_of_exit(process, host, entry, resumed=live.resumed))
    return [cause for cause in found if cause.kind != "early"]


def find_frozen(live: Live, deadlines: Deadlines, now_s: float) -> Cause | None:
    """Returns who does not come any further, if that is so."""
    if (frozen := live.watchdog.frozen(now_s)) is not None:
        names = ", ".join(
            f"{p} on {live.seats[p].assignment.host}" for p in frozen.processes
        )
        text = f"{frozen.why}; frozen: {names}"
        return Cause(kind="frozen", text=text, at_s=now_s - frozen.for_s)
    limit_s = deadlines.first_step_s
    if live.first_step_s is None and now_s >= live.since_s + limit_s:
        text = f"no step was done within {limit_s:g} s (first_step_s)"
        return Cause(kind="frozen", text=text)
    return None


def find_halt(live: Live) -> Cause | None:
    """Returns why a generation is over that has halted; None if it has not."""
    halt, has_exited = live.halt, len(live.exited()) == len(live.seats)
    if live.all_have("finished"):
        # It came to its end before it came to the halt.
        return None
    if halt is not None and halt.confirmed:
        # Whoever leaves for good may still be closing its files.
        if has_exited or (not halt.leave and live.all_have("halted")):
            return Cause(kind="halt", text=halt.why)
    elif live.leave:
        if has_exited:
            return Cause(kind="halt", text="all have left")
    elif any("halted" in entry for entry in live.entries):
        return Cause(kind="halt", text="some have halted")
    return None
