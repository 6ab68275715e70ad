"""What devices exchange in a program, and why.

Owns `Exchanged`: one collective of the compiled program with its mesh axes, bytes and
cause. Invariants: bytes and counts are those of `find_collectives`, and what is said of
a cause is in the program's text. What could be done about it is `advice`'s business.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardkit.explain.arguments import Argument
from shardkit.hlo import Exchange, Module, find_exchanges, shape_bytes
from shardkit.hlo.flow import Flow, Value
from shardkit.hlo.groups import Span, span_of
from shardkit.hlo.text import Frame, Instruction, shape_parts
from shardkit.labels import PURPOSES, read_label
from shardkit.mesh import BATCH_AXES

__all__ = ["CAUSES", "Exchanged", "Part", "list_exchanged", "operation", "place_of"]

CAUSES = {
    **PURPOSES,
    "program": "the program's own",
    "partial": "partial results added",
    "exact": "range or exact sum of a cut array",
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
# What is done within them has names of its own.
_AROUND = {"shard_map", "while", "body", "cond", "closed_call", "checkpoint"}
_INSTALLED = ("/site-packages/", "/dist-packages/", "/lib/python")
_HOME = f"{Path(__file__).parents[2]}{os.sep}"
_EXACT = "shardkit/exact_sum.py:"
# What a model calls: of these the line of the call says more.
_CALLED = ("shardkit/nn.py", "shardkit/logical_axes.py")


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
    found = []
    for each in find_exchanges(module):
        span = span_of(each.instruction.attributes, mesh)
        reader = _Reader(each, span, flow, arguments)
        found.append(Exchanged(exchange=each, span=span, parts=tuple(reader.parts())))
    return found


def operation(op_name: str) -> str:
    """Names the operation that a name of JAX ends with.

    Example:
        >>> operation("jit(f)/while/body/dot_general"), operation("params['w']")
        ('dot_general', '')
    """
    last = op_name.rpartition("/")[2].strip("()")
    is_one = "/" in op_name and last.isidentifier() and last not in _AROUND
    return last if is_one else ""


def place_of(frames: Sequence[Frame]) -> str:
    """Chooses the line to look at: the innermost of no installed package but shardkit.

    Its own files have the same names wherever it is installed.
    """
    places = [(_short(frame.file), frame.line) for frame in frames]
    own = [x for x in places if not any(part in x[0] for part in _INSTALLED)]
    meant = [x for x in own if x[0] not in _CALLED]
    chosen = next(iter(meant or own or places), None)
    return f"{chosen[0]}:{chosen[1]}" if chosen else ""


def _short(file: str) -> str:
    inner = file.removeprefix(_HOME)
    return inner if inner.startswith(f"shardkit{os.sep}") else file


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the parts of one collective."""

    exchange: Exchange
    span: Span
    flow: Flow
    arguments: Sequence[Argument]

    def parts(self) -> Iterator[Part]:
        exchange = self.exchange
        operands = exchange.instruction.operand_names
        shapes = shape_parts(exchange.end.shape)
        is_split = exchange.kind in ("all-to-all", "ragged-all-to-all")
        if len(operands) < 2 or len(shapes) != len(operands) or is_split:
            # Several operands of an all-to-all are pieces of one array.
            yield self.part(operands, ", ".join(shapes), exchange.num_bytes)
            return
        for number, (name, shape) in enumerate(zip(operands, shapes, strict=True)):
            given = self.flow.instruction(self.value(name)).shape
            size = max(shape_bytes(given), shape_bytes(shape))
            yield self.part([name], shape, size, number)

    def part(
        self, operands: Sequence[str], shape: str, num_bytes: int, number: int = -1
    ) -> Part:
        """Reads what these operands become: all of it, or one array of several."""
        exchange, flow = self.exchange, self.flow
        # What was joined keeps a name of its own only where it is taken out again.
        told = self.taken(number) or exchange.instruction
        op_name = told.op_name or exchange.instruction.op_name
        labelled = read_label(op_name)
        cause = self.cause(operation(op_name), bool(labelled))
        names: tuple[str, ...] = ()
        if labelled and cause == "program":
            cause, names = labelled
        values = [self.value(name) for name in operands]
        if not names and cause not in ("metrics", "range", "update"):
            numbers = dict.fromkeys(
                i.number for value in values for i in flow.nearest_arguments(value)
            )
            names = tuple(self.arguments[number].name for number in numbers)
        # Where it says nothing itself, those that use it do, or those that make it.
        near = [x for x in flow.uses(self.end(number)) if not flow.is_result(x)]
        near += [x for value in values for x in flow.sources(value)]
        tellers = [told, exchange.instruction, *map(flow.instruction, near)]
        operations = (operation(x.op_name) for x in tellers)
        frames = tuple(next(filter(None, map(flow.module.frames, tellers)), ()))
        if cause == "partial" and place_of(frames).startswith(_EXACT):
            # What is read there went through all microbatches, and names nothing.
            cause, names = "exact", ()
        return Part(
            shape=shape,
            num_bytes=num_bytes,
            cause=cause,
            names=names,
            operation=next(filter(None, operations), ""),
            frames=frames,
        )

    def value(self, name: str) -> Value:
        return Value(self.exchange.computation, name)

    def end(self, number: int) -> Value:
        return dataclasses.replace(self.value(self.exchange.end.name), part=number)

    def taken(self, number: int) -> Instruction | None:
        """Returns what takes one array out of those that travel together."""
        for each in self.flow.module.computations[self.exchange.computation]:
            is_taken = each.operand_names == [self.exchange.end.name]
            if each.opcode == "get-tuple-element" and is_taken:
                if each.number == number:
                    return each
        return None

    def cause(self, primitive: str, is_labelled: bool) -> str:
        if primitive in _PRIMITIVES:
            # What the partitioner adds beside a collective has the name of that. A
            # step exchanges nothing by itself but along the axes of the batch.
            is_own = not {*(self.span.axes or ())} - {*BATCH_AXES}
            if is_own if is_labelled else not self.is_added:
                return "program"
        if self.exchange.kind in ("all-reduce", "reduce-scatter"):
            return "lookup" if primitive in _LOOKUPS else "partial"
        return "resharding"

    @property
    def is_added(self) -> bool:
        """Whether the partitioner has added it, and no program said it."""
        attributes = self.exchange.instruction.attributes
        if 'is_spmd_generated="true"' in attributes:
            return True
        # Before JAX 0.12 it is not marked, but JAX's own all have the first channel.
        found = re.search(r"\bchannel_id=(\d+)", attributes)
        return found is not None and int(found[1]) > 1
