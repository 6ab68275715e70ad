"""What stayed identical between a run and its uninterrupted twin.

Compares what both have written, bit by bit; it runs nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any

from shardkit.report.jsonl import groups_met, read_records
from shardkit.report.run_dir import RunDirectory

__all__ = ["TwinComparison", "compare_runs"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TwinComparison:
    """Two runs side by side.

    Attributes:
        num_steps: Steps that both should have.
        differing_steps: Those whose loss differs in any bit, or stands in one only.
        same_digest: Whether the final states are the same; None where the runs ended
            at different steps.
        same_eval: The same of the validation losses; None where there are none.
        is_promised: Whether nothing should differ: groups of devices that compute a
            microbatch together were as large in both, throughout.
    """

    num_steps: int
    differing_steps: list[int]
    same_digest: bool | None
    same_eval: bool | None
    is_promised: bool = True

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differing_steps and False not in (
            self.same_digest,
            self.same_eval,
        )

    def rows(self) -> dict[str, str]:
        """Returns what to show of it."""
        losses = f"all {self.num_steps} identical, to the bit"
        if self.differing_steps:
            losses = (
                f"{len(self.differing_steps)} of {self.num_steps} DIFFER, "
                f"the first at step {self.differing_steps[0]}"
            )
        rows = {
            "losses": losses,
            "state digest": _verdict(self.same_digest),
            "validation loss": _verdict(self.same_eval),
        }
        if not self.is_promised:
            rows["promised"] = "equal to rounding: groups of devices differ in size"
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for `summary.json`."""
        return {**asdict(self), "identical": self.identical}


def compare_runs(run: RunDirectory, twin: RunDirectory) -> TwinComparison:
    """Compares two finished runs."""
    ours, theirs = run.summary(), twin.summary()
    num_steps = min(ours["steps"], theirs["steps"])
    bits, other_bits = _loss_bits(run), _loss_bits(twin)
    differing = [
        step
        for step in range(num_steps)
        if step not in bits or bits[step] != other_bits.get(step)
    ]
    ended_together = ours["steps"] == theirs["steps"]

    def same(name: str) -> bool | None:
        comparable = ended_together and ours[name] is not None
        return ours[name] == theirs[name] if comparable else None

    return TwinComparison(
        num_steps=num_steps,
        differing_steps=differing,
        same_digest=same("state_digest"),
        same_eval=same("eval_loss"),
        is_promised=len(groups_met(_steps(run) + _steps(twin))) < 2,
    )


def _loss_bits(run: RunDirectory) -> dict[int, str]:
    return {r["step"]: r["loss_bits"] for r in _steps(run)}


def _steps(run: RunDirectory) -> list[dict[str, Any]]:
    return [r for r in read_records(run.metrics) if "event" not in r]


def _verdict(same: bool | None) -> str:
    return {True: "identical", False: "DIFFERS", None: "not compared"}[same]
