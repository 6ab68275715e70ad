"""The picture of the changes of devices: what each one took, phase by phase.

Drawn from the lines of `metrics.jsonl`, as the picture of the loss is. Compiling can
take a hundred times what all the rest does, so the rest is drawn once more on a scale
of its own, and every phase is written out under its bar.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardkit.report.jsonl import phase_ms
from shardkit.report.picture import GRID, INK, MUTED, Records, style
from shardkit.report.terminal import format_bytes, format_time, format_verdict

__all__ = ["MAX_SHOWN", "changes_of", "write_timeline"]

MAX_SHOWN = 20
"""How many changes are drawn, the newest: more would fit on no screen."""

# What is one thing to its reader is of one hue: the certificate's steps and digests.
COLOURS = {
    "derive": "#475569",
    "compile": "#94a3b8",
    "restore": "#7c3aed",
    "batch": "#a16207",
    "plan": "#facc15",
    "move": "#ea580c",
    "compare": "#fda4af",
    "old_step": "#99d5c9",
    "old_digest": "#5bb5a2",
    "new_step": "#2c8c7c",
    "new_digest": "#115e54",
    "first_step": "#1d4ed8",
}
_OTHER = "#db2777"


def changes_of(records: Records) -> list[dict[str, Any]]:
    """Returns the changes, the first step after each among its phases."""
    found: list[dict[str, Any]] = []
    for record in records:
        kind = record.get("event")
        if kind == "reconfigure":
            found.append({**record, "phases": list(record["phases"])})
        elif kind == "first_step" and found and found[-1]["step"] == record["step"]:
            found[-1]["phases"].append({"name": "first_step", "bytes": 0, **record})
    return found


def write_timeline(path: Path, records: Records, *, title: str = "") -> None:
    """Draws the changes of a run as a PNG, if there were any.

    Args:
        path: Where it goes.
        records: What `read_records` returned.
        title: What to call the run.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    changes = changes_of(records)[-MAX_SHOWN:]
    if not changes:
        path.unlink(missing_ok=True)
        return
    from matplotlib.figure import Figure

    has_compiled = any(_share(change, "compile") > 0.3 for change in changes)
    figure = Figure(
        figsize=(12, 1.3 + 0.72 * len(changes)),
        dpi=144,
        facecolor="white",
        layout="constrained",
    )
    title = f"{title}: " if title else ""
    figure.suptitle(
        f"{title}what each change of devices took",
        x=0.007,
        ha="left",
        color=INK,
        fontsize=11,
        fontweight="bold",
    )
    if has_compiled:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 2.2]})
        # What is written at the left may reach over here.
        right.patch.set_visible(False)
        _draw_panel(left, changes, written=("compile",))
        _draw_panel(right, [_without_compiling(change) for change in changes])
        right.set_title("without compiling", loc="left", color=MUTED, fontsize=9)
    else:
        left = figure.subplots()
        _draw_panel(left, changes)
    _write_headings(left, changes)
    figure.savefig(path)


def _share(change: Mapping[str, Any], name: str) -> float:
    spent_ms = phase_ms(change["phases"])
    return spent_ms.get(name, 0.0) / (sum(spent_ms.values()) or 1.0)


def _without_compiling(change: Mapping[str, Any]) -> dict[str, Any]:
    """Takes compiling out of a change, and closes the gap."""
    phases, skipped_s = [], 0.0
    for phase in change["phases"]:
        start_s, end_s = phase["start_s"], phase["end_s"]
        if phase["name"] == "compile":
            skipped_s += end_s - start_s
            continue
        times = {"start_s": start_s - skipped_s, "end_s": end_s - skipped_s}
        phases.append({**phase, **times})
    return {**change, "phases": phases}


def _draw_panel(
    axes: Any, changes: Sequence[Mapping[str, Any]], written: Sequence[str] = ()
) -> None:
    """Draws a bar for each change, and writes under it what took how long.

    Args:
        axes: Where.
        changes: What `changes_of` returned.
        written: The phases that are written out; none for all.
    """
    style(axes)
    in_seconds = max(map(_end_s, changes)) >= 1
    unit_s = 1.0 if in_seconds else 1e-3
    for row, change in enumerate(changes):
        for phase in change["phases"]:
            axes.barh(
                row,
                (phase["end_s"] - phase["start_s"]) / unit_s,
                left=phase["start_s"] / unit_s,
                height=0.3,
                color=COLOURS.get(phase["name"], _OTHER),
                lw=0,
            )
        words = []
        for name, spent_ms in phase_ms(change["phases"]).items():
            # What is next to nothing only takes room.
            if name in (written or [name]) and spent_ms >= _end_s(change):
                words.append(("■", {"color": COLOURS.get(name, _OTHER)}))
                words.append((f"{_word(name)} {format_time(spent_ms)} ", {}))
        if words:
            _write(axes, row, -15, words)
    # The first on top, each with room for a line above and one below.
    axes.set_ylim(len(changes) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_xlim(left=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_xlabel("s" if in_seconds else "ms", color=INK)


def _end_s(change: Mapping[str, Any]) -> float:
    return max((phase["end_s"] for phase in change["phases"]), default=0.0)


def _word(name: str) -> str:
    # Which digest it is is clear from the step before it.
    return "digest" if name.endswith("_digest") else name.replace("_", " ")


def _write_headings(axes: Any, changes: Sequence[Mapping[str, Any]]) -> None:
    """Says over each bar what it is of."""
    bold = {"fontsize": 9, "color": INK, "fontweight": "bold"}
    for row, change in enumerate(changes):
        what = f"{change['from_devices']} → {change['to_devices']}"
        # As long as the other reports say: until a step could be dispatched.
        own = [x for x in change["phases"] if x["name"] != "first_step"]
        spent = format_time(1e3 * _end_s({"phases": own}))
        moved = f"{format_bytes(change['bytes_moved'])} moved"
        verdict = format_verdict(change, {True: "certified"})
        facts = ", ".join(filter(None, (spent, moved, verdict)))
        _write(axes, row, 16, [(f"step {change['step']}: {what}", bold), (facts, {})])


def _write(
    axes: Any, row: int, y: float, words: Sequence[tuple[str, dict[str, Any]]]
) -> None:
    """Writes words, each with a look of its own, `y` points above a bar."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    areas: list[Any] = [
        TextArea(text, textprops={"fontsize": 7.5, "color": MUTED, **look})
        for text, look in words
    ]
    box = AnnotationBbox(
        HPacker(children=areas, pad=0, sep=3, align="baseline"),
        (0, row),
        xybox=(0, y),
        xycoords=("axes fraction", "data"),
        boxcoords="offset points",
        box_alignment=(0, 0.5),
        frameon=False,
        pad=0,
    )
    # Else the panel would shrink until the words fit into it.
    box.set_in_layout(False)
    axes.add_artist(box)
