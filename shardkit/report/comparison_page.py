"""Several runs over one another as one HTML file.

Owns that page: the verdicts, the curves of all runs, and what each of them is. What
differs and whether it should is `comparison.py`'s business.
"""

from collections.abc import Sequence
from pathlib import Path

from shardkit.report.cards import card, table
from shardkit.report.charts import Scale, curve, grid, percent, plot
from shardkit.report.comparison import Comparison
from shardkit.report.jsonl import write_atomically
from shardkit.report.markup import Markup, tag
from shardkit.report.page import document
from shardkit.report.stored_run import StoredRun
from shardkit.report.thin import MAX_POINTS, Point, thin

__all__ = ["render_comparison", "write_comparison"]

NUM_STYLES = 6
"""Colours with dashes of their own; more runs repeat them."""


def write_comparison(
    out: Path, runs: Sequence[StoredRun], found: Sequence[Comparison]
) -> None:
    """Writes a page of runs, the first beside each other one.

    Args:
        out: Where to.
        runs: The runs.
        found: What `compare_stored` has said of the first and each of the others.
    """
    write_atomically(out, render_comparison(runs, found))


def render_comparison(runs: Sequence[StoredRun], found: Sequence[Comparison]) -> str:
    """Writes the page."""
    wrong = sum(each.is_wrong for each in found)
    state = f"{wrong} of {len(found)} differ and should not" if wrong else "as expected"
    kind = "bad" if wrong else "good"
    names = _names(runs)
    losses = [_losses(run) for run in runs]
    title = f"{names[0]} beside {', '.join(names[1:])}"
    main = tag(
        "main",
        tag("header", tag("h1", title), tag("span", state, class_=f"badge {kind}")),
        *(_verdict(name, each) for name, each in zip(names[1:], found, strict=True)),
        card("Loss", _chart(losses, found), _legend(names), note="over steps"),
        card("The runs", _runs_table(names, runs)),
        *(
            _reasons(name, each)
            for name, each in zip(names[1:], found, strict=True)
            if each.reasons
        ),
    )
    x = _scale(losses)
    # Points of a page of one run are hovered over one by one; so are these.
    most = MAX_POINTS // len(runs)
    curves = [
        {"chart": "loss", "name": name, "points": thin(points, most)}
        for name, points in zip(names, losses, strict=True)
    ]
    values = {"low": x.low, "high": x.high, "counts": [], "curves": curves}
    return document(title, main, {**values, "leaves": None})


def _names(runs: Sequence[StoredRun]) -> list[str]:
    """Calls each run by its directory, or by its path where two have one name."""
    short = [run.name for run in runs]
    return [
        name if short.count(name) == 1 else str(run.path)
        for name, run in zip(short, runs, strict=True)
    ]


def _losses(run: StoredRun) -> list[Point]:
    return [(record["step"], record.get("loss")) for record in run.steps]


def _scale(losses: Sequence[Sequence[Point]]) -> Scale:
    steps = [step for points in losses for step, _ in points] or [0]
    return Scale(min(steps) - 0.5, max(steps) + 0.5)


def _chart(losses: Sequence[Sequence[Point]], found: Sequence[Comparison]) -> Markup:
    x = _scale(losses)
    y = Scale.around(v for points in losses for _, v in points if v is not None)
    cuts = []
    for step in sorted(
        {c.first_differing for c in found if c.first_differing is not None}
    ):
        at = percent(x.share(step))
        words = tag("title", f"step {step}: the first that differs")
        line = {"x1": at, "x2": at, "y1": "0", "y2": "100%"}
        cuts.append(tag("line", words, class_="cut recovery", **line))
    # The first lies on top, thin: where others have the same bits, both are seen.
    curves = [
        curve(thin(points), x, y, f"line run-{number % NUM_STYLES}")
        for number, points in enumerate(losses)
    ]
    lines = plot(
        320,
        grid(x, y, num_x=10, num_y=6, words_x=True),
        *cuts,
        *reversed(curves),
        label="Losses over steps",
    )
    return tag("div", lines, id="loss", class_="chart")


def _legend(names: Sequence[str]) -> Markup:
    parts = [
        tag("span", tag("i", class_=f"stroke key-{number % NUM_STYLES}"), name)
        for number, name in enumerate(names)
    ]
    return tag("div", *parts, class_="legend")


def _verdict(name: str, found: Comparison) -> Markup:
    kind = "bad" if found.is_wrong else "good" if found.identical else "warn"
    rows = []
    for what, words in list(found.rows().items())[1:]:
        rows += [tag("dt", what), tag("dd", words)]
    words = tag("p", found.verdict, class_=f"verdict {kind}")
    return card(name, words, tag("dl", *rows), note="beside the first")


def _reasons(name: str, found: Comparison) -> Markup:
    rows = [(r.what, _text(r.a), _text(r.b)) for r in found.reasons]
    header = ["", "the first", name]
    inner = table(header, rows, ["text", "text mono", "text mono"])
    return card("What lets them differ", inner, note=name)


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def _runs_table(names: Sequence[str], runs: Sequence[StoredRun]) -> Markup:
    rows = []
    for name, run in zip(names, runs, strict=True):
        last = run.steps[-1] if run.steps else {}
        loss = last.get("loss")
        rows.append(
            (
                name,
                f"{run.num_steps:,} of {run.config.train.steps:,}",
                "–" if loss is None else f"{loss:.6f}",
                last.get("loss_bits", "–"),
                ", ".join(_counts(run)),
                run.summary.get("state_digest") or "not finished",
            )
        )
    header = ["run", "steps", "final loss", "its bits", "devices", "state digest"]
    classes = ["text", "name", "right", "mono", "text", "mono"]
    return table(header, rows, classes)


def _counts(run: StoredRun) -> list[str]:
    counts = [str(len(stay.device_ids)) for stay in run.stays()]
    return counts if len(counts) <= 8 else [*counts[:3], "…", *counts[-3:]]
