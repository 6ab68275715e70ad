"""What is known of a step, fetched late.

Owns `StepMetrics`, whose values stay on the devices until somebody reads them, and
`Pending`, which holds a step back until the next one is under way.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax import Array

from shardkit.errors import NonFiniteError
from shardkit.mesh import device_ids, mesh_sizes
from shardkit.placement import Placement

__all__ = ["Pending", "StepMetrics"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What is known of one step; values are fetched from the devices when read.

    Attributes:
        step: Which step, counted from 0.
        num_devices: On how many devices it ran.
        mesh: Axis → size, of the axes larger than 1.
        values: Scalars by name, as they are on the devices.
        step_s: Seconds from when the host saw the end of the step before to when it
            saw the end of this one, while steps follow one another. None where other
            work came before or after the step: a start, a change of devices, a
            compilation, an evaluation, a save, the end.
        device_ids: Of these devices, in the order of the mesh; none if not known.
    """

    step: int
    num_devices: int
    mesh: dict[str, int]
    values: Mapping[str, Array]
    step_s: float | None
    device_ids: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """Σ loss_sum / Σ weight over the global batch."""
        return float(self.values["loss"])

    @property
    def loss_bits(self) -> str:
        """The float32 bits of the loss, as 8 hex digits."""
        return f"{np.asarray(self.values['loss']).view(np.uint32).item():08x}"

    @property
    def tokens_per_s(self) -> float | None:
        """Σ weight per second: tokens, where the loss counts tokens; or None."""
        return float(self.values["weight"]) / self.step_s if self.step_s else None

    @property
    def metrics(self) -> dict[str, float]:
        """Everything else that was measured, by name."""
        return {k: float(v) for k, v in self.values.items() if k != "loss"}


class Pending:
    """Holds a step back until the next one is on its way, so that no one waits."""

    def __init__(self, *, check_gradients: bool) -> None:
        self._check_gradients = check_gradients
        self._held: list[tuple[int, Placement, Any]] = []
        self._last_s: float | None = None

    def push(
        self, step: int, placement: Placement, values: Any
    ) -> Iterator[StepMetrics]:
        """Takes a step that has been dispatched; yields the one before it."""
        self._held.append((step, placement, values))
        if len(self._held) > 1:
            metrics = self._finish()
            now_s = time.monotonic()
            spent_s = None if self._last_s is None else now_s - self._last_s
            self._last_s = now_s
            yield dataclasses.replace(metrics, step_s=spent_s)

    def flush(self) -> Iterator[StepMetrics]:
        """Waits for what is held back, and yields it; other work may follow.

        How long that takes says nothing: what dispatches may have waited already.
        """
        self._last_s = None
        while self._held:
            yield self._finish()

    def _finish(self) -> StepMetrics:
        step, placement, values = self._held.pop(0)
        loss = float(values["loss"])
        # A scale that is too large breaks gradients only: no loss scale mends a loss.
        norm = float(values["grad_norm"])
        if not np.isfinite(loss) or (self._check_gradients and not np.isfinite(norm)):
            raise NonFiniteError(
                f"step {step}: the loss is {loss} and the gradient's norm {norm}. "
                "What is saved is from before it; "
                "lower the learning rate, clip the gradient, or look at this batch."
            )
        return StepMetrics(
            step=step,
            num_devices=placement.num_devices,
            mesh=mesh_sizes(placement.mesh),
            values=values,
            step_s=None,
            device_ids=device_ids(placement.mesh),
        )
