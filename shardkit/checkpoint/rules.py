"""One rule of a remapping: which arrays become which, and how.

Owns what the names in a rule's patterns mean, and the order in which operations meet
arrays. Invariant: whether the operations fit the patterns is known before there is any
tree; a rule that exists has as many results as places for them. `remap` applies many
rules to a tree.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from shardkit.checkpoint.patterns import Pattern
from shardkit.checkpoint.remap_ops import OPS, Drop, Init, Op, Split
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = ["Key", "Rule", "run_ops"]

T = TypeVar("T")
Key = frozenset[tuple[str, int]]
"""Which of a rule's arrays: the numbers of its names, and under "" its pattern's."""


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Makes targets of sources.

    A name that is in the sources and in the targets stands for the same text in all of
    them, and the rule applies once for each. One that is in the sources alone counts
    arrays that are collected, from 0, and needs an operation that gathers over it
    (`Stack`, `Average`); one in the targets alone counts what is spread, and needs
    `Unstack`.

    Args:
        sources: A pattern or several; none with `Init`.
        targets: A pattern or several; none with `Drop`.
        *ops: What happens in between, in this order.

    Raises:
        ConfigError: If patterns and operations do not fit together.

    >>> from shardkit.checkpoint.remap_ops import Stack, Transpose
    >>> rule = Rule("params/h/{i}/{w}", "params/h/{w}", Stack("i"), Transpose(0, 2, 1))
    >>> rule.inverse().describe()
    'params/h/{w} -> params/h/{i}/{w}'
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    ops: tuple[Op, ...]

    def __init__(
        self, sources: str | Sequence[str], targets: str | Sequence[str], *ops: Op
    ) -> None:
        def as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
            return (texts,) if isinstance(texts, str) else tuple(texts)

        _check_types(sources, targets, ops)
        object.__setattr__(self, "sources", as_tuple(sources))
        object.__setattr__(self, "targets", as_tuple(targets))
        object.__setattr__(self, "ops", ops)
        wrong = self._find_wrong()
        if wrong:
            raise ConfigError(f"rule {self.describe()}: {wrong}")

    @functools.cached_property
    def _froms(self) -> list[Pattern]:
        return [Pattern(text) for text in self.sources]

    @functools.cached_property
    def _tos(self) -> list[Pattern]:
        return [Pattern(text) for text in self.targets]

    @functools.cached_property
    def collected(self) -> frozenset[str]:
        """The names that count what is gathered."""
        return _names(self._froms) - _names(self._tos) if self._tos else frozenset()

    @property
    def init(self) -> Init | None:
        """What makes the targets of a rule without sources."""
        return self.ops[0] if self.ops and isinstance(self.ops[0], Init) else None

    def describe(self) -> str:
        """Spells sources and targets."""
        sides = (", ".join(side) or "nothing" for side in (self.sources, self.targets))
        return " -> ".join(sides)

    def match(self, path: str) -> tuple[int, dict[str, str]] | None:
        """Finds which source pattern a path matches, and what its names stand for."""
        for position, pattern in enumerate(self._froms):
            found = pattern.match(path)
            if found is not None:
                return position, found
        return None

    def match_target(self, path: str) -> bool:
        """Whether a path is one of the rule's targets."""
        return any(pattern.match(path) is not None for pattern in self._tos)

    def source(self, key: Key, bound: Mapping[str, str]) -> str:
        """Writes the path of one source."""
        return _fill(self._froms, key, bound)

    def target(self, key: Key, bound: Mapping[str, str]) -> str:
        """Writes the path of one target."""
        return _fill(self._tos, key, bound)

    def bind(self, bound: Mapping[str, str], ops: Iterable[Op]) -> "Rule":
        """Returns the rule for one application, with other operations."""

        def write(text: str) -> str:
            for name, value in bound.items():
                text = text.replace(f"{{{name}}}", value)
                text = text.replace(f"{{{name}...}}", value)
            return "/".join(segment for segment in text.split("/") if segment)

        return Rule([*map(write, self.sources)], [*map(write, self.targets)], *ops)

    def inverse(self, before: Sequence[Sequence[Sequence[View]]] = ()) -> "Rule":
        """Returns the rule that makes the sources of the targets.

        Args:
            before: For each operation, each list of views that it was applied to.

        Raises:
            ConfigError: If an operation has no inverse, or several.
        """
        if self.init:
            return Rule(self.targets, (), Drop())
        undo: list[Op] = []
        for number, op in enumerate(self.ops):
            calls = before[number] if before else ()
            try:
                found = {op.inverse(views) for views in calls} or {op.inverse()}
            except ConfigError as error:
                raise ConfigError(f"{op.describe()} has no inverse: {error}") from None
            if len(found) > 1:
                raise ConfigError(
                    f"{op.describe()} has one inverse for each of several shapes"
                )
            undo = [*found, *undo]
        return Rule(self.targets, self.sources, *undo)

    def _find_wrong(self) -> str | None:
        """Says what is wrong with the rule, following its arrays through it."""
        special = [op for op in self.ops if isinstance(op, Init | Drop)]
        if special:
            return self._find_wrong_special()
        if not self.sources or not self.targets:
            return "expected a source and a target; say init or drop if that is meant"
        for patterns in (self._froms, self._tos):
            if any(pattern.names != patterns[0].names for pattern in patterns):
                texts = [pattern.text for pattern in patterns]
                return f"expected the same names in each of {texts}"
        labels, num, spread = set(self.collected), len(self.sources), self._spread()
        for op in self.ops:
            label = op.over
            if op.gathers and label is None:
                num = 1
            elif op.gathers:
                if label not in labels:
                    return f"{op.describe()}: {{{label}}} is not in the sources alone"
                labels.discard(label)
            elif op.scatters and label is None:
                if num != 1:
                    return f"{op.describe()}: expected one array, found {num}"
                num = op.num_parts if isinstance(op, Split) else len(self.targets)
            elif op.scatters:
                if label not in spread or label in labels:
                    return f"{op.describe()}: {{{label}}} is not in the targets alone"
                labels.add(label)
        for label in sorted(labels - spread):
            return (
                f"{{{label}}} is in the sources alone: use it in the targets, or "
                f"gather over it (stack, average)"
            )
        for label in sorted(spread - labels):
            return (
                f"{{{label}}} is in the targets alone: use it in the sources, or "
                f"unstack over it"
            )
        if num != len(self.targets):
            return (
                f"{num} arrays come out for {len(self.targets)} targets: fuse, stack, "
                "average or split them"
            )
        return None

    def _find_wrong_special(self) -> str | None:
        """Says what is wrong with a rule that has `Init` or `Drop`."""
        if len(self.ops) != 1:
            return f"{self.ops[0].describe()}: expected no other operation beside it"
        is_init = isinstance(self.ops[0], Init)
        if is_init and (self.sources or not self.targets):
            return "init: expected targets and no sources"
        if not is_init and (self.targets or not self.sources):
            return "drop: expected sources and no targets"
        return None

    def _spread(self) -> set[str]:
        return set(_names(self._tos) - _names(self._froms))


