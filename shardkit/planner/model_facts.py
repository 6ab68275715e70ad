"""What is known of a model before it is placed anywhere.

Owns `ModelFacts`: the leaves of the state with the mesh axes that may cut them, and
the work of one microbatch by the axes that divide it. `reading` finds them; what they
cost on a mesh is said by `memory` and `cost`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardkit.mesh import GROUP_AXES
from shardkit.planner.ledger import Axes, Ledger

__all__ = ["Leaf", "ModelFacts"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the state.

    Attributes:
        path: Where it is.
        shape: Its shape.
        dtype: Its dtype.
        names: The logical axis of every dim; None if nothing was said.
        cuts: The mesh axis that cuts every dim, or None; each axis once.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    names: tuple[str | None, ...] | None
    cuts: tuple[str | None, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on one device that has all of it."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model, its optimizer and the shape of a microbatch.

    Attributes:
        params: The parameters.
        opt_state: What the optimizer keeps.
        model_state: What the model carries on beside its parameters.
        num_rows: The rows of the microbatch that was read.
        microbatch_bytes: Its bytes.
        num_outputs: How many sums a loss returns: loss, weight and metrics.
        work: What the loss and the gradient of one microbatch take.
        forward: What the loss alone takes.
        residuals: Axes → bytes that the backward pass keeps, parameters and the
            batch apart, on devices that cut them along these axes.
        peak_bytes: What is alive at the peak of the gradient of a microbatch on one
            device, beside parameters, the batch and the gradient itself: an estimate.
        known_peaks: Sizes of the axes of a group, in the order of `GROUP_AXES` → the
            same on a device of such a group, as a compiler says it.
        num_norm_leaves: How many leaves that `fsdp` cuts an update sums up wholly, as
            norms do; a leaf counts once for each of them.
        num_clip_leaves: How many of these sums are of squares of the gradient itself,
            as clipping has them: shardkit's own norm has the same.
        divisors: Axis → what its size has to divide; 1 for one without use.
        notes: What is worth knowing: names left whole, operations not followed.
    """

    params: tuple[Leaf, ...]
    opt_state: tuple[Leaf, ...]
    model_state: tuple[Leaf, ...]
    num_rows: int
    microbatch_bytes: int
    num_outputs: int
    work: Ledger
    forward: Ledger
    residuals: Mapping[Axes, float]
    peak_bytes: float
    num_norm_leaves: int
    num_clip_leaves: int
    divisors: Mapping[str, int]
    known_peaks: Mapping[tuple[int, ...], float] = dataclasses.field(
        default_factory=dict
    )
    notes: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        """How many parameters there are."""
        return sum(math.prod(leaf.shape) for leaf in self.params)

    def with_rows(self, num_rows: int) -> "ModelFacts":
        """The same with microbatches of another number of rows, to scale."""
        factor = num_rows / self.num_rows
        return dataclasses.replace(
            self,
            num_rows=num_rows,
            microbatch_bytes=round(self.microbatch_bytes * factor),
            work=self.work.scaled(factor),
            forward=self.forward.scaled(factor),
            residuals={axes: n * factor for axes, n in self.residuals.items()},
            peak_bytes=self.peak_bytes * factor,
            known_peaks={n: size * factor for n, size in self.known_peaks.items()},
        )

    def with_peak(self, group: Mapping[str, int], peak_bytes: float) -> "ModelFacts":
        """The same, with what a compiler said of a microbatch of such a group."""
        sizes = tuple(group.get(axis, 1) for axis in GROUP_AXES)
        peaks = {**self.known_peaks, sizes: peak_bytes}
        return dataclasses.replace(self, known_peaks=peaks)

    @property
    def residual_bytes(self) -> float:
        """What the backward pass keeps of a microbatch on a single device."""
        return sum(self.residuals.values())

    def state_bytes(self, part: str) -> int:
        """The bytes of `"params"`, `"opt_state"` or `"model_state"`, once."""
        return sum(leaf.num_bytes for leaf in getattr(self, part))
