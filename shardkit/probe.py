"""How fast this process computes, measured between its steps.

Owns the measurement and when it is made. The collectives of a step hide who waits for
whom, so a small program of this process alone is timed in its place. Invariants: it
runs in the main thread, when the step before is done and the next one is not begun; it
shares neither arrays nor collectives with training, so that it enters no bit and can
hold nobody up for long; and it takes a small part of the time only. What follows from
it is the supervisor's business.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Float, Int

from shardkit.placement import Placement
from shardkit.program import Program

__all__ = ["SpeedProbe"]

_PART = 0.01
"""Of the time, at most."""
_NUM_ROUNDS = 64
"""10 to 20 ms on a core. As many for all: what stops a process for some milliseconds
now and then is seldom met by less, which would seem to be done by a faster one."""
_FIRST_EVERY = 4
_CPU_SIZE, _SIZE = 128, 2048
_NUM_PRODUCTS = 8


class SpeedProbe:
    """Times a fixed amount of work on the devices of this process, now and then.

    It is for one thread. What is compiled is compiled when it is made.

    Args:
        devices: Those of this process.
        part: Which part of the time it may take.
        clock_s: What time it is, in seconds.
        load: Makes what is timed on a device: called with a number of rounds, it
            begins them and returns what is there when they are done.

    Attributes:
        facts: What was measured last, as `Member.progress` takes it: `work`, how many
            microbatches the devices of this process have in a step, each those of its
            group; `busy_s`, how long so many rounds
            took, shared among its devices; `busy_step`, before which step. Empty until
            something was.

    Example:
        >>> probe = SpeedProbe(jax.local_devices()[:1])
        >>> probe.facts
        {}
    """

    def __init__(
        self,
        devices: Sequence[Any],
        *,
        part: float = _PART,
        clock_s: Callable[[], float] = time.perf_counter,
        load: Callable[[Any], Callable[[int], Any]] | None = None,
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._part, self._clock_s = part, clock_s
        self._loads = {device.id: (load or _Load)(device) for device in devices}
        self._every = _FIRST_EVERY
        self._last: tuple[int, float] | None = None
        self._time(list(self._loads))

    def __call__(self, step: int, placement: Placement, state: Any) -> None:
        """Measures, if it is time to; to be called before every step.

        Args:
            step: The step that is next.
            placement: Where.
            state: What it starts from; it may still be computed, and is waited for,
                since a time that begins before says how much was left to do.
        """
        start_s = self._clock_s()
        if self._last is None:
            self._last = (step, start_s)
        if step % self._every or step <= self._last[0]:
            return
        jax.block_until_ready(state)
        begin_s = self._clock_s()
        step_s = (begin_s - self._last[1]) / (step - self._last[0])
        counts = placement.grid.counts
        groups = placement.mesh.devices.reshape(len(counts), -1)
        mine = [
            (device.id, int(count))
            for group, count in zip(groups, counts, strict=True)
            for device in group
            if device.id in self._loads
        ]
        if not mine:
            # Devices that do not fill a group stay idle.
            return
        spent_s = self._time([id for id, _ in mine])
        # Who has nothing to do would never be seen to be quick again.
        work = max(1, sum(count for _, count in mine))
        busy_s = spent_s / _NUM_ROUNDS * work / len(mine)
        self.facts = {"busy_s": busy_s, "work": work, "busy_step": step}
        self._last = (step, self._clock_s())
        # Every process steps in the same time, but none knows what others have found:
        # with powers of two they measure together all the same, and wait once.
        self._every = 1
        while self._every * step_s * self._part < self._last[1] - begin_s:
            self._every *= 2

    def _time(self, devices: Sequence[int]) -> float:
        """Returns how many seconds the rounds take, on all of some devices at once."""
        loads = [self._loads[id] for id in devices]
        # Devices do in order what they are given: what others have left goes first.
        jax.block_until_ready([load(0) for load in loads])
        start_s = self._clock_s()
        jax.block_until_ready([load(_NUM_ROUNDS) for load in loads])
        return self._clock_s() - start_s


class _Load:
    """Products of matrices on one device."""

    def __init__(self, device: Any) -> None:
        is_cpu = device.platform == "cpu"
        size = _CPU_SIZE if is_cpu else _SIZE
        rng = np.random.default_rng(0)
        # As large as for the values neither to vanish nor to become all alike.
        weights = rng.normal(scale=2 / size**0.5, size=(2, size, size))
        weights = weights.astype(np.float32 if is_cpu else jnp.bfloat16)
        self._sharding = SingleDeviceSharding(device)
        self._matrices = jax.device_put(weights, self._sharding)
        self._counts: dict[int, Array] = {}
        program = Program(_multiply, name="speed", exact=False)
        self._program = program.compile(self._matrices, self._count(0))

    def __call__(self, num_rounds: int) -> Array:
        return self._program(self._matrices, self._count(num_rounds))

    def _count(self, num_rounds: int) -> Array:
        if num_rounds not in self._counts:
            count = jax.device_put(np.int32(num_rounds), self._sharding)
            self._counts[num_rounds] = jax.block_until_ready(count)
        return self._counts[num_rounds]


def _multiply(
    matrices: Float[Array, "2 size size"], num_rounds: Int[Array, ""]
) -> Float[Array, "size size"]:
    def product(_: Any, x: Array) -> Array:
        return jnp.tanh(x @ matrices[1])

    # A device looks only after several products whether it is to go on.
    return lax.fori_loop(
        0,
        num_rounds,
        lambda _, x: lax.fori_loop(0, _NUM_PRODUCTS, product, x),
        matrices[0],
    )
