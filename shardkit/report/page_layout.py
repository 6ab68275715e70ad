"""Which device holds which box of a leaf, as a report shows it.

Owns the table, which is there without a script, and what the script draws from. The
boxes are those of `layout_file.py`.
"""

import math
from typing import Any

from shardkit.report.layout_file import Leaf, pieces_of
from shardkit.report.markup import Markup, tag
from shardkit.report.page_data import PageData
from shardkit.report.stored_run import MeshStay
from shardkit.report.terminal import format_mesh

__all__ = ["Met", "layout_card", "layout_data", "meshes_met"]

MAX_MESHES = 12
"""How many meshes are drawn, the first that the run met."""

MAX_LEAVES = 400
"""How many leaves the table has; all can be chosen."""

_TABLE_MESHES = 4

Met = tuple[MeshStay, list[tuple[int, int]]]
"""A mesh, and the ranges of steps that ran on it."""


def meshes_met(stays: list[MeshStay]) -> list[Met]:
    """Lists each mesh with its order of devices once, as the run met them."""
    found: dict[Any, Met] = {}
    for stay in stays:
        key = (tuple(stay.mesh.items()), stay.device_ids)
        found.setdefault(key, (stay, []))[1].append((stay.first, stay.last))
    return list(found.values())


def layout_data(data: PageData) -> dict[str, Any]:
    """Returns what the script draws a leaf from, as JSON values."""
    if data.leaves is None:
        return {"leaves": None, "meshes": [], "leaf": None}
    met = meshes_met(data.stays)[:MAX_MESHES]
    return {
        "leaf": _default(data.leaves),
        "leaves": [
            {
                "path": leaf.path,
                "dtype": leaf.dtype,
                "shape": list(leaf.shape),
                "axes": leaf.axes and list(leaf.axes),
                "cuts": [list(cut) for cut in leaf.cuts],
            }
            for leaf in data.leaves
        ],
        "meshes": [
            {
                "name": _name(stay),
                "note": _note(stay, ranges),
                "axes": list(stay.mesh.items()),
                "ids": list(stay.device_ids),
            }
            for stay, ranges in met
        ],
    }


def _default(leaves: list[Leaf]) -> str | None:
    """Chooses the leaf that is shown at first: the largest of those that are cut."""
    cut = [leaf for leaf in leaves if any(leaf.cuts)] or leaves
    return max(cut, key=lambda leaf: math.prod(leaf.shape)).path if cut else None


def _name(stay: MeshStay) -> str:
    num = len(stay.device_ids)
    return f"{num} device{'' if num == 1 else 's'}, {format_mesh(stay.mesh)}"


def _note(stay: MeshStay, ranges: list[tuple[int, int]]) -> str:
    shown = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges[:4]]
    more = f" and {len(ranges) - 4} times more" if len(ranges) > 4 else ""
    order = "" if stay.is_recorded else "; the order of devices was not recorded"
    return f"(steps {', '.join(shown)}{more}{order})"


def layout_card(data: PageData) -> Markup:
    """Makes the card."""
    if not data.leaves:
        words = "The leaves of the state were not recorded."
        inner = [tag("p", words, class_="muted")]
    else:
        select = tag("select", id="choice")
        inner = [
            tag("label", "leaf", select, id="chooser", for_="choice", hidden=True),
            tag("div", id="leaf", aria_live="polite"),
            tag("noscript", "Pictures need a script; the table has it in words."),
            tag("p"),
            tag("details", tag("summary", "all leaves"), _leaf_table(data)),
        ]
    heading = tag("h2", "Which device holds what")
    return tag("section", heading, *inner, class_="card wide", id="layout")


def _leaf_table(data: PageData) -> Markup:
    leaves, met = data.leaves or [], meshes_met(data.stays)
    header = [
        "leaf",
        "array",
        "axes",
        *(_name(stay) for stay, _ in met[:_TABLE_MESHES]),
    ]
    rows = [tag("tr", *(tag("th", name) for name in header))]
    for leaf in leaves[:MAX_LEAVES]:
        cells = [leaf.path, f"{leaf.dtype}{list(leaf.shape)}"]
        cells.append(" ".join(axis or "–" for axis in leaf.axes or ()))
        cells += [_spell(leaf, stay) for stay, _ in met[:_TABLE_MESHES]]
        rows.append(tag("tr", *(tag("td", cell, class_="text") for cell in cells)))
    more = []
    if len(leaves) > MAX_LEAVES:
        more.append(tag("p", f"and {len(leaves) - MAX_LEAVES} more", class_="muted"))
    if len(met) > _TABLE_MESHES:
        words = f"The run met {len(met)} meshes, of which the first are here."
        more.append(tag("p", words, class_="muted"))
    return tag("div", tag("table", *rows), *more, class_="scroll")


def _spell(leaf: Leaf, stay: MeshStay) -> str:
    """Says in a line how a leaf is cut.

    >>> stay = MeshStay(0, 9, {"fsdp": 2}, (0, 1), True)
    >>> _spell(Leaf("w", (5, 4), "float32", (("fsdp",), ())), stay)
    '2 pieces of 3×4, padded'
    """
    pieces = pieces_of(leaf, stay.mesh, stay.device_ids)
    if len(pieces) == 1:
        return "whole"
    size = "×".join(map(str, pieces[0].shape))
    padded = ", padded" if any(piece.is_padded for piece in pieces) else ""
    return f"{len(pieces)} pieces of {size}{padded}"
