"""Collectives in the text of a compiled program.

Owns reading XLA's HLO text as far as that takes: computations, who calls whom, how
often, and the bytes of shapes. Invariant: nothing is imported, so that the text of any
machine can be read anywhere. What it does not know it does not count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

__all__ = [
    "Collective",
    "Occurrence",
    "each_collective",
    "find_collectives",
    "shape_bytes",
]

_KINDS = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation"
    r"|false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

_IN_LOOP, _IN_BRANCH = "per pass of a loop", "if a branch is taken"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """All collectives of one kind in a program.

    Attributes:
        kind: XLA's name of it, such as `"all-gather"`.
        count: How many each device takes part in, per execution.
        num_bytes: Of the buffers that they work on, on one device, together: what
            goes in or what comes out, whichever is more.
        note: `""`, or what both are to be taken as: `"per pass of a loop"` of which
            the passes are not known, or `"if a branch is taken"`.
    """

    kind: str
    count: int
    num_bytes: int
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Occurrence:
    """One collective instruction, as it is reached by one way through a program.

    Attributes:
        kind: XLA's name of it.
        times: How often it is run, per execution.
        num_bytes: Of its buffers on one device each time, as in `Collective`.
        note: As that of a `Collective`.
        shape: What comes out, as XLA writes it.
        attributes: What XLA says of it besides, such as groups and metadata.
    """

    kind: str
    times: int
    num_bytes: int
    note: str
    shape: str
    attributes: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


def find_collectives(text: str) -> tuple[Collective, ...]:
    """Finds all collectives of a compiled module.

    Those in a loop whose number of passes XLA knows are counted that often.

    Args:
        text: What `Compiled.as_text` returns.

    Example:
        >>> text = '''
        ... ENTRY %main (x: f32[4]) -> f32[16] {
        ...   %x = f32[4]{0} parameter(0)
        ...   ROOT %all = f32[16]{0} all-gather(%x), dimensions={0}
        ... }
        ... '''
        >>> find_collectives(text)
        (Collective(kind='all-gather', count=1, num_bytes=64, note=''),)
    """
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for found in each_collective(text):
        counts[found.kind, found.note] += found.times
        sizes[found.kind, found.note] += found.times * found.num_bytes
    return tuple(
        Collective(kind=kind, count=counts[kind, note], num_bytes=size, note=note)
        for (kind, note), size in sorted(sizes.items())
    )


def each_collective(text: str) -> list[Occurrence]:
    """Lists the collective instructions of a compiled module.

    Args:
        text: What `Compiled.as_text` returns.
    """
    computations, entry = _computations(text)
    listed: list[Occurrence] = []

    def visit(name: str, times: int, note: str) -> None:
        instructions = computations.get(name, [])
        # Of what is asynchronous, the end says what comes out.
        ends = {_NAME.findall(i.operands)[-1]: i for i in _ends(instructions)}
        results = {i.name: shape_bytes(i.shape) for i in instructions}
        for found in instructions:
            kind = found.opcode.removesuffix("-start")
            if kind in _KINDS:
                inputs = sum(results.get(x, 0) for x in _NAME.findall(found.operands))
                end = ends.get(found.name, found)
                is_lonely_start = kind != found.opcode and end is found
                outputs = 0 if is_lonely_start else shape_bytes(end.shape)
                listed.append(
                    Occurrence(
                        kind=kind,
                        times=times,
                        num_bytes=max(inputs, outputs),
                        note=note,
                        shape=end.shape,
                        attributes=found.attributes,
                    )
                )
            for callee, passes, inner in _calls(found):
                visit(callee, times * passes, note or inner)

    visit(entry, 1, "")
    return listed


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array or a tuple.

    Example:
        >>> shape_bytes("(f32[2,3]{1,0}, s4[3]{0}, pred[])")
        27
    """
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        width = re.search(r"\d+", dtype)
        num_bits = 8 if dtype == "pred" else int(width.group()) if width else 0
        sizes = [int(size.removeprefix("<=")) for size in dims.split(",") if size]
        total += math.ceil(math.prod(sizes) * num_bits / 8)
    return total


def _ends(instructions: list[_Instruction]) -> Iterator[_Instruction]:
    return (
        i
        for i in instructions
        if i.opcode.removesuffix("-done") in _KINDS and i.opcode.endswith("-done")
    )


def _calls(found: _Instruction) -> Iterator[tuple[str, int, str]]:
    """Yields the computations that an instruction runs: name, times, what of it."""
    if found.opcode.endswith(("-update", "-done")):
        return
    trip_count = _TRIP_COUNT.search(found.attributes)
    for key, names in _CALLED.findall(found.attributes):
        passes, note = 1, ""
        if found.opcode == "while":
            passes = int(trip_count.group(1)) if trip_count else 1
            note = "" if trip_count else _IN_LOOP
        elif found.opcode == "conditional":
            note = _IN_BRANCH
        elif key == "to_apply" and found.opcode != "call":
            # How two numbers are put together; no collective is in there.
            continue
        for name in _NAME.findall(names):
            yield name, passes, note


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Splits a module; returns the instructions by computation, and the entry."""
    found: dict[str, list[_Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY ")):
            current = _NAME.findall(line)[0]
            found[current] = []
            entry = current if line.startswith("ENTRY ") else entry
        elif line.startswith(" ") and " = " in line and current:
            found[current].append(_instruction(line))
    return found, entry


def _instruction(line: str) -> _Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        end = _closing(rest)
        shape, rest = rest[:end], rest[end:].lstrip()
    else:
        shape, _, rest = rest.partition(" ")
    end = rest.find("(")
    opcode, rest = rest[:end], rest[end:]
    end = _closing(rest)
    return _Instruction(name.lstrip("%"), shape, opcode, rest[:end], rest[end:])


def _closing(text: str) -> int:
    """Returns where the bracket that `text` begins with has been closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
