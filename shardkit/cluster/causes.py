"""Why a generation ended, and whether another one would fare better.

Owns the causes, which of several is the root, and what repeats. Invariants: what a
failure does to its peers is never taken for the failure itself; a run that comes no
further ends, after a number of attempts that is known beforehand.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.cluster.settings import Limits

__all__ = ["DAMAGE", "Cause", "Crashes", "Verdict", "cause_of_exit", "spell_start"]

_RANKS = ("lost", "killed", "frozen", "halt", "verdict", "crash", "early")
_OURS = ("ClusterError", "WireError", "Unanswered", "Closed")
"""Errors of a worker that say something of the cluster and not of the program."""
DAMAGE = ("DamagedError", "TornError")
"""So do these, of one that went on from a snapshot in memory."""
_FINAL_CODES = (2, 3)
"""The program's own verdict: bad input, a loss that is not finite."""
_KILLS = (-9, -15)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """Why a generation ended.

    Attributes:
        kind: `"lost"` (a host), `"killed"`, `"frozen"`, `"halt"` (as agreed),
            `"verdict"` (an error that the program reports itself), `"crash"` or
            `"early"` (a process that ended before the others).
        text: In words.
        error: What identifies a crash of the program; empty for others.
        detail: Its traceback, or the last lines that it wrote.
        code: The exit code of the process.
        step: How many steps the process had done; None if that is not known.
        at_s: When it happened, by the supervisor's clock; None if that is not known.
    """

    kind: str
    text: str
    error: str = ""
    detail: str = ""
    code: int = 1
    step: int | None = None
    at_s: float | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """How near to the root: the least is the nearest."""
        at_s = math.inf if self.at_s is None else self.at_s
        return _RANKS.index(self.kind), at_s


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A run that is to end.

    Attributes:
        code: With which exit code.
        message: Why.
        saves: Whether to leave a checkpoint behind first, if there is a state.
    """

    code: int
    message: str
    saves: bool


def cause_of_exit(
    process: int, host: str, entry: Mapping[str, Any], *, resumed: bool = False
) -> Cause:
    """Says what the end of a worker means, from its agent's report.

    Args:
        process: Which process it was.
        host: On which host.
        entry: What the agent says of it.
        resumed: Whether it was to go on from a snapshot in memory.

    Example:
        >>> entry = {"code": -9, "status": "was killed by SIGKILL", "tail": []}
        >>> cause_of_exit(2, "host-1", entry).text
        'process 2 on host-1 was killed by SIGKILL'
    """
    if entry.get("ended_by_us") and not entry.get("failed"):
        text = "it was being ended when the supervisor was lost"
        return Cause(kind="halt", text=text)
    code, failed = entry["code"], entry.get("failed") or {}
    status = entry["status"]
    if entry.get("ended_by_us"):
        # It was on its way out when it was ended with the others.
        code, status = 1, "failed"
    text = f"process {process} on {host} {status}"
    detail = failed.get("traceback") or "\n".join(entry["tail"])
    kind, error = "crash", ""
    if failed:
        error = f"{failed['kind']}: {failed['message']}"
        text += f" ({error.splitlines()[0]:.300})"
    elif code > 0:
        error = next((line for line in reversed(entry["tail"]) if line.strip()), "")
        error = f"code {code}: {error}"
    elif code < 0:
        error = entry["status"]
    if code in _KILLS:
        kind, error = "killed", ""
    elif code == 0:
        kind, error = "early", ""
    elif failed.get("kind") in (_OURS + DAMAGE if resumed else _OURS):
        error = ""
    elif code in _FINAL_CODES:
        kind = "verdict"
    return Cause(
        kind=kind,
        text=text,
        error=error,
        detail=detail,
        code=code,
        step=failed.get("step", entry.get("step")),
        at_s=entry.get("ended_s"),
    )


class Crashes:
    """What has gone wrong so far.

    Args:
        limits: What is put up with.
        memory: What `to_json` gave, in an earlier life.
    """

    def __init__(self, limits: Limits, memory: Mapping[str, Any] | None = None) -> None:
        self._limits = limits
        memory = memory or {"step": None, "errors": {}, "barren": 0}
        self._step: int | None = memory["step"]
        self._errors: dict[str, int] = dict(memory["errors"])
        self.barren: int = memory["barren"]

    def to_json(self) -> dict[str, Any]:
        """Returns what to remember, as JSON values."""
        return {"step": self._step, "errors": self._errors, "barren": self.barren}

    def progressed(self) -> None:
        """Learns of a snapshot that is newer than any before."""
        self.barren = 0

    def judge(self, causes: Sequence[Cause], step: int) -> tuple[Cause, Verdict | None]:
        """Finds the root cause, and whether the run is to end because of it.

        Args:
            causes: All that were found, in the order in which they were.
            step: How many steps had been done.
        """
        root = min(causes, key=lambda cause: cause.rank)
        step = step if root.step is None else root.step
        if root.kind == "halt":
            return root, None
        self.barren += 1
        if root.kind == "verdict":
            message = f"{root.text}\n{root.detail}".rstrip()
            return root, Verdict(root.code, message, saves=False)
        if root.kind == "crash" and root.error:
            if self._repeats(root.error, step) >= self._limits.same_crashes:
                where = f"at step {step}" if step > 0 else "before a step was done,"
                message = (
                    f"{root.text}, {where} as before: that is the program's own "
                    f"error\n{root.detail}"
                )
                return root, Verdict(1, message.rstrip(), saves=True)
        if self.barren >= self._limits.recoveries_without_progress:
            message = (
                f"{root.text}; {self.barren} generations in a row came no further "
                f"than step {step}\n{root.detail}"
            )
            return root, Verdict(1, message.rstrip(), saves=True)
        return root, None

    def _repeats(self, error: str, step: int) -> int:
        # Addresses, process ids and times differ each time.
        key = re.sub(r"0x[0-9a-f]+|\d+", "#", error)[:500]
        if step != self._step:
            self._step, self._errors = step, {}
        self._errors[key] = self._errors.get(key, 0) + 1
        return self._errors[key]


def spell_start(entry: Mapping[str, Any]) -> str:
    """Says how a worker ended that has never joined."""
    tail = "\n".join(entry["tail"])
    if entry["code"] == 0:
        text = (
            "the command ended without joining the cluster: it must call "
            "shardkit.cluster.join"
        )
    else:
        text = f"the command {entry['status']} before it joined"
    return f"{text}\n{tail}".rstrip()
