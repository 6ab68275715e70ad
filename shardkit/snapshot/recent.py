"""What is known of the last steps, kept with the snapshot of the state after them.

Owns what an image says of the steps before it, from which the next processes tell what
those before had no time to. Invariants: a number comes back as the very number that it
was, one that is not finite too; what has no room is left out, and no snapshot fails for
it. Which steps were told already is known to whoever keeps the record.
"""

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

__all__ = ["NUM_RECENT", "LastStep", "RecentSteps"]

NUM_RECENT = 4
"""A step is told when the next one is under way, and the state after that one can be
in a snapshot before it is: two are untold at most."""

_KEY = "recent"


class _Values(Protocol):
    """What is read of a step: `StepMetrics` has it."""

    @property
    def step(self) -> int: ...
    @property
    def loss_bits(self) -> str: ...
    @property
    def num_devices(self) -> int: ...
    @property
    def mesh(self) -> Mapping[str, int]: ...
    @property
    def values(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastStep:
    """A step that an earlier process did, told by another one.

    Attributes:
        step: Which, counted from 0.
        loss_bits: The float32 bits of its loss, as 8 hex digits.
        num_devices: On how many devices it ran.
        mesh: Axis → size, of the axes larger than 1.
        metrics: Everything else that was measured, by name.
        step_s: Seconds that it took, which nobody knows any more.
        tokens_per_s: Neither.

    Example:
        >>> step = LastStep(
        ...     step=7, loss_bits="7f800000", num_devices=2, mesh={"fsdp": 2},
        ...     metrics={"grad_norm": 0.1})
        >>> LastStep.from_json(step.to_json()) == step, step.loss
        (True, inf)
    """

    step: int
    loss_bits: str
    num_devices: int
    mesh: dict[str, int]
    metrics: dict[str, float]
    step_s: None = None
    tokens_per_s: None = None

    @property
    def loss(self) -> float:
        """The loss, of its bits."""
        return struct.unpack(">f", bytes.fromhex(self.loss_bits))[0]

    @classmethod
    def of(cls, metrics: _Values) -> "LastStep":
        """Fetches what is known of a step: its scalars, and no more.

        Args:
            metrics: The step; waits until it is computed.
        """
        values = {n: x for n, x in metrics.values.items() if n != "loss"}
        found = {name: _scalar(value) for name, value in values.items()}
        return cls(
            step=metrics.step,
            loss_bits=metrics.loss_bits,
            num_devices=metrics.num_devices,
            mesh=dict(metrics.mesh),
            metrics={name: x for name, x in found.items() if x is not None},
        )

    def to_json(self, room_bytes: float = math.inf) -> dict[str, Any]:
        """Returns it as JSON values, numbers in hexadecimal.

        Args:
            room_bytes: How long it may be as JSON; metrics beyond that are left out.
        """
        record: dict[str, Any] = {
            "step": self.step,
            "loss_bits": self.loss_bits,
            "num_devices": self.num_devices,
            "mesh": self.mesh,
            "metrics": {},
        }
        used = _num_bytes(record)
        for name, value in self.metrics.items():
            text = value.hex()
            more = _num_bytes({name: text})
            if used + more <= room_bytes:
                record["metrics"][name] = text
                used += more
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "LastStep":
        """Reads what `to_json` made."""
        found = {name: float.fromhex(x) for name, x in record["metrics"].items()}
        return cls(**{**record, "metrics": found})


class RecentSteps:
    """The last steps of a run, whichever of its processes did them.

    Values stay on the devices until they are wanted.

    Args:
        room_bytes: How long what is said of them may be, as JSON.

    Example:
        >>> recent = RecentSteps(1000)
        >>> recent.learn({"recent": [{"step": 7}, {"step": 8}]})
        >>> recent.before(8)()
        {'recent': [{'step': 7}]}
    """

    def __init__(self, room_bytes: int) -> None:
        self._each_bytes = (room_bytes - _num_bytes({_KEY: []})) // NUM_RECENT - 1
        self._steps: dict[int, Callable[[], dict[str, Any]]] = {}

    def add(self, metrics: _Values) -> None:
        """Notes a step, which may still be computed."""
        # What comes after it in a run that has gone back is done again.
        near = range(metrics.step - NUM_RECENT + 1, metrics.step)
        self._steps = {step: self._steps[step] for step in near if step in self._steps}
        read = functools.partial(_read, metrics, self._each_bytes)
        self._steps[metrics.step] = functools.cache(read)

    def learn(self, meta: Mapping[str, Any]) -> None:
        """Notes the steps of which an image tells."""
        for record in meta.get(_KEY, ()):
            self._steps.setdefault(record["step"], functools.partial(dict, record))

    def before(self, step: int) -> Callable[[], dict[str, Any]]:
        """Returns what makes the `meta` of a state's image.

        Args:
            step: The step that the state stands before. Its metrics are waited for
                when the result is called, in any thread.
        """
        last = [
            self._steps[k] for k in range(step - NUM_RECENT, step) if k in self._steps
        ]
        return lambda: {_KEY: [record for read in last if (record := read())]}

    def clear(self) -> None:
        """Forgets them, since the run goes on from elsewhere."""
        self._steps = {}


def _read(metrics: _Values, room_bytes: int) -> dict[str, Any]:
    """Returns the record of a step; an empty one if there is none that fits."""
    try:
        record = LastStep.of(metrics).to_json(room_bytes)
    except RuntimeError:
        # The devices that did it are gone, which is no trouble of this state's image.
        return {}
    return record if _num_bytes(record) <= room_bytes else {}


def _scalar(value: Any) -> float | None:
    """Returns a number as it will be told; None for what is not one."""
    if np.shape(value) or np.iscomplexobj(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _num_bytes(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")))
