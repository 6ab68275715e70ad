"""Which fault happens where, and to whom.

Owns `Fault`, how one is spelled, and the points of a run at which they wait. Invariant:
a fault happens once, in the one generation that it names, so that what it breaks can
be mended. How it is done is `deeds`' business. It needs no JAX.
"""

import dataclasses
import random
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["KINDS", "POINTS", "Fault", "FaultPoints", "parse_fault", "random_faults"]

KINDS = (
    "kill",
    "freeze",
    "host",
    "error",
    "exhaust",
    "slow",
    "corrupt",
    "drop",
    "delay",
    "supervisor",
)
"""SIGKILL; SIGSTOP; the agent with all processes and memory of its host; an exception;
no more memory (rlimit); half the speed; a byte of the newest snapshot; messages that
are lost, or late; SIGKILL for the supervisor."""

_EVENTS = {
    "forward": ("step", 0.3),
    "collective": ("step", 0.9),
    "snapshot": ("snapshot", 0.0),
    "reshard": ("reconfigure", 0.0),
    "save": ("checkpoint", 0.0),
    "eval": ("eval", 0.0),
    "compile": ("compile", 0.0),
    "join": ("join", 0.0),
    "restore": ("restore", 0.0),
}
# The event that begins there, and which part of a step's time goes by before it.
# XLA shows no more of a step than its beginning and its end.

POINTS = tuple(_EVENTS)
"""Where in a run a fault can wait; `join` and `restore` are parts of a recovery."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: One of `KINDS`.
        point: One of `POINTS`.
        step: Not before this step.
        process: Whom it hits: its index in the generation.
        generation: In which generation.
        after_s: Seconds after the point was reached; what is raised, is raised there.
    """

    kind: str
    point: str
    step: int = 0
    process: int = 0
    generation: int = 1
    after_s: float = 0.0

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        kind, point = fields.pop("kind"), fields.pop("point")
        return f"{kind}@{point}:" + ",".join(f"{k}={v}" for k, v in fields.items())


def parse_fault(text: str) -> Fault:
    """Reads `KIND@POINT[:step=N,process=N,generation=N,after_s=S]`.

    Raises:
        ConfigError: If it is spelled otherwise.

    Example:
        >>> parse_fault("kill@snapshot:step=7,process=2").step
        7
    """
    name, _, rest = text.partition(":")
    kind, _, point = name.partition("@")
    readers: Mapping[str, Callable[[str], Any]] = {
        "step": int,
        "process": int,
        "generation": int,
        "after_s": float,
    }
    try:
        if kind not in KINDS or point not in POINTS:
            raise ValueError
        fields = dict(part.split("=") for part in rest.split(",") if part)
        given: dict[str, Any] = {
            key: readers[key](value) for key, value in fields.items()
        }
        if any(not 0 <= value < 1e9 for value in given.values()):
            raise ValueError
        return Fault(kind=kind, point=point, **given)
    except (ValueError, KeyError):
        raise ConfigError(
            f"fault: expected KIND@POINT[:step=N,process=N,generation=N,after_s=S], "
            f"KIND one of {', '.join(KINDS)}, POINT one of {', '.join(POINTS)}; found "
            f"{text!r}"
        ) from None


def random_faults(
    seed: int,
    *,
    num_faults: int,
    mean_s: float,
    kinds: Sequence[str],
    num_processes: int,
) -> list[tuple[float, str, int]]:
    """Draws when what happens to whom; failures come as in a Poisson process.

    Args:
        seed: Of the draw.
        num_faults: How many.
        mean_s: The mean seconds between two.
        kinds: Which kinds there may be.
        num_processes: Of how many one is hit.

    Returns:
        Seconds from the beginning, kind and process, in the order of time.

    Example:
        >>> same = dict(num_faults=9, mean_s=9, kinds=["kill"], num_processes=4)
        >>> random_faults(0, **same) == random_faults(0, **same)
        True
    """
    rng, at_s, found = random.Random(seed), 0.0, []
    for _ in range(num_faults):
        at_s += rng.expovariate(1 / mean_s)
        found.append((at_s, rng.choice(list(kinds)), rng.randrange(num_processes)))
    return found


class FaultPoints:
    """Lets faults happen when a run gets to their points.

    Args:
        faults: Which.
        process: The index of this process.
        generation: The generation that it is of.
        do: Does a fault. It is called where the point is reached, or in a timer's
            thread if time is to go by first.

    Example:
        >>> fault = parse_fault("kill@save:step=3")
        >>> points = FaultPoints([fault], 0, 1, lambda fault: print(fault.kind))
        >>> points.begin("checkpoint", {"step": 2})
        >>> points.begin("checkpoint", {"step": 3})
        kill
        >>> points.begin("checkpoint", {"step": 4})
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        process: int,
        generation: int,
        do: Callable[[Fault], None],
    ) -> None:
        self._faults = [
            fault
            for fault in faults
            if (fault.process, fault.generation) == (process, generation)
        ]
        self._do, self._step, self._step_s = do, 0, 0.0

    def stepped(self, step: int, step_s: float) -> None:
        """Hears how long a step takes.

        Args:
            step: The next one.
            step_s: Seconds of the one before.
        """
        self._step, self._step_s = step, step_s

    def begin(self, name: str, fields: Mapping[str, Any] = types.MappingProxyType({})):
        """Hears that an event begins."""
        self._step = fields.get("step", self._step)
        for fault in list(self._faults):
            event, part = _EVENTS[fault.point]
            if event != name or self._step < fault.step:
                continue
            self._faults.remove(fault)
            is_raised = fault.kind in ("error", "exhaust")
            # An exception of a timer's thread would end nothing but that thread.
            wait_s = 0.0 if is_raised else fault.after_s + part * self._step_s
            if wait_s:
                timer = threading.Timer(wait_s, self._do, [fault])
                timer.daemon = True
                timer.start()
            else:
                self._do(fault)