def run_ops(
    ops: Sequence[Op],
    parts: Mapping[Key, T],
    step: Callable[[Op, list[T]], list[T]],
) -> dict[Key, T]:
    """Leads the arrays of one application through the operations.

    Args:
        ops: The operations.
        parts: The arrays, or whatever stands for them.
        step: Applies an operation to one of them, or to those that it gathers.
    """
    parts = dict(parts)
    for op in ops:
        label, groups = op.over or "", {}
        for key, part in parts.items():
            index = dict(key).get(label, 0)
            away = {(label, index)} if op.gathers or op.scatters else set()
            groups.setdefault(key - away, []).append((index, part))
        # Who gathers over a name is rid of it; there is always a number of a pattern.
        is_named = op.scatters or (op.gathers and not label)
        parts = {}
        for rest, group in groups.items():
            made = step(op, [part for _, part in sorted(group, key=lambda p: p[0])])
            for index, part in enumerate(made):
                parts[rest | {(label, index)} if is_named else rest] = part
    return parts


def _check_types(sources: Any, targets: Any, ops: Sequence[Any]) -> None:
    """Refuses what stands in the place of patterns or operations."""
    wrong = []
    for name, side in (("sources", sources), ("targets", targets)):
        texts = [side] if isinstance(side, str) else side
        if isinstance(texts, list | tuple) and all(isinstance(x, str) for x in texts):
            continue
        empty = "; for none, as with Drop() or Init(), write ()"
        wrong.append(
            f"{name}: expected a pattern or a list of them, found {side!r:.80}"
            + (empty if side is None else "")
        )
    for op in ops:
        if isinstance(op, Op):
            continue
        word = op.__name__ if isinstance(op, type) else op
        known = {cls.word: cls for cls in OPS.values()}
        hint = f"operations of sk.checkpoint such as {', '.join(_NAMED)}"
        close = known.get(str(word).lower())
        if close is not None:
            hint = f"sk.checkpoint.{close.__name__}(…)"
        wrong.append(f"ops: expected {hint}, found {word!r:.80}")
    if wrong:
        raise ConfigError(f"Rule({sources!r:.80}, …): " + "; ".join(wrong))


_NAMED = ("Transpose(1, 0)", 'Stack("i")', 'Cast("float32")', "Drop()")


def _names(patterns: Sequence[Pattern]) -> frozenset[str]:
    return frozenset().union(*(pattern.names for pattern in patterns))


def _fill(patterns: Sequence[Pattern], key: Key, bound: Mapping[str, str]) -> str:
    numbers = dict(key)
    values = {name: str(number) for name, number in numbers.items()}
    return patterns[numbers[""]].fill({**bound, **values})
