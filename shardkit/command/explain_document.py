"""An explanation as plain values, for machines.

Owns the names of the fields. It leaves nothing out that the tables show.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from shardkit.command.explain_job import Job
from shardkit.command.output import clean
from shardkit.explain.arguments import Argument
from shardkit.explain.exchanges import CAUSES, Exchanged
from shardkit.explain.forbid import Rule
from shardkit.explain.leaves import PlacedLeaf

__all__ = ["document"]


def document(
    title: str, job: Job, broken: Sequence[tuple[Rule, list[Exchanged]]]
) -> dict[str, Any]:
    """Returns all of it as plain values."""
    program, memory = job.program, job.program.memory
    return {
        "config": title,
        "devices": job.num_devices,
        "platform": job.platform,
        "mesh": job.mesh,
        "notes": job.notes,
        "collectives": [_exchanged(each) for each in program.exchanged],
        "by_kind": [dataclasses.asdict(each) for each in job.report.collectives],
        "resharding": [
            {
                "what": clean(x.what),
                "remedy": clean(x.remedy),
                **_exchanged(x.exchanged),
            }
            for x in program.reshardings
        ],
        "leaves": [_leaf(leaf) for leaf in job.leaves],
        "padding_bytes": sum(x.padding_bytes * x.num_copies for x in job.leaves),
        "microbatches": {
            "num": job.idle.num_microbatches,
            "counts": list(job.idle.counts),
            "slots": job.idle.num_slots,
            "num_waiting": job.idle.num_waiting,
            "idle_part": job.idle.idle_part,
        },
        "memory": {
            "argument_bytes": memory.argument_bytes,
            "output_bytes": memory.output_bytes,
            "reused_bytes": memory.reused_bytes,
            "temp_bytes": memory.temp_bytes,
            "arguments": [_argument(each) for each in memory.arguments],
            "temporaries": [
                {**dataclasses.asdict(each), "source": clean(each.source)}
                for each in memory.temporaries
            ],
            "temporaries_lie_side_by_side": memory.is_assigned,
        },
        "forbidden": [
            {"rule": rule.text, "collectives": [_exchanged(x) for x in offending]}
            for rule, offending in broken
        ],
    }


def _exchanged(each: Exchanged) -> dict[str, Any]:
    exchange = each.exchange
    return {
        "kind": each.kind,
        "axes": None if each.span.axes is None else list(each.span.axes),
        "group_size": each.span.group_size,
        "spans_whole_axes": each.span.is_whole,
        "count": exchange.count,
        "bytes": each.num_bytes,
        "bytes_each": exchange.num_bytes,
        "note": exchange.note,
        "instruction": exchange.instruction.name,
        "parts": [
            {
                "shape": part.shape,
                "bytes_each": part.num_bytes,
                "cause": part.cause,
                "words": CAUSES[part.cause],
                "names": list(part.names),
                "operation": part.operation,
                "source": clean(part.source),
                "frames": [
                    {**dataclasses.asdict(frame), "file": clean(frame.file)}
                    for frame in part.frames
                ],
            }
            for part in each.parts
        ],
    }


def _leaf(leaf: PlacedLeaf) -> dict[str, Any]:
    layout = leaf.layout
    return {
        "path": leaf.path,
        "shape": list(layout.shape),
        "dtype": str(leaf.leaf.dtype),
        "axes": leaf.leaf.axes and list(leaf.leaf.axes),
        "cuts": [list(cut) for cut in layout.cuts],
        "piece": list(layout.piece_shape),
        "pieces": leaf.num_pieces,
        "copies": leaf.num_copies,
        "reason": leaf.reason,
        "bytes": layout.num_bytes,
        "device_bytes": layout.piece_bytes,
        "padding_bytes": leaf.padding_bytes * leaf.num_copies,
        "padded_part": leaf.padded_part,
        "boxes": {
            str(id): [list(each) for each in layout.box(id)]
            for id in layout.places.ids.ravel().tolist()
        },
    }


def _argument(each: Argument) -> dict[str, Any]:
    return {
        "name": each.name,
        "bytes": each.num_bytes,
        "shape": each.shape and list(each.shape),
        "spec": each.spec and [list(cut) for cut in each.spec],
    }
