"""Which rule takes which paths of a tree.

Owns matching. Invariant: a path is taken by the first rule with a pattern that matches
it, or by none; what an application of a rule needs and what it found are compared. It
applies nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shardkit.checkpoint.rules import Key, Rule

__all__ = ["Application", "match_rules"]


_MAX_LISTED = 100


@dataclasses.dataclass
class Application:
    """A rule with what its names stand for, and the sources that it takes.

    Attributes:
        number: The rule's number, from 1.
        rule: The rule.
        bound: What the names stand for that are in sources and targets.
        sources: The paths it takes.
    """

    number: int
    rule: Rule
    bound: dict[str, str]
    sources: dict[Key, str] = dataclasses.field(default_factory=dict)

    def where(self) -> str:
        """Names the application, for errors."""
        return f"rule {self.number} for {next(iter(self.sources.values()))}"

    def absent(self) -> list[str]:
        """Lists the paths that the rule needs and that are not there."""
        numbers = {"": range(len(self.rule.sources))}
        for name in self.rule.collected:
            numbers[name] = range(max(dict(key)[name] for key in self.sources) + 1)
        if len(self.sources) == math.prod(map(len, numbers.values())):
            return []
        lacking = (key for key in _keys(numbers) if key not in self.sources)
        # A path numbered a billion makes a billion others absent.
        some = itertools.islice(lacking, _MAX_LISTED)
        return [self.rule.source(key, self.bound) for key in some]


def match_rules(
    rules: Sequence[Rule], paths: Iterable[str]
) -> tuple[list[Application], list[str], list[tuple[str, str]]]:
    """Gives every path to the first rule that matches it.

    Returns:
        The applications in the order of their first paths, the paths that no rule
        takes, and `(path, what is wrong)` of those whose numbers are none.
    """
    found: dict[tuple, Application] = {}
    rest, problems = [], []
    for path in paths:
        number, match = _first(rules, path)
        if match is None:
            rest.append(path)
            continue
        (position, values), rule = match, rules[number - 1]
        bound = {n: v for n, v in values.items() if n not in rule.collected}
        counted = {name: values[name] for name in rule.collected}
        if not all(map(_is_number, counted.values())):
            problems.append((path, f"rule {number}: expected numbers, found {counted}"))
            continue
        identity = number, *sorted(bound.items())
        application = found.setdefault(identity, Application(number, rule, bound))
        numbers = {"": position, **{n: int(text) for n, text in counted.items()}}
        application.sources[frozenset(numbers.items())] = path
    return list(found.values()), rest, problems


def _first(
    rules: Sequence[Rule], path: str
) -> tuple[int, tuple[int, dict[str, str]] | None]:
    for number, rule in enumerate(rules, 1):
        match = rule.match(path)
        if match is not None:
            return number, match
    return 0, None


def _is_number(text: str) -> bool:
    # As it would be written: 01 has no way back.
    return (
        text.isascii()
        and text.isdecimal()
        and len(text) < 10
        and (text == str(int(text)))
    )


def _keys(numbers: Mapping[str, range]) -> Iterator[Key]:
    """Yields every choice of one number for each name, without listing them first."""
    if not numbers:
        yield frozenset()
        return
    (name, choices), *rest = numbers.items()
    for number in choices:
        for key in _keys(dict(rest)):
            yield key | {(name, number)}
