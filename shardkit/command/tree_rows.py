"""Paths as an indented tree, for terminals that are narrower than paths are long.

Owns the shape of that tree and nothing else.
"""

from collections.abc import Sequence

__all__ = ["tree_rows"]

_INDENT = "  "


def tree_rows(paths: Sequence[str]) -> list[tuple[str, int | None]]:
    """Lists the lines of a tree.

    Args:
        paths: Distinct paths; what has a parent in common stays together.

    Returns:
        The text of each line, and the number of its path; None for a parent alone.

    >>> tree_rows(["step", "params/up/kernel", "params/down/kernel"])
    [('step', 0), ('params', None), ('  up/kernel', 1), ('  down/kernel', 2)]
    """
    return _lines([(path.split("/"), number) for number, path in enumerate(paths)], "")


def _lines(
    leaves: Sequence[tuple[list[str], int]], indent: str
) -> list[tuple[str, int | None]]:
    groups: dict[str, list[tuple[list[str], int]]] = {}
    for parts, number in leaves:
        groups.setdefault(parts[0], []).append((parts[1:], number))
    lines: list[tuple[str, int | None]] = []
    for name, group in groups.items():
        if len(group) == 1:
            ((rest, number),) = group
            lines.append((indent + "/".join([name, *rest]), number))
            continue
        # Parents that have one child only share its line.
        while all(rest and rest[0] == group[0][0][0] for rest, _ in group):
            name = f"{name}/{group[0][0][0]}"
            group = [(rest[1:], number) for rest, number in group]
        lines += [(indent + name, number) for rest, number in group if not rest] or [
            (indent + name, None)
        ]
        lines += _lines([leaf for leaf in group if leaf[0]], indent + _INDENT)
    return lines
