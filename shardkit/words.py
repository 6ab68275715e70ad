"""Sizes and meshes in words, the same wherever they are said.

Owns these spellings. It knows no numbers of its own.
"""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "format_bytes",
    "format_mesh",
    "format_microbatches",
    "format_plan",
    "format_time",
]


def format_mesh(mesh: Mapping[str, int]) -> str:
    """Writes the axes larger than 1.

    >>> format_mesh({"data": 2, "fsdp": 4}), format_mesh({})
    ('data=2 fsdp=4', 'single device')
    """
    axes = [f"{axis}={size}" for axis, size in mesh.items() if size > 1]
    return " ".join(axes) or "single device"


def format_bytes(num_bytes: float) -> str:
    """Writes a size with three digits.

    >>> format_bytes(512), format_bytes(3_400_000)
    ('512 B', '3.24 MiB')
    """
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        num_bytes /= 1024
        # From 1000 on, three digits would be written with an exponent.
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
    return f"{num_bytes / 1024:.3g} TiB"


def format_time(spent_ms: float) -> str:
    """Writes a time with at most three digits.

    >>> [format_time(ms) for ms in (260_000, 19_760, 2310, 14.2, 0.31)]
    ['260 s', '19.8 s', '2.31 s', '14 ms', '0.3 ms']
    """
    if spent_ms >= 1000:
        spent_s = spent_ms / 1000
        return f"{spent_s:.{max(0, 3 - len(str(int(spent_s))))}f} s"
    return f"{spent_ms:.0f} ms" if spent_ms >= 10 else f"{spent_ms:.1f} ms"


def format_microbatches(num: int) -> str:
    """Spells how many there are.

    Example:
        >>> format_microbatches(1), format_microbatches(8)
        ('1 microbatch', '8 microbatches')
    """
    return f"{num} microbatch" + "es" * (num != 1)


def format_plan(fields: Mapping[str, Any]) -> str:
    """Writes which mesh was chosen, and what is worth knowing of that, in two lines.

    >>> print(format_plan({"step": 0, "num_devices": 8, "mesh": {"data": 7},
    ...     "step_s": 2.2, "memory_bytes": 2**34, "limit_bytes": 2**36,
    ...     "runners_up": [], "notes": ["1 of 8 devices stay idle"],
    ...     "consistency": None}))
    step 0: mesh data=7 for 8 devices: 2.20 s a step predicted, 16 of 64 GiB a device
      1 of 8 devices stay idle
    """
    used, most = (format_bytes(fields[x]) for x in ("memory_bytes", "limit_bytes"))
    if used.split()[-1] == most.split()[-1]:
        used = used.split()[0]
    spent = format_time(1e3 * fields["step_s"])
    words = [
        f"step {fields['step']}: mesh {format_mesh(fields['mesh'])} for "
        f"{fields['num_devices']} devices: {spent} a step predicted, {used} of {most} "
        "a device"
    ]
    words += ["equivalent"] if fields["consistency"] == "equivalent" else []
    others = fields["runners_up"][:1]
    more = fields["notes"] or [
        f"next {format_mesh(x['mesh'])}: {x['why']}" for x in others
    ]
    lines = [", ".join(words)] + (["; ".join(more)] if more else [])
    return "\n  ".join(lines)
