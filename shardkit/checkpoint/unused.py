"""Rules that do nothing, which hardly anybody means.

Owns the search for rules and prefixes that match no path of a tree, and for the path
that was meant. It changes nothing about which rule takes what.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from shardkit.checkpoint.applications import Application
from shardkit.checkpoint.rules import Rule

__all__ = ["nearest", "unused_prefixes", "unused_rules"]

_MOST_COMPARED = 5000


def unused_rules(
    rules: Sequence[Rule],
    applications: Iterable[Application],
    paths: Sequence[str],
    *,
    optional: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Lists `(rule, what is wrong)` of rules that take nothing.

    Args:
        rules: The rules.
        applications: What took something.
        paths: All paths.
        optional: Patterns of which nothing need be there.

    >>> unused_rules([Rule("params/layer/{x...}", "l/{x...}")], [], ["params/layers/w"])
    [('rule 1', "params/layer/{x...} matches nothing; did you mean 'params/layers'?")]
    """
    applications, found = list(applications), []
    used = {application.number for application in applications}
    takers = {
        path: application.number
        for application in applications
        for path in application.sources.values()
    }
    for number, rule in enumerate(rules, 1):
        if number in used or {*rule.sources} <= {*optional}:
            continue
        matched = {path for path in paths if rule.match(path) is not None}
        if not matched:
            text = ", ".join(rule.sources)
            hint = nearest(rule.sources[0], paths)
            found.append((f"rule {number}", f"{text} matches nothing{hint}"))
            continue
        # What rules of fewer paths take may be all there is for one that is written for
        # the rest.
        others = {takers.get(path) for path in matched}
        other = next(iter(others))
        if len(others) > 1 or other is None:
            continue
        if any(n == other and path not in matched for path, n in takers.items()):
            problem = f"rule {other} takes all that it matches; write it before that"
            found.append((f"rule {number}", problem))
    return found


def unused_prefixes(
    prefixes: Iterable[str], paths: Sequence[str]
) -> list[tuple[str, str]]:
    """Lists `("follow", what is wrong)` of prefixes with which no path begins."""
    return [
        ("follow", f"no path begins with {prefix}/{nearest(prefix, paths)}")
        for prefix in prefixes
        if not any(path.startswith(f"{prefix}/") for path in paths)
    ]


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """Says which path may have been meant by a pattern; empty if there is none.

    >>> nearest("params/w", ["params/v/w"]), nearest("opt", ["ema/w"])
    ("; did you mean 'params/v/w'?", '')
    """
    paths = list(paths)[:_MOST_COMPARED]
    literal: list[str] = []
    for segment in pattern.split("/"):
        if "{" in segment:
            break
        literal.append(segment)
    beginning, is_whole = "/".join(literal), "{" not in pattern
    parts = {"/".join(path.split("/")[: len(literal)]) for path in paths}
    known: Mapping[str, None] = dict.fromkeys(sorted(parts) if literal else ())
    if is_whole or beginning in known or not literal:
        # What is wrong comes later: say which whole path is like it.
        known = dict.fromkeys([*(known if is_whole else ()), *paths])
        beginning = pattern
    close = difflib.get_close_matches(beginning, [*known], n=1, cutoff=0.55)
    return f"; did you mean {close[0]!r}?" if close else ""
