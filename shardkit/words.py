"""Sizes and meshes in words, the same wherever they are said.

Owns these spellings. It knows no numbers of its own.
"""

from collections.abc import Mapping

__all__ = ["format_bytes", "format_mesh", "format_time"]


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
