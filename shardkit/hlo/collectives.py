"""Collectives in the text of a compiled program.

Owns which instructions are collectives, how often each is run, and the bytes of its
buffers. Invariant: what it does not know it does not count.
"""

import collections
import dataclasses

from shardkit.hlo.text import Instruction, Module, parse_module, shape_bytes

__all__ = [
    "KINDS",
    "Collective",
    "Exchange",
    "find_collectives",
    "find_exchanges",
]

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""XLA's names of them."""


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
class Exchange:
    """One collective instruction, wherever it is called from.

    Attributes:
        kind: XLA's name of it.
        instruction: It, or how it begins where it is asynchronous.
        end: How it ends; the same where it is not.
        computation: Where it stands.
        count: How often it is run, per execution.
        num_bytes: Of its buffers on one device, each time.
        note: As that of a `Collective`.
    """

    kind: str
    instruction: Instruction
    end: Instruction
    computation: str
    count: int
    num_bytes: int
    note: str = ""


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
    for found in find_exchanges(parse_module(text)):
        counts[found.kind, found.note] += found.count
        sizes[found.kind, found.note] += found.count * found.num_bytes
    return tuple(
        Collective(kind=kind, count=counts[kind, note], num_bytes=size, note=note)
        for (kind, note), size in sorted(sizes.items())
    )


def find_exchanges(module: Module) -> list[Exchange]:
    """Lists every collective instruction, in the order of execution."""
    found: dict[tuple[str, str, str], Exchange] = {}

    def visit(name: str, times: int, note: str) -> None:
        instructions = module.computations.get(name, [])
        # Of what is asynchronous, the end says what comes out.
        ends = {i.operand_names[-1]: i for i in instructions if _is_end(i)}
        results = {i.name: shape_bytes(i.shape) for i in instructions}
        for each in instructions:
            kind = each.opcode.removesuffix("-start")
            if kind in KINDS:
                inputs = sum(results.get(x, 0) for x in each.operand_names)
                end = ends.get(each.name, each)
                is_lonely_start = kind != each.opcode and end is each
                outputs = 0 if is_lonely_start else shape_bytes(end.shape)
                key = name, each.name, note
                before = found[key].count if key in found else 0
                found[key] = Exchange(
                    kind=kind,
                    instruction=each,
                    end=end,
                    computation=name,
                    count=before + times,
                    num_bytes=max(inputs, outputs),
                    note=note,
                )
            for call in each.calls():
                visit(call.name, times * call.times, note or call.note)

    visit(module.entry, 1, "")
    return list(found.values())


def _is_end(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return opcode.endswith("-done") and opcode.removesuffix("-done") in KINDS
