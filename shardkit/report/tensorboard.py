"""Scalars for TensorBoard, through the optional package tensorboardX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardkit.report.jsonl import StepLike, phase_ms

__all__ = ["TensorBoard"]

_FLUSH_S = 1
"""What is younger than this is lost with a process that is killed."""


class TensorBoard:
    """Writes event files.

    Args:
        directory: Where they go.
        first_step: Where this process begins; what an earlier one wrote of that step
            and later ones is hidden.

    Raises:
        ImportError: If tensorboardX is not installed.
    """

    def __init__(self, directory: Path, first_step: int = 0):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            logdir=str(directory), purge_step=first_step or None, flush_secs=_FLUSH_S
        )

    def step(self, metrics: StepLike) -> None:
        """Writes the scalars of a step."""
        scalars = {
            "train/loss": metrics.loss,
            "devices/count": metrics.num_devices,
            **{f"train/{name}": value for name, value in metrics.metrics.items()},
        }
        times = {"step_s": metrics.step_s, "tokens_per_s": metrics.tokens_per_s}
        scalars |= {f"time/{k}": v for k, v in times.items() if v is not None}
        self._write(scalars, metrics.step)

    def evaluation(self, step: int, loss: float) -> None:
        """Writes the loss of an evaluation."""
        self._write({"eval/loss": loss}, step)

    def reconfigure(self, fields: Mapping[str, Any], spent_s: float) -> None:
        """Writes how long a change of devices took, and each of its phases.

        Args:
            fields: What the event `reconfigure` has.
            spent_s: The seconds of it all.
        """
        times = {**phase_ms(fields["phases"]), "total": 1e3 * spent_s}
        scalars = {f"reconfigure/{name}_ms": ms for name, ms in times.items()}
        scalars["reconfigure/bytes_moved"] = fields["bytes_moved"]
        scalars["reconfigure/was_ready"] = float(fields["was_ready"])
        self._write(scalars, fields["step"])

    def first_step(self, step: int, spent_s: float) -> None:
        """Writes how long the first step after a change took."""
        self._write({"reconfigure/first_step_ms": 1e3 * spent_s}, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def _write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
