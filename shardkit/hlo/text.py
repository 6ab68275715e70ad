"""The instructions in the text of a compiled program.

Owns reading XLA's HLO text: computations, instructions, who calls whom and how often,
the bytes of shapes, and the lines of source that an instruction comes from. Invariant:
text that it does not know is left out, never guessed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

__all__ = [
    "Call",
    "Frame",
    "Instruction",
    "Module",
    "parse_module",
    "shape_bytes",
    "shape_parts",
]

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|true_computation"
    r"|false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_METADATA = re.compile(r'\bmetadata=\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\}')
_ENTRY = re.compile(r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|(\d+))')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

IN_LOOP, IN_BRANCH = "per pass of a loop", "if a branch is taken"


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A line of source: `""` and 0 where the text does not tell."""

    file: str
    line: int
    function: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A computation that an instruction runs: how often, and as what part of it."""

    name: str
    times: int
    note: str
    role: str


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Without the `%`.
        shape: What it makes, as XLA spells it.
        opcode: Such as `"all-gather"`.
        operands: The text between the brackets.
        attributes: What follows them.
        is_root: Whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    is_root: bool = False

    @property
    def operand_names(self) -> list[str]:
        """The instructions that it reads."""
        return _NAME.findall(self.operands)

    @property
    def number(self) -> int:
        """Which parameter it is, or which part of a tuple it takes; -1 for others."""
        if self.opcode == "parameter":
            return int(self.operands.strip("()"))
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if found else -1

    @property
    def metadata(self) -> dict[str, str]:
        """What the text says of where it comes from, such as `op_name`."""
        found = _METADATA.search(self.attributes)
        entries = _ENTRY.findall(found[1]) if found else []
        return {
            key: re.sub(r"\\(.)", r"\1", text) if text else number
            for key, text, number in entries
        }

    @property
    def op_name(self) -> str:
        """What JAX calls the operation, with all that it is in; or `""`."""
        return self.metadata.get("op_name", "")

    def calls(self) -> Iterator[Call]:
        """Yields the computations that it runs."""
        if self.opcode.endswith(("-update", "-done")):
            return
        trip_count = _TRIP_COUNT.search(self.attributes)
        for role, names in _CALLED.findall(self.attributes):
            times, note = 1, ""
            if self.opcode == "while":
                times = int(trip_count.group(1)) if trip_count else 1
                note = "" if trip_count else IN_LOOP
            elif self.opcode == "conditional":
                note = IN_BRANCH
            elif role == "to_apply" and self.opcode != "call":
                # How two numbers are put together; no collective is in there.
                continue
            for name in _NAME.findall(names):
                yield Call(name, times, note, role)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        computations: The instructions of each, in the order of the text.
        entry: Which of them is run.
        tables: Those of stack frames, row by row.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    tables: dict[str, dict[int, str]]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The arguments of the program."""
        found = self.computations.get(self.entry, [])
        return sorted(
            (i for i in found if i.opcode == "parameter"), key=lambda i: i.number
        )

    @property
    def results(self) -> list[Instruction]:
        """What the program returns: one instruction, which can be a tuple."""
        return [i for i in self.computations.get(self.entry, []) if i.is_root]

    def frames(self, instruction: Instruction) -> list[Frame]:
        """Returns the lines that an instruction comes from, the innermost first."""
        metadata = instruction.metadata
        if "source_file" in metadata:
            line = int(metadata.get("source_line", 0))
            return [Frame(metadata["source_file"], line)]
        found, number = [], int(metadata.get("stack_frame_id", 0))
        while number > 0:
            row = _numbers(self.tables["StackFrames"].get(number, ""))
            place = self.tables["FileLocations"].get(row.get("file_location_id", 0), "")
            where = _numbers(place)
            file = self.tables["FileNames"].get(where.get("file_name_id", 0), "")
            function = self.tables["FunctionNames"].get(
                where.get("function_name_id", 0), ""
            )
            if file:
                frame = Frame(file.strip('"'), where["line"], function.strip('"'))
                found.append(frame)
            # Parents are written one higher than they are, so that 1 is none.
            parent = row.get("parent_frame_id", 0) - 1
            number = parent if parent < number else 0
        return found


def parse_module(text: str) -> Module:
    """Reads a module.

    Args:
        text: What `Compiled.as_text` returns.
    """
    found: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    current, entry, table = "", "", ""
    for line in text.splitlines():
        if line in tables:
            table = line
        elif table and line[:1].isdigit():
            number, _, row = line.partition(" ")
            tables[table][int(number)] = row
        elif line.endswith("{") and line.startswith(("%", "ENTRY ")):
            current, table = _NAME.findall(line)[0], ""
            found[current] = []
            entry = current if line.startswith("ENTRY ") else entry
        elif line.startswith(" ") and " = " in line and current:
            found[current].append(_instruction(line))
    return Module(found, entry, tables)


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


def shape_parts(shape: str) -> list[str]:
    """Lists the arrays of a shape, without their layouts.

    Example:
        >>> shape_parts("(f32[2,3]{1,0}, s4[3]{0})")
        ['f32[2,3]', 's4[3]']
    """
    return [f"{dtype}[{dims}]" for dtype, dims in _SHAPE.findall(shape)]


def _numbers(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}


def _instruction(line: str) -> Instruction:
    line = line.strip()
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        end = _closing(rest)
        shape, rest = rest[:end], rest[end:].lstrip()
    else:
        shape, _, rest = rest.partition(" ")
    end = rest.find("(")
    opcode, rest = rest[:end], rest[end:]
    end = _closing(rest)
    return Instruction(name.lstrip("%"), shape, opcode, rest[:end], rest[end:], is_root)


def _closing(text: str) -> int:
    """Returns where the bracket that `text` begins with has been closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
