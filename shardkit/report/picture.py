"""The picture of a run: loss over steps, the device count under it.

Drawn from the lines of `metrics.jsonl`, so that it can be drawn anew from a run's
directory at any time. Needs the optional package matplotlib, and no display.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["history", "smooth", "write_picture"]

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LOSS, TWIN, EVAL, DEVICES = "#1d4ed8", "#fdba8c", "#c2410c", "#0f766e"

Records = Sequence[Mapping[str, Any]]


def write_picture(
    path: Path, records: Records, *, twin: Records = (), title: str = ""
) -> None:
    """Draws a run as a PNG.

    Args:
        path: Where it goes.
        records: What `read_records` returned.
        twin: The same of an uninterrupted run, drawn under the loss.
        title: What to call the run; above the loss stands also what happened to it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    # A Figure of its own needs neither a display nor pyplot's global state.
    figure = Figure(figsize=(9, 5.4), dpi=144, facecolor="white", layout="constrained")
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3.4, 1], "hspace": 0.05}
    )
    for axes in (upper, lower):
        style(axes)
    _draw_loss(upper, records, twin)
    _draw_devices(lower, records)
    for change in _changes(records):
        for axes in (upper, lower):
            axes.axvline(
                change["step"] - 0.5, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1
            )
    words = [title, history(records)] if title else [history(records)]
    upper.set_title(
        ": ".join(words), loc="left", color=INK, fontsize=11, fontweight="bold", pad=12
    )
    lower.set_xlabel("step", color=INK)
    figure.savefig(path)


def smooth(values: Sequence[float], width: float) -> np.ndarray:
    """Averages with a Gaussian around each value, which does not lag behind it.

    >>> smooth([2.0, 2.0, 2.0], width=1).round(12).tolist()
    [2.0, 2.0, 2.0]
    """
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)

    def spread(row: np.ndarray) -> np.ndarray:
        return np.convolve(row, kernel)[reach : reach + len(row)]

    # Divided by the weights that are there, so that the ends do not bend towards 0.
    return spread(np.asarray(values)) / spread(np.ones(len(values)))


def history(records: Records) -> str:
    """Says on which devices a run was, in at most a line."""
    steps = _steps(records)
    counts = [r["num_devices"] for r in steps]
    stays = [str(counts[start]) for start, _ in _stretches(counts)] if counts else []
    if not stays:
        return "no step yet"
    if len(stays) > 8:
        return f"the loss over {len(stays) - 1} changes of devices"
    listed = " and ".join([", ".join(stays[:-1]), stays[-1]] if stays[1:] else stays)
    return f"the loss on {listed} device{'' if listed == '1' else 's'}"


def _steps(records: Records) -> list[Mapping[str, Any]]:
    return [r for r in records if "event" not in r and r["loss"] is not None]


def _changes(records: Records) -> list[Mapping[str, Any]]:
    return [r for r in records if r.get("event") == "reconfigure"]


def style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _draw_loss(axes: Any, records: Records, twin: Records) -> None:
    steps = _steps(records)
    x, loss = [r["step"] for r in steps], [r["loss"] for r in steps]
    if twin:
        other = _steps(twin)
        dashes = (0, (4, 1.5))
        axes.plot(x, loss, color=LOSS, lw=1.4, ls=dashes, label="this run", zorder=3)
        # Wide and light under thin and dark: where they coincide, both are seen.
        axes.plot(
            [r["step"] for r in other],
            [r["loss"] for r in other],
            color=TWIN,
            lw=6,
            solid_capstyle="round",
            solid_joinstyle="round",
            label="uninterrupted twin",
            zorder=2,
        )
    else:
        axes.plot(x, loss, color=LOSS, lw=0.8, alpha=0.45, label="loss", zorder=3)
        if len(loss) >= 10:
            line = smooth(loss, width=max(1.0, len(loss) / 60))
            axes.plot(x, line, color=LOSS, lw=2, label="smoothed", zorder=4)
    evals = [r for r in records if r.get("event") == "eval"]
    if evals:
        axes.plot(
            [r["step"] for r in evals],
            [r["loss"] for r in evals],
            ls="none",
            marker="o",
            ms=6,
            mec="white",
            color=EVAL,
            label="validation",
            zorder=5,
        )
    axes.set_ylabel("loss", color=INK)
    if axes.get_legend_handles_labels()[0]:
        # Its white hides the grid behind the words.
        look = {"edgecolor": "none", "framealpha": 1.0, "labelcolor": INK}
        axes.legend(fontsize=9, loc="upper right", **look)


def _draw_devices(axes: Any, records: Records) -> None:
    steps = _steps(records)
    if not steps:
        return
    edges = [r["step"] - 0.5 for r in steps] + [steps[-1]["step"] + 0.5]
    counts = [r["num_devices"] for r in steps]
    axes.stairs(counts, edges, fill=True, color=DEVICES, alpha=0.18, lw=0)
    axes.stairs(counts, edges, color=DEVICES, lw=1.8, baseline=None)
    for start, end in _stretches(counts):
        # A short stretch has no room for a number, a low one none under its line.
        if end - start < len(counts) / 40:
            continue
        low = counts[start] < max(counts) / 3
        axes.annotate(
            str(counts[start]),
            ((edges[start] + edges[end]) / 2, counts[start]),
            xytext=(0, 4 if low else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if low else "top",
            color=DEVICES,
            fontsize=10,
            fontweight="bold",
        )
    axes.set_ylim(0, max(counts) * 1.2)
    axes.set_yticks([0, max(counts)])
    axes.set_ylabel("devices", color=INK)


def _stretches(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the index ranges over which a count stays."""
    pairs = enumerate(itertools.pairwise(counts), start=1)
    cuts = [index for index, (old, new) in pairs if old != new]
    return list(zip([0, *cuts], [*cuts, len(counts)], strict=True))
