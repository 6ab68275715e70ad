"""What the report of a run shows, apart from how it looks.

Owns the choice of facts, curves, marks and words. Its invariant: every number in it is
one of the run's own, or an average that says so; nothing is made up for what was not
recorded. It writes no markup.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from shardkit.config import to_toml
from shardkit.report.layout_file import Leaf
from shardkit.report.page_events import (
    Mark,
    Timeline,
    certificates,
    marks,
    timelines,
)
from shardkit.report.stored_run import MeshStay, StoredRun
from shardkit.report.terminal import format_mesh, format_time
from shardkit.report.thin import Point, smoothed, thin

__all__ = ["PageData", "page_data"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """All that a report says.

    Attributes:
        title: What to call the run.
        state: How far it is, in a word or two.
        is_finished: Whether that is all the way.
        facts: Name, value and remark.
        details: Name and value of what is looked up rather than looked at.
        steps: The first and the last step that are drawn.
        losses: Step and loss.
        means: The same, averaged.
        evals: Step and validation loss.
        step_ms: Step and how long it took.
        rates: Step and how much of the data it did in a second.
        rate_unit: Of what.
        num_devices: Step and device count, where that changes.
        stays: On which meshes the steps ran.
        marks: What happened.
        timelines: What changes and recoveries took.
        certificates: What was proven of each change; whether it was, and in words.
        leaves: Of the state; None where that was not recorded.
        config: The resolved config, as TOML.
    """

    title: str
    state: str
    is_finished: bool
    facts: list[tuple[str, str, str]]
    details: list[tuple[str, str]]
    steps: tuple[int, int]
    losses: list[Point]
    means: list[Point]
    evals: list[Point]
    step_ms: list[Point]
    rates: list[Point]
    rate_unit: str
    num_devices: list[tuple[int, int]]
    stays: list[MeshStay]
    marks: list[Mark]
    timelines: list[Timeline]
    certificates: list[tuple[bool | None, str]]
    leaves: list[Leaf] | None
    config: str


def page_data(run: StoredRun) -> PageData:
    """Gathers what there is to say of a run."""
    steps, stays = run.steps, run.stays()
    losses: list[Point] = [(r["step"], r.get("loss")) for r in steps]
    times: list[Point] = [(r["step"], _ms(r)) for r in steps]
    rates, unit = _rates(run)
    ends = (steps[0]["step"], steps[-1]["step"]) if steps else (0, 0)
    counts: list[tuple[int, int]] = []
    for stay in stays:
        if not counts or counts[-1][1] != len(stay.device_ids):
            counts.append((stay.first, len(stay.device_ids)))
    end = run.config.train.steps
    return PageData(
        title=run.name,
        state="finished" if run.is_finished else f"{run.num_steps} of {end} steps",
        is_finished=run.is_finished,
        facts=list(_facts(run, stays, times, rates, unit)),
        details=list(_details(run)),
        steps=ends,
        losses=thin(losses),
        means=smoothed(losses),
        evals=thin([(r["step"], r["loss"]) for r in run.of_kind("eval")]),
        step_ms=thin(times),
        rates=thin(rates),
        rate_unit=unit,
        num_devices=counts,
        stays=stays,
        marks=marks(run),
        timelines=[*timelines(run)],
        certificates=[*certificates(run)],
        leaves=run.leaves,
        config=to_toml(run.config),
    )


def _ms(record: Mapping[str, Any]) -> float | None:
    spent_s = record.get("step_s")
    return None if not spent_s else 1e3 * spent_s


def _rates(run: StoredRun) -> tuple[list[Point], str]:
    """Returns what the loss weighs in a second: tokens, or where it is a mean, rows."""
    rows = run.config.data.rows
    timed = [r for r in run.steps if r.get("step_s") and r.get("tokens_per_s")]
    is_text = run.config.data.factory == "text"
    weights = [(r["step"], round(r["tokens_per_s"] * r["step_s"])) for r in timed]
    if is_text or (weights and all(weight > rows(step) for step, weight in weights)):
        return [(r["step"], r.get("tokens_per_s")) for r in run.steps], "tokens"
    return [
        (r["step"], rows(r["step"]) / r["step_s"] if r.get("step_s") else None)
        for r in run.steps
    ], "examples"


def _facts(
    run: StoredRun,
    stays: list[MeshStay],
    times: list[Point],
    rates: list[Point],
    unit: str,
) -> Iterator[tuple[str, str, str]]:
    steps, summary = run.steps, run.summary
    yield "steps", f"{run.num_steps:,}", f"of {run.config.train.steps:,}"
    if steps:
        loss, bits = steps[-1].get("loss"), steps[-1]["loss_bits"]
        text = "not finite" if loss is None else f"{loss:.4f}"
        yield "final loss", text, f"bits {bits}"
    evals = run.of_kind("eval")
    last = evals[-1]["loss"] if evals else summary.get("eval_loss")
    if isinstance(last, int | float):
        where = f"before step {evals[-1]['step']}" if evals else "at the end"
        yield "validation loss", f"{last:.4f}", where
    if stays:
        counts = [len(stay.device_ids) for stay in stays]
        ends = {min(counts), max(counts)}
        yield (
            "devices",
            " to ".join(map(str, sorted(ends))),
            f"at last {format_mesh(stays[-1].mesh)}",
        )
    changes = run.of_kind("reconfigure")
    proven = sum(change.get("certified") is True for change in changes)
    yield (
        "changes of devices",
        str(len(changes)),
        f"{proven} certified" if changes else "",
    )
    known = [y for _, y in times if y is not None]
    if known:
        speeds = [y for _, y in rates if y is not None]
        middle = f"{statistics.median(speeds):,.0f} {unit}/s" if speeds else ""
        yield "a step took", format_time(statistics.median(known)), middle
    if run.recoveries:
        total_s = sum(sum(p["s"] for p in r["phases"]) for r in run.recoveries)
        yield "recoveries", str(len(run.recoveries)), format_time(1e3 * total_s)


def _details(run: StoredRun) -> Iterator[tuple[str, str]]:
    summary = run.summary
    if summary.get("state_digest"):
        at = f"of the state after step {summary.get('steps')}"
        yield "state digest", f"{summary['state_digest']} {at}"
    if run.corpus_digest:
        yield "corpus digest", run.corpus_digest
    tables = run.environments or [{"versions": summary.get("versions")}]
    for table in tables:
        facts = {k: v for k, v in table.items() if k != "versions"}
        if facts:
            yield "computed on", ", ".join(f"{k} {v}" for k, v in facts.items())
        versions = table.get("versions")
        if isinstance(versions, dict):
            known = [f"{k} {v}" for k, v in versions.items() if v is not None]
            yield "versions", ", ".join(known)
    if run.saved_steps:
        saved = ", ".join(map(str, sorted(run.saved_steps)[-10:]))
        yield "checkpoints there", saved
    first = next(run.happened("begin"), {})
    if first.get("source"):
        yield "begun from", str(first["source"])
