"""Where XLA has put the values of a program in its temporary memory.

Owns reading XLA's buffer assignment, the only thing that tells which values share
their memory. It comes as protocol buffers whose fields have fixed numbers, of which few
are needed here; `tests/test_explain_memory.py` says for which versions that holds.
Invariant: what cannot be read is None, and never half of it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["Buffer", "temporary_buffers"]

# The fields of `BufferAssignmentProto`, `HloModuleProto` and what is in them.
_LOGICAL, _ALLOCATION = 1, 3
_LOGICAL_ID, _DEFINED_AT = 1, 3
_SHAPE_INDEX, _INSTRUCTION_ID = 3, 4
_SIZE, _THREAD_LOCAL, _IS_PARAMETER, _LIVE_OUT, _ASSIGNED, _CONSTANT = 2, 3, 5, 7, 9, 12
_ASSIGNED_ID, _OFFSET, _ASSIGNED_SIZE = 1, 2, 3
_COMPUTATION, _INSTRUCTION, _NAME, _ID = 3, 2, 1, 35


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """A value in temporary memory.

    Attributes:
        computation: Where its instruction stands.
        name: The instruction that makes it.
        part: Which part of that, if it is a tuple; -1 for all.
        start: Where it begins, in bytes.
        num_bytes: Its size.
    """

    computation: str
    name: str
    part: int
    start: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.num_bytes

    def overlaps(self, other: "Buffer") -> bool:
        """Whether both lie in the same memory, one after the other."""
        return self.start < other.stop and other.start < self.stop


def temporary_buffers(compiled: jax.stages.Compiled) -> list[Buffer] | None:
    """Lists what shares the temporary memory; None if the backend does not tell."""
    memory: Any = compiled.memory_analysis()
    assignment = getattr(memory, "serialized_buffer_assignment_proto", b"")
    try:
        executable: Any = compiled.runtime_executable()
        module = executable.hlo_modules()[0].as_serialized_hlo_module_proto()
        return _read(assignment, _instruction_names(module)) if assignment else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _read(assignment: bytes, names: dict[int, tuple[str, str]]) -> list[Buffer]:
    made: dict[int, tuple[int, int]] = {}
    allocations: list[bytes] = []
    for field, value in _fields(assignment):
        if field == _LOGICAL:
            table = dict(_fields(value))
            place = list(_fields(table[_DEFINED_AT]))
            index = [n for key, packed in place if key == _SHAPE_INDEX for n in packed]
            instruction = dict(place)[_INSTRUCTION_ID]
            made[table.get(_LOGICAL_ID, 0)] = instruction, (index or [-1])[0]
        elif field == _ALLOCATION:
            allocations.append(value)
    found = []
    for allocation in allocations:
        fields = list(_fields(allocation))
        table = dict(fields)
        kept = (_THREAD_LOCAL, _IS_PARAMETER, _LIVE_OUT, _CONSTANT)
        if any(table.get(field) for field in kept):
            continue
        for each in (dict(_fields(v)) for key, v in fields if key == _ASSIGNED):
            instruction, part = made[each.get(_ASSIGNED_ID, 0)]
            start, size = each.get(_OFFSET, 0), each.get(_ASSIGNED_SIZE, 0)
            found.append(Buffer(*names[instruction], part, start, size))
    return found


def _instruction_names(module: bytes) -> dict[int, tuple[str, str]]:
    found = {}
    for field, value in _fields(module):
        if field != _COMPUTATION:
            continue
        entries = list(_fields(value))
        name = dict(entries)[_NAME].decode()
        for key, each in entries:
            if key == _INSTRUCTION:
                table = dict(_fields(each))
                found[table[_ID]] = name, table[_NAME].decode()
    return found


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the numbers and values of the fields of a protocol buffer.

    >>> list(_fields(bytes([8, 150, 1, 18, 2, 104, 105])))
    [(1, 150), (2, b'hi')]
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > len(message):
            raise ValueError("a field that does not end")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
