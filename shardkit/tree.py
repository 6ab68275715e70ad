"""Pytrees as lists of named leaves.

Owns the one spelling of a leaf's path (`params/blocks/0/kernel`), used by error
messages, digests, rules and checkpoints alike. It knows nothing of devices.
"""

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

__all__ = [
    "find_rule",
    "format_table",
    "map_named",
    "match_path",
    "named_leaves",
    "path_string",
]


T = TypeVar("T")


def path_string(path: tuple[Any, ...]) -> str:
    """Spells a JAX key path as `a/b/0`.

    Example:
        >>> paths = jax.tree_util.tree_flatten_with_path({"a": [1, 2]})[0]
        >>> [path_string(path) for path, _ in paths]
        ['a/0', 'a/1']
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Lists `(path, leaf)` in flattening order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [(path_string(path), leaf) for path, leaf in leaves]


def map_named(
    fn: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Maps `fn(path, leaf, *rest_leaves)` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_string(path), *leaves),
        tree,
        *rest,
        is_leaf=is_leaf,
    )


def find_rule(path: str, rules: Mapping[Any, T]) -> tuple[Any, T] | None:
    """Returns the first rule that fits a path, and its value.

    Args:
        path: Of a leaf.
        rules: By globs, in which `*` stands for any text, `/` in it or not, and `**/`
            for any number of parents, 0 too; or by compiled regexes, which are searched
            for.

    Example:
        >>> find_rule("layers/0/kernel", {"**/kernel": 1, "*": 2})
        ('**/kernel', 1)
    """
    for pattern, value in rules.items():
        if isinstance(pattern, re.Pattern):
            fits = pattern.search(path) is not None
        else:
            fits = any(fnmatch.fnmatchcase(path, glob) for glob in _spellings(pattern))
        if fits:
            return pattern, value
    return None


def match_path(path: str, rules: Mapping[Any, T]) -> T | None:
    """Returns the value of the first rule that fits a path; see `find_rule`."""
    found = find_rule(path, rules)
    return found and found[1]


def _spellings(pattern: str) -> list[str]:
    """Spells a glob out for `fnmatch`, to which `**/` is never nothing."""
    head, found, tail = f"/{pattern}".partition("/**/")
    if not found:
        return [pattern]
    between = ("/**/", "/")
    return [f"{head}{text}{rest}"[1:] for rest in _spellings(tail) for text in between]


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Aligns rows of strings into indented columns, for error messages."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
