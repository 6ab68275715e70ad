"""What two runs have in common, bit by bit.

Owns the comparison of the steps that both have and the verdict on it. Its invariant: a
loss is the same if its bits are. Whether two runs should agree is `promises.py`'s
business, and a run beside its own twin is `twin.py`'s.
"""

import dataclasses
from typing import Any

from shardkit.report.promises import Reason, reasons_to_differ
from shardkit.report.stored_run import StoredRun

__all__ = ["Comparison", "compare_stored"]

_MOST_REASONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two runs side by side.

    Attributes:
        num_common: Steps that both have.
        first_differing: The first of them whose losses differ in any bit; None if none.
        num_differing: How many do.
        largest_difference: Of two finite losses of one step; None if there are none.
        largest_step: That step.
        same_digest: Whether the final states are the same; None where the runs have not
            ended at the same step.
        same_evals: Whether all validation losses of the same steps are; None where
            there are none, or they are of different batches.
        reasons: What lets the runs differ; empty if they should agree.
    """

    num_common: int
    first_differing: int | None
    num_differing: int
    largest_difference: float | None
    largest_step: int | None
    same_digest: bool | None
    same_evals: bool | None
    reasons: list[Reason]

    @property
    def identical(self) -> bool:
        """Whether nothing that was compared differs."""
        same = (self.same_digest, self.same_evals)
        return self.first_differing is None and False not in same

    @property
    def is_compared(self) -> bool:
        """Whether there was anything to compare."""
        return self.num_common > 0 or self.same_digest is not None

    @property
    def is_wrong(self) -> bool:
        """Whether the runs differ, though they should agree."""
        return self.is_compared and not self.identical and not self.reasons

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        listed = ", ".join(map(str, self.reasons[:_MOST_REASONS]))
        more = len(self.reasons) - _MOST_REASONS
        listed += f" and {more} more" if more > 0 else ""
        if not self.is_compared:
            return "nothing to compare: they have no step in common"
        if self.identical:
            if self.reasons:
                return f"identical, though nothing promises it: {listed}"
            return "identical, as they should be"
        what = "differ"
        if self.first_differing is not None:
            what = f"differ from step {self.first_differing}"
        elif self.same_digest is False:
            what = "have the same losses and differ in their final states"
        elif self.same_evals is False:
            what = "have the same losses and differ in validation losses"
        if self.reasons:
            return f"{what}, as expected: {listed}"
        return f"{what}, though they should agree"

    def rows(self) -> dict[str, str]:
        """Returns what to show of it."""
        losses = "no step in common"
        if self.num_common:
            steps = "step" if self.num_common == 1 else "steps"
            losses = f"all bits of {self.num_common} {steps} are the same"
        if self.num_differing:
            losses = f"{self.num_differing} of {self.num_common} steps differ"
            if self.largest_difference is not None:
                losses += f", at most by {self.largest_difference:.3g}"
                losses += f" (step {self.largest_step})"
        words = {True: "the same", False: "DIFFERS", None: "not compared"}
        return {
            "verdict": self.verdict,
            "losses": losses,
            "final state": words[self.same_digest],
            "validation": words[self.same_evals],
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return {
            **dataclasses.asdict(self),
            "identical": self.identical,
            "should_agree": not self.reasons,
            "verdict": self.verdict,
        }


def compare_stored(a: StoredRun, b: StoredRun) -> Comparison:
    """Compares two runs, finished or not, as far as both have got."""
    ours, theirs = ({r["step"]: r for r in run.steps} for run in (a, b))
    common = sorted(ours.keys() & theirs.keys())
    differing = [s for s in common if ours[s]["loss_bits"] != theirs[s]["loss_bits"]]
    gaps = {
        step: abs(ours[step]["loss"] - theirs[step]["loss"])
        for step in differing
        if None not in (ours[step]["loss"], theirs[step]["loss"])
    }
    largest = max(gaps, key=lambda step: gaps[step], default=None)
    return Comparison(
        num_common=len(common),
        first_differing=differing[0] if differing else None,
        num_differing=len(differing),
        largest_difference=None if largest is None else gaps[largest],
        largest_step=largest,
        same_digest=_same_digest(a, b),
        same_evals=_same_evals(a, b),
        reasons=reasons_to_differ(a, b),
    )


def _same_digest(a: StoredRun, b: StoredRun) -> bool | None:
    ends = [
        (run.summary.get("steps"), run.summary.get("state_digest")) for run in (a, b)
    ]
    if None in (*ends[0], *ends[1]) or ends[0][0] != ends[1][0]:
        return None
    return ends[0][1] == ends[1][1]


def _same_evals(a: StoredRun, b: StoredRun) -> bool | None:
    if a.config.train.eval_batches != b.config.train.eval_batches:
        return None
    ours, theirs = (
        {r["step"]: r["loss"] for r in run.records if r.get("event") == "eval"}
        for run in (a, b)
    )
    common = ours.keys() & theirs.keys()
    return all(ours[step] == theirs[step] for step in common) if common else None
