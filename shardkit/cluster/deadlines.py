"""How long anything in a cluster may take: the one hierarchy of timeouts.

Owns every time limit and the order between them. Invariant: an inner wait ends, and
says what it waited for, before an outer one gives up on the whole; `check` refuses
numbers for which that would not hold. Nothing here waits.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["ENVIRONMENT", "PHASES", "Deadlines"]

ENVIRONMENT = "SHARDKIT_DEADLINES"
"""The variable by which a worker knows them before it has reached anybody."""

PHASES = ("start", "restore", "compile", "step", "snapshot", "eval", "save")
"""What a worker can be busy with; each has a window of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deadlines:
    """Every time limit of a cluster, in seconds, from the inside to the outside.

    Attributes:
        heartbeat_s: How often agents and workers say that they are there.
        grace_s: After a crash, for the other processes to end by themselves, so that
            the first of them can be told from those that only missed it.
        silence_s: An agent that was not heard for so long is gone, and its host lost.
        connect_s: To reach somebody and to prove to know the token.
        request_s: To answer a question that needs no work.
        end_s: To end the processes of a generation, from the order to its confirmation.
        restart_s: For a supervisor that died to be there again.
        step_floor_s: The shortest window in which a step has to end.
        step_factor: The window of a step, in measured steps.
        mute_s: A worker whose process was not heard for so long is frozen, whatever
            it was doing; only a stopped process or a held interpreter lock is so.
        form_s: For all hosts that are there to have their workers ready; then those
            that are go on alone.
        slot_s: For memory to write the next snapshot into.
        halt_s: To agree on a step to halt at, and to come there.
        meet_s: For the processes of a generation to hear where the run is kept, and
            once more to find one another in JAX.
        start_s: From a worker's first line to waiting in `join`, and from an assignment
            to the first word of what it does.
        restore_s: To have the state of a snapshot on the devices.
        snapshot_s: To copy a snapshot, before a step was measured.
        save_s: To save a checkpoint.
        eval_s: To evaluate.
        compile_s: To compile a program.
        first_step_s: From an assignment to the end of its first step.
        exit_s: From the end of a run to the end of its processes.
        orphan_s: An agent that has no supervisor for so long ends all it has.
        leave_s: To save and leave, once asked to.
        wait_s: For enough devices to be there again.
    """

    heartbeat_s: float = 0.25
    grace_s: float = 0.3
    silence_s: float = 3.0
    connect_s: float = 5.0
    request_s: float = 10.0
    end_s: float = 8.0
    restart_s: float = 20.0
    step_floor_s: float = 10.0
    step_factor: float = 10.0
    mute_s: float = 60.0
    form_s: float = 60.0
    slot_s: float = 60.0
    halt_s: float = 60.0
    meet_s: float = 60.0
    start_s: float = 180.0
    restore_s: float = 600.0
    snapshot_s: float = 120.0
    save_s: float = 900.0
    eval_s: float = 1800.0
    compile_s: float = 1800.0
    first_step_s: float = 3600.0
    exit_s: float = 60.0
    orphan_s: float = 120.0
    leave_s: float = 1200.0
    wait_s: float = 600.0

    def check(self) -> "Deadlines":
        """Returns itself, if every wait ends before the one around it.

        Raises:
            ConfigError: With all pairs that are in the wrong order.

        Example:
            >>> Deadlines(silence_s=30).check()
            Traceback (most recent call last):
            ...
            shardkit.errors.ConfigError: deadlines: 3 in the wrong order:
              silence_s = 30 must be below end_s = 8.0
              silence_s = 30 must be below step_floor_s = 10.0
              silence_s = 30 must be below restart_s = 20.0
            Each wait must end before the one around it gives up.
        """
        values = dataclasses.asdict(self)
        bad = [
            f"{name} = {value!r} must be a number above 0"
            for name, value in values.items()
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ]
        if not bad:
            bad = [
                f"{inner} = {values[inner]!r} must be below {outer} = {values[outer]!r}"
                for inner, outer in _ORDER
                if values[inner] >= values[outer]
            ]
            if self.heartbeat_s * 4 > self.silence_s:
                bad.append(
                    f"heartbeat_s = {self.heartbeat_s!r} must be at most a quarter of "
                    f"silence_s = {self.silence_s!r}"
                )
            if self.meet_s * 2 >= self.start_s:
                bad.append(
                    f"meet_s = {self.meet_s!r} must be below half of start_s = "
                    f"{self.start_s!r}"
                )
            if self.step_factor < 2:
                bad.append(f"step_factor = {self.step_factor!r} must be at least 2")
        if bad:
            lines = "\n  ".join(bad)
            raise ConfigError(
                f"deadlines: {len(bad)} in the wrong order:\n  {lines}\n"
                "Each wait must end before the one around it gives up."
            )
        return self

    def window_s(self, phase: str, step_s: float | None) -> float:
        """Returns for how long a worker may be silent.

        Args:
            phase: What it was last heard to do.
            step_s: What a step takes, if that is known.

        Example:
            >>> Deadlines().window_s("step", 2.5), Deadlines().window_s("save", 2.5)
            (25.0, 900.0)
        """
        # A step was measured with the copy of its snapshot.
        if phase in ("step", "snapshot") and step_s is not None:
            return max(self.step_floor_s, self.step_factor * step_s)
        # Before that, what it does first may still compile something.
        return getattr(self, "restore_s" if phase == "step" else f"{phase}_s")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Deadlines":
        """Makes deadlines of what differs from the defaults, and checks them.

        Raises:
            ConfigError: For a name that is none, or numbers that cannot be.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(
                f"deadlines: {', '.join(unknown)} unknown; known: "
                f"{', '.join(sorted(known))}"
            )
        return cls(**values).check()

    def spell(self) -> str:
        """Writes what differs from the defaults, for `of_environment`."""
        default = dataclasses.asdict(Deadlines())
        values = dataclasses.asdict(self)
        return json.dumps({x: s for x, s in values.items() if s != default[x]})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Deadlines":
        """Reads those of the run that started this process.

        Raises:
            ConfigError: If they cannot be.

        Example:
            >>> text = Deadlines(meet_s=90, start_s=240).spell()
            >>> Deadlines.of_environment({ENVIRONMENT: text}).meet_s
            90
        """
        text = environment.get(ENVIRONMENT, "{}")
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{ENVIRONMENT}: expected a JSON object, found {text!r}")
        return cls.read(values)


_ORDER = (
    ("grace_s", "silence_s"),
    ("silence_s", "end_s"),
    ("silence_s", "step_floor_s"),
    ("silence_s", "restart_s"),
    ("end_s", "form_s"),
    ("request_s", "slot_s"),
    ("restart_s", "slot_s"),
    ("restart_s", "halt_s"),
    ("restart_s", "orphan_s"),
    ("step_floor_s", "form_s"),
    ("step_floor_s", "mute_s"),
    ("meet_s", "compile_s"),
    ("form_s", "first_step_s"),
    ("start_s", "first_step_s"),
    ("restore_s", "first_step_s"),
    ("compile_s", "first_step_s"),
    ("halt_s", "leave_s"),
    ("save_s", "leave_s"),
    ("form_s", "wait_s"),
)
