"""What a compiled program costs.

Owns `ProgramReport`: work, memory and collectives of one executable, as XLA tells
them. It compiles and runs nothing.
"""

import dataclasses
from typing import Any

import jax

from shardkit.hlo import Collective, find_collectives

__all__ = ["ProgramReport", "report_program"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One program on one device of its mesh; None where XLA does not tell.

    Attributes:
        name: What events call it.
        num_devices: On how many devices it runs.
        flops: XLA's estimate, which takes one pass of every loop.
        bytes_accessed: By the same estimate, from and to memory.
        argument_bytes: What it is called with.
        output_bytes: What it returns.
        reused_bytes: What of that lies where the arguments lay.
        temp_bytes: What it needs besides while it runs.
        code_bytes: The code itself; 0 on the CPU, where XLA does not count it.
        collectives: What devices exchange, by kind.
        compiled: The program itself, for `sk.explain_program`.
    """

    name: str
    num_devices: int
    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    reused_bytes: int | None
    temp_bytes: int | None
    code_bytes: int | None
    collectives: tuple[Collective, ...]
    compiled: jax.stages.Compiled = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        rows = [
            ("work *", _scaled(self.flops, "FLOP", 1000)),
            ("memory accessed *", _bytes(self.bytes_accessed)),
            ("arguments", _bytes(self.argument_bytes)),
            ("results", _bytes(self.output_bytes)),
            ("  of these in place", _bytes(self.reused_bytes)),
            ("temporary", _bytes(self.temp_bytes)),
            # XLA says 0 where it does not count.
            ("code", _bytes(self.code_bytes or None)),
        ]
        rows += [
            (f"{c.count} x {c.kind}", f"{_bytes(c.num_bytes)}  {c.note}".rstrip())
            for c in self.collectives
        ]
        width = max(len(label) for label, _ in rows)
        title = f"{self.name} on {self.num_devices} devices, per device and execution"
        note = "  * XLA's estimate, with one pass of every loop: a part of the work"
        return "\n".join([title, *(f"  {a:<{width}}  {b}" for a, b in rows), note])


def report_program(
    name: str, num_devices: int, compiled: jax.stages.Compiled
) -> ProgramReport:
    """Reports what XLA knows of a compiled program.

    Example:
        >>> compiled = jax.jit(lambda x: x @ x).lower(jax.numpy.ones((4, 4))).compile()
        >>> report = report_program("square", 1, compiled)
        >>> report.argument_bytes, report.collectives
        (64, ())
    """
    cost: Any = compiled.cost_analysis() or {}
    memory: Any = compiled.memory_analysis()
    return ProgramReport(
        name=name,
        num_devices=num_devices,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        argument_bytes=getattr(memory, "argument_size_in_bytes", None),
        output_bytes=getattr(memory, "output_size_in_bytes", None),
        reused_bytes=getattr(memory, "alias_size_in_bytes", None),
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        code_bytes=getattr(memory, "generated_code_size_in_bytes", None),
        collectives=find_collectives(compiled.as_text() or ""),
        compiled=compiled,
    )


def _bytes(number: float | None) -> str:
    return _scaled(number, "B", 1024)


def _scaled(number: float | None, unit: str, base: int) -> str:
    """Writes a number with a prefix.

    >>> _scaled(3 * 2**20, "B", 1024), _scaled(12e9, "FLOP", 1000)
    ('3.0 MiB', '12.0 GFLOP')
    """
    if number is None:
        return "not known"
    infix = "i" if base == 1024 else ""
    value = float(number)
    for prefix in ("", "k" if base == 1000 else "K", "M", "G", "T"):
        if value < base or prefix == "T":
            break
        value /= base
    digits = 1 if prefix else 0
    return f"{value:.{digits}f} {prefix}{infix if prefix else ''}{unit}"
