"""What devices exchange in a program, and why.

Owns `Exchanged`: one collective of the compiled program with its mesh axes, bytes and
cause. Invariants: bytes and counts are those of `find_collectives`, and what is said of
a cause is in the program's text. What could be done about it is `advice`'s business.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from shardkit.explain.arguments import Argument
from shardkit.hlo import Exchange, Module, find_exchanges, shape_bytes
from shardkit.hlo.flow import Flow, Value
from shardkit.hlo.groups import Span, span_of
from shardkit.hlo.text import Frame, shape_parts
from shardkit.labels import PURPOSES, read_label

__all__ = ["CAUSES", "Exchanged", "Part", "list_exchanged", "operation", "place_of"]

CAUSES = {
    **PURPOSES,
    "program": "the program's own",
    "partial": "partial results added",
    "lookup": "rows looked up where they lie",
    "resharding": "resharding",
}
"""What causes an exchange, in words; all but the last are meant."""

_PRIMITIVES = {
    *("all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all"),
    *("pbroadcast", "pgather", "pmax", "pmin", "ppermute", "psum", "psum2"),
    *("psum_invariant", "psum_scatter", "ragged_all_to_all", "reduce_scatter"),
    *("unreduced_psum", "unreduced_reduce_scatter", "sharding_constraint"),
}
# Where these find their rows on several devices, masked parts are added.
_LOOKUPS = {
    *("gather", "dynamic_slice", "dynamic_update_slice", "concatenate", "pad"),
    *("slice", "scatter", "take"),
}
_INSTALLED = ("/site-packages/", "/dist-packages/", "/lib/python")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One array of a collective, which can carry several.

    Attributes:
        shape: What it becomes on one device, as XLA spells it.
        num_bytes: Of its buffers, each time.
        cause: A key of `CAUSES`.
        names: The leaves, or else the arguments, that it carries or is made of.
        operation: The operation of the program that it belongs to.
        frames: The lines that this comes from, the innermost first.
    """

    shape: str
    num_bytes: int
    cause: str
    names: tuple[str, ...]
    operation: str
    frames: tuple[Frame, ...]

    @property
    def source(self) -> str:
        """The line to look at, as `file:line`; `""` if unknown."""
        return place_of(self.frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchanged:
    """One collective of a program.

    Attributes:
        exchange: It, as the text has it.
        span: The mesh axes that it goes over.
        parts: What it carries.
    """

    exchange: Exchange
    span: Span
    parts: tuple[Part, ...]

    @property
    def kind(self) -> str:
        """XLA's name of it."""
        return self.exchange.kind

    @property
    def num_bytes(self) -> int:
        """Bytes of its buffers on one device, all times together."""
        return self.exchange.count * self.exchange.num_bytes

    @property
    def moves(self) -> bool:
        """Whether anything leaves a device."""
        return self.span.axes != ()

    @property
    def is_resharding(self) -> bool:
        """Whether the compiler had to lay something out anew, unasked."""
        return self.moves and any(x.cause == "resharding" for x in self.parts)


def list_exchanged(
    module: Module,
    flow: Flow,
    mesh: Mapping[str, int],
    arguments: Sequence[Argument],
) -> list[Exchanged]:
    """Lists the collectives of a program, in the order of execution.

    Args:
        module: The program.
        flow: The ways of its values.
        mesh: Axis → size, the outermost first.
        arguments: Those of the program.
    """
    return [
        Exchanged(
            exchange=each,
            span=span_of(each.instruction.attributes, mesh),
            parts=tuple(_parts(each, flow, arguments)),
        )
        for each in find_exchanges(module)
    ]


def operation(op_name: str) -> str:
    """Names the operation that a name of JAX ends with.

    Example:
        >>> operation("jit(f)/while/body/dot_general"), operation("params['w']")
        ('dot_general', '')
    """
    last = op_name.rpartition("/")[2].strip("()")
    return last if "/" in op_name and last.isidentifier() else ""


def place_of(frames: Sequence[Frame]) -> str:
    """Chooses the line to look at: the innermost of no installed package."""
    own = [f for f in frames if not any(part in f.file for part in _INSTALLED)]
    chosen = next(iter(own or frames), None)
    return f"{chosen.file}:{chosen.line}" if chosen else ""


def _parts(exchange: Exchange, flow: Flow, arguments: Sequence[Argument]) -> list[Part]:
    found, where = exchange.instruction, exchange.computation
    operands = found.operand_names
    shapes = shape_parts(exchange.end.shape)
    is_split = exchange.kind in ("all-to-all", "ragged-all-to-all")
    if len(operands) < 2 or len(shapes) != len(operands) or is_split:
        # Several operands of an all-to-all are pieces of one array.
        return [_part(exchange, "", operands, flow, arguments, exchange.num_bytes)]
    inputs = [flow.instruction(Value(where, name)).shape for name in operands]
    sizes = [max(map(shape_bytes, x)) for x in zip(inputs, shapes, strict=True)]
    taken = {
        i.number: i.op_name
        for i in flow.module.computations[where]
        if i.opcode == "get-tuple-element" and i.operand_names == [exchange.end.name]
    }
    # What was joined keeps a name of its own only where it is taken out again.
    return [
        dataclasses.replace(
            _part(exchange, taken.get(n, ""), [name], flow, arguments, size, n),
            shape=shape,
        )
        for n, (name, shape, size) in enumerate(
            zip(operands, shapes, sizes, strict=True)
        )
    ]


def _part(
    exchange: Exchange,
    op_name: str,
    operands: Sequence[str],
    flow: Flow,
    arguments: Sequence[Argument],
    num_bytes: int,
    number: int = -1,
) -> Part:
    found, where = exchange.instruction, exchange.computation
    op_name = op_name or found.op_name
    values = [Value(where, name) for name in operands]
    labelled = read_label(op_name)
    primitive = operation(op_name)
    cause = _cause(exchange, primitive, bool(labelled))
    if labelled and cause == "program":
        cause = labelled[0]
    names = labelled[1] if labelled else ()
    if not names and cause not in ("metrics", "range", "update"):
        numbers = dict.fromkeys(
            i.number for value in values for i in flow.nearest_arguments(value)
        )
        names = tuple(arguments[number].name for number in numbers)
    frames = flow.module.frames(found)
    if number >= 0:
        frames = _frames_taken(exchange, flow, number) or frames
    end = Value(where, exchange.end.name, number)
    if not frames or not primitive:
        near = [x for x in flow.uses(end) if not flow.is_result(x)]
        near += [x for value in values for x in flow.sources(value)]
        told = [flow.instruction(x) for x in near]
        frames = frames or next(filter(None, map(flow.module.frames, told)), [])
        primitives = (operation(x.op_name) for x in told)
        primitive = primitive or next(filter(None, primitives), "")
    return Part(
        shape=", ".join(shape_parts(exchange.end.shape)),
        num_bytes=num_bytes,
        cause=cause,
        names=names,
        operation=primitive,
        frames=tuple(frames),
    )


def _frames_taken(exchange: Exchange, flow: Flow, number: int) -> list[Frame]:
    for each in flow.module.computations[exchange.computation]:
        is_taken = each.operand_names == [exchange.end.name] and each.number == number
        if each.opcode == "get-tuple-element" and is_taken:
            return flow.module.frames(each)
    return []


def _cause(exchange: Exchange, primitive: str, is_labelled: bool) -> str:
    is_made = 'is_spmd_generated="true"' in exchange.instruction.attributes
    if not is_made and (primitive in _PRIMITIVES or (is_labelled and not primitive)):
        return "program"
    if exchange.kind in ("all-reduce", "reduce-scatter"):
        return "lookup" if primitive in _LOOKUPS else "partial"
    return "resharding"
