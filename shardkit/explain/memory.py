"""What the memory of a device is taken for while a program runs.

Owns the list of arguments and of the largest temporaries. Invariant: sizes are XLA's
own; where XLA does not tell which temporaries share their memory, that is said.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from shardkit.explain.arguments import Argument
from shardkit.explain.buffers import Buffer, temporary_buffers
from shardkit.explain.exchanges import operation, place_of
from shardkit.hlo import Module, shape_bytes
from shardkit.hlo.flow import Flow, Value
from shardkit.hlo.text import Frame, shape_parts
from shardkit.labels import read_label

__all__ = ["Memory", "Temporary", "explain_memory"]

_MOST = 30
# They name what others hold, and hold nothing themselves.
_NAMES_ONLY = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("opt-barrier", "constant", "call", "async-start", "async-done"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temporary:
    """A value that a program holds while it runs.

    Attributes:
        shape: As XLA spells it.
        num_bytes: Of it on one device.
        operation: What makes it.
        cause: Of the collective that it belongs to, a key of `CAUSES`; or `""`.
        source: The line to look at; `""` if unknown.
        num_sharing: How many others lie in its memory before or after it; None if
            XLA does not tell.
    """

    shape: str
    num_bytes: int
    operation: str
    cause: str
    source: str
    num_sharing: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of one device; None where XLA does not tell.

    Attributes:
        argument_bytes: What the program is called with.
        output_bytes: What it returns.
        reused_bytes: What of that lies where arguments lay.
        temp_bytes: What it needs besides.
        arguments: What the program is called with, the largest first.
        temporaries: The largest of the values that it makes. If `is_assigned`, they lie
            side by side in the temporary memory; else they may share it.
        is_assigned: Whether XLA has told where they lie.
    """

    argument_bytes: int | None
    output_bytes: int | None
    reused_bytes: int | None
    temp_bytes: int | None
    arguments: tuple[Argument, ...]
    temporaries: tuple[Temporary, ...]
    is_assigned: bool


def explain_memory(
    module: Module,
    flow: Flow,
    arguments: Sequence[Argument],
    compiled: jax.stages.Compiled | None = None,
) -> Memory:
    """Explains the memory of a program.

    Args:
        module: Its text.
        flow: The ways of its values.
        arguments: What it is called with.
        compiled: The program itself; only with it XLA tells sizes and places.
    """
    told: Any = compiled.memory_analysis() if compiled is not None else None
    buffers = temporary_buffers(compiled) if compiled is not None else None
    if buffers is None:
        temporaries = _largest(module, flow)
    else:
        temporaries = _side_by_side(buffers, flow)
    return Memory(
        argument_bytes=getattr(told, "argument_size_in_bytes", None),
        output_bytes=getattr(told, "output_size_in_bytes", None),
        reused_bytes=getattr(told, "alias_size_in_bytes", None),
        temp_bytes=getattr(told, "temp_size_in_bytes", None),
        arguments=tuple(sorted(arguments, key=lambda x: -x.num_bytes)),
        temporaries=tuple(temporaries),
        is_assigned=buffers is not None,
    )


def _side_by_side(buffers: list[Buffer], flow: Flow) -> list[Temporary]:
    """Takes the largest buffers of which no two share memory."""
    chosen: list[Buffer] = []
    for each in sorted(buffers, key=lambda b: (-b.num_bytes, b.start)):
        if len(chosen) == _MOST or not each.num_bytes:
            break
        shape = flow.instruction(Value(each.computation, each.name)).shape
        # A tuple itself is a list of places.
        is_list = each.part < 0 and shape.startswith("(")
        if not is_list and not any(each.overlaps(other) for other in chosen):
            chosen.append(each)
    return [
        _temporary(
            flow,
            Value(each.computation, each.name, each.part),
            each.num_bytes,
            sum(each.overlaps(other) for other in buffers) - 1,
        )
        for each in chosen
    ]


def _largest(module: Module, flow: Flow) -> list[Temporary]:
    """Takes the largest results in the text, outside of fusions."""
    fused = {
        call.name
        for instructions in module.computations.values()
        for each in instructions
        if each.opcode == "fusion"
        for call in each.calls()
    }
    found = [
        (shape_bytes(each.shape), Value(name, each.name))
        for name, instructions in module.computations.items()
        if name not in fused
        for each in instructions
        if each.opcode not in _NAMES_ONLY
    ]
    found.sort(key=lambda pair: -pair[0])
    return [_temporary(flow, value, size, None) for size, value in found[:_MOST]]


def _temporary(
    flow: Flow, value: Value, num_bytes: int, num_sharing: int | None
) -> Temporary:
    found = flow.instruction(value)
    parts = shape_parts(found.shape)
    is_part = 0 <= value.part < len(parts)
    frames: list[Frame] = flow.module.frames(found)
    op_name = found.op_name
    if not frames or not operation(op_name):
        # Copies that XLA has added are of something.
        for source in map(flow.instruction, flow.sources(value)):
            frames = frames or flow.module.frames(source)
            op_name = op_name if operation(op_name) else source.op_name
    labelled = read_label(op_name)
    return Temporary(
        shape=parts[value.part] if is_part else ", ".join(parts),
        num_bytes=num_bytes,
        operation=operation(op_name) or found.opcode,
        cause=labelled[0] if labelled else "",
        source=place_of(frames),
        num_sharing=num_sharing,
    )
