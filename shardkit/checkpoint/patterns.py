"""Patterns of paths.

Owns what `{name}` and `{name...}` in a path stand for. Invariant: a path matches in at
most one way, found without trying others: a name takes as little as it can from left
to right, so hostile patterns and paths cost no more than their lengths multiplied. It
knows nothing of trees or rules.
"""

import re
from collections.abc import Mapping

from shardkit.errors import ConfigError

__all__ = ["Pattern"]

_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_MANY = re.compile(r"\{[A-Za-z_][A-Za-z0-9_]*\.\.\.\}")


class Pattern:
    """A path in which `{name}` stands for text without `/`.

    `{name}` takes one character or more. `{name...}` is a segment by itself, takes any
    number of whole segments, none included, and may be there once. A name that comes
    again stands for the same text.

    Args:
        text: The pattern, such as `params/layers/{i}/{rest...}`.

    Raises:
        ConfigError: If it is none.

    >>> pattern = Pattern("params/layers/{i}/{rest...}")
    >>> pattern.match("params/layers/7/mlp/kernel")
    {'rest': 'mlp/kernel', 'i': '7'}
    >>> pattern.fill({"i": "0", "rest": ""})
    'params/layers/0'
    """

    def __init__(self, text: str) -> None:
        self.text = text
        segments = text.split("/")
        many = [n for n, segment in enumerate(segments) if _MANY.fullmatch(segment)]
        if len(many) > 1:
            raise _error(
                text, f"expected one {{name...}} at most, found {len(many)}; use rules"
            )
        self._many = many[0] if many else None
        self._parts = [
            [] if n == self._many else _parse(text, segment)
            for n, segment in enumerate(segments)
        ]
        one = {name for parts in self._parts for name in parts[1::2]}
        self.segment_names = frozenset(segments[n][1:-4] for n in many)
        if one & self.segment_names:
            raise _error(text, "a name stands for text or for segments, not for both")
        self.names = self.segment_names | one

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def match(self, path: str) -> dict[str, str] | None:
        """Finds what the names stand for in a path, or None if it does not match."""
        segments, parts = path.split("/"), self._parts
        found: dict[str, str] = {}
        if self._many is not None:
            head, end = self._many, len(segments) - (len(parts) - self._many - 1)
            if end < head:
                return None
            (name,) = self.segment_names
            found[name] = "/".join(segments[head:end])
            segments = segments[:head] + segments[end:]
            parts = parts[:head] + parts[head + 1 :]
        if len(segments) != len(parts):
            return None
        for segment, part in zip(segments, parts, strict=True):
            if not _match_segment(part, segment, found):
                return None
        return found

    def fill(self, values: Mapping[str, str]) -> str:
        """Writes the path in which the names stand for these values."""
        filled = re.sub(r"\{(\w+)(\.\.\.)?\}", lambda m: values[m[1]], self.text)
        if self._many is None:
            return filled
        return "/".join(segment for segment in filled.split("/") if segment)


def _error(pattern: str, wrong: str) -> ConfigError:
    return ConfigError(
        f"pattern {pattern!r}: {wrong}. Write paths such as "
        "'params/layers/{i}/{rest...}'."
    )


def _parse(pattern: str, segment: str) -> list[str]:
    """Splits a segment into literals at even places and names at odd ones."""
    parts = _NAME.split(segment)
    literals = parts[::2]
    if not segment:
        raise _error(pattern, "a segment is empty")
    if any("{" in literal or "}" in literal for literal in literals):
        raise _error(
            pattern,
            f"{segment!r} has a brace of no {{name}}, and of no {{name...}} that is a "
            "segment by itself",
        )
    if not all(literals[1:-1]):
        raise _error(pattern, f"nothing separates two names in {segment!r}")
    return parts


def _match_segment(parts: list[str], text: str, found: dict[str, str]) -> bool:
    """Matches one segment, and adds what its names stand for."""
    if len(parts) == 1:
        return text == parts[0]
    if not text.startswith(parts[0]):
        return False
    position = len(parts[0])
    for at in range(1, len(parts), 2):
        name, after = parts[at], parts[at + 1]
        if name in found:
            stop = position + len(found[name])
            if text[position:stop] != found[name] or not text.startswith(after, stop):
                return False
        elif at == len(parts) - 2:
            stop = len(text) - len(after)
        else:
            stop = text.find(after, position + 1)
        if stop <= position or not text.startswith(after, stop):
            return False
        found[name] = text[position:stop]
        position = stop + len(after)
    return position == len(text)
