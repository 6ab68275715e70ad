"""From any checkpoint's tree to any other's.

Owns which rule takes which path, and the account of all paths. Invariant: a source is
taken once, a target made once, and whatever is left over on either side is an error
unless a rule or the caller allowed it. Nothing is read: what comes out are views, so a
remapping costs no memory, and a box of its results as much as the box.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardkit.checkpoint.account import Account, Spec, group_followers
from shardkit.checkpoint.applications import Application, match_rules
from shardkit.checkpoint.mapping import MappingTable, counted, format_rows
from shardkit.checkpoint.patterns import Pattern
from shardkit.checkpoint.remap_ops import Op
from shardkit.checkpoint.remap_toml import parse_remap, spell_remap
from shardkit.checkpoint.rules import Rule, run_ops
from shardkit.checkpoint.unused import unused_prefixes, unused_rules
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError, RestoreError, reason

__all__ = ["FOLLOWERS", "Remap", "load_rules"]

FOLLOWERS = ("opt_state", "ema", "grad_exponent")
"""What in a training state of shardkit has a place for every parameter."""


@dataclasses.dataclass(frozen=True)
class Remap:
    """Rules that make one tree of another; the first that matches a path takes it.

    Args:
        rules: The rules, written for parameters.
        keep_rest: Whether what no rule takes is passed unchanged. Then a rule that
            matches nothing is an error, unless its sources are in `allow`.
        follow: What the paths of arrays that follow parameters begin with: by default
            what a training state of shardkit has, `FOLLOWERS`, as far as it is there.
            If such a path ends in the path of a parameter, then
            the parameter's rule holds for it too, unless a rule takes it by name.
        root: What parameters' paths begin with; the paths of what follows lack it.
        allow: Patterns of sources that may be left behind where they are not wanted,
            and of wanted targets that may not be made.

    >>> from shardkit.checkpoint.remap_ops import Transpose
    >>> from shardkit.checkpoint.views import ArrayView
    >>> remap = Remap([Rule("params/{w}", "params/{w}_t", Transpose(1, 0))])
    >>> remap.apply({"params/a": ArrayView(np.zeros((2, 3)))})
    {'params/a_t': TransposeView(float64[3, 2])}
    """

    rules: Sequence[Rule]
    keep_rest: bool = dataclasses.field(default=False, kw_only=True)
    follow: Sequence[str] = dataclasses.field(default=FOLLOWERS, kw_only=True)
    root: str = dataclasses.field(default="params", kw_only=True)
    allow: Sequence[str] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.rules, Rule):
            raise ConfigError(
                "rules: expected a list, found a rule; write Remap([rule, …]): "
                f"{self.rules.describe()}"
            )
        for name in ("rules", "follow", "allow"):
            if isinstance(value := getattr(self, name), str | os.PathLike):
                advice = f"Remap([rule, …]), or load_rules({str(value)!r}) for a file"
                if name != "rules":
                    advice = f"{name}=[{str(value)!r}]"
                raise ConfigError(
                    f"{name}: expected a list, found {str(value)!r}; write {advice}"
                )
        if bad := [x for x in self.rules if not isinstance(x, Rule)]:
            raise ConfigError(
                f"rules: expected each to be a Rule, found {bad[0]!r:.80}"
            )
        for name in ("rules", "follow", "allow"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for text in self.allow:
            Pattern(text)

    def apply(self, tree: Mapping[str, View], wanted: Any = None) -> dict[str, View]:
        """Makes the targets, as views of the sources.

        Args:
            tree: The sources by their paths.
            wanted: The paths of the targets that have to come out, or a mapping from
                them to anything with shape and dtype, which are then compared.

        Raises:
            RestoreError: If anything on either side is unaccounted for.
        """
        account, table = self._resolve(tree, wanted)
        wrong = table.wrong()
        if wrong:
            advice = ""
            if table.unmatched or table.missing:
                # Where keep_rest is set, nothing is unmatched.
                more = (
                    table.unmatched and ", or set keep_rest to pass sources unchanged"
                )
                advice = (
                    "\nWrite a rule for each (drop and init leave a path out or make "
                    f"it anew){more or ''}."
                )
            raise RestoreError(
                f"{counted(len(wrong), 'path')} cannot be remapped:\n"
                f"{format_rows(wrong)}{advice}"
            )
        return account.views

    def plan(self, tree: Mapping[str, View], wanted: Any = None) -> MappingTable:
        """Says what `apply` would do, whether or not it would succeed."""
        return self._resolve(tree, wanted)[1]

    def inverse(self, tree: Mapping[str, View] | None = None) -> "Remap":
        """Returns the remapping that undoes this one to the bit.

        Args:
            tree: The sources, for rules whose inverse depends on their shapes. A rule
                whose inverses differ becomes one for each of its applications.

        Raises:
            ConfigError: Naming the rules that have no inverse.
        """
        applications = match_rules(self.rules, tree or ())[0]
        rules, problems = [], []
        for number, rule in enumerate(self.rules, 1):
            mine = [each for each in applications if each.number == number]
            try:
                rules += _invert(rule, mine, tree or {})
            except ConfigError as error:
                problems.append((f"rule {number}", rule.describe(), str(error)))
        if problems:
            raise ConfigError(
                f"{len(problems)} of {len(self.rules)} rules have no inverse:\n"
                f"{format_rows(problems)}"
            )
        return dataclasses.replace(self, rules=rules)

    def to_toml(self) -> str:
        """Spells the remapping as TOML, which `from_toml` reads."""
        options = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "rules"
            and (value := getattr(self, field.name)) != field.default
        }
        return spell_remap(self.rules, options)

    @classmethod
    def from_toml(cls, text: str, where: str = "remap rules") -> "Remap":
        r"""Reads a remapping.

        Args:
            text: TOML with one `[[rule]]` for each rule, and this class's other
                arguments above them.
            where: What to call the text in errors, such as its file.

        Raises:
            ConfigError: Saying what is wrong, for all rules at once.

        >>> text = '[[rule]]\nfrom = "a/{x}"\nto = "b/{x}"\nops = []'
        >>> Remap.from_toml(text).rules[0].describe()
        'a/{x} -> b/{x}'
        """
        rules, options = parse_remap(text, where)
        return cls(rules, **options)

    def _resolve(
        self, tree: Mapping[str, View], wanted: Any
    ) -> tuple[Account, MappingTable]:
        account, specs = Account(tree), _specs(wanted)
        applications, rest, account.problems = match_rules(self.rules, tree)
        groups, rest = group_followers(applications, rest, self.follow, self.root)
        for application, followers in zip(applications, groups, strict=True):
            account.apply(application, followers, self.root)
        patterns = [Pattern(text) for text in self.allow]

        def is_allowed(path: str) -> bool:
            return any(pattern.match(path) is not None for pattern in patterns)

        if self.keep_rest:
            unwanted = [p for p in rest if specs is not None and p not in specs]
            left = {path for path in unwanted if is_allowed(path)}
            for path in rest:
                if path not in left:
                    account.add(path, tree[path], [path])
            rest = [path for path in rest if path in left]
            account.problems += unused_rules(
                self.rules, applications, [*tree], optional=self.allow
            )
        others = [prefix for prefix in self.follow if prefix not in FOLLOWERS]
        account.problems += unused_prefixes(others, [*tree])
        for number, rule in enumerate(self.rules, 1):
            if rule.init:
                account.init(number, rule, specs or {})
        if specs is not None:
            account.compare(specs)
        missing = [path for path in specs or {} if path not in account.rows]
        allowed = {path for path in (*rest, *missing) if is_allowed(path)}
        return account, MappingTable(
            rows=list(account.rows.values()),
            dropped=account.dropped,
            allowed=sorted(allowed),
            unmatched=[path for path in rest if path not in allowed],
            missing=[path for path in missing if path not in allowed],
            problems=account.problems,
        )


def load_rules(path: str | Path) -> Remap:
    """Reads a file of rules in TOML: see `Remap.from_toml`.

    Raises:
        ConfigError: If it cannot be read, or saying all that is wrong in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {reason(error):.200}") from None
    return Remap.from_toml(text, str(path))


def _specs(wanted: Any) -> dict[str, Spec] | None:
    if wanted is None or not isinstance(wanted, Mapping):
        return None if wanted is None else dict.fromkeys(wanted)
    return {
        path: (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in wanted.items()
    }


def _invert(
    rule: Rule, applications: Sequence[Application], tree: Mapping[str, View]
) -> list[Rule]:
    """Inverts a rule, in parts if it does different things to different shapes."""
    calls = [_calls(application, tree) for application in applications]
    before = [
        [call for part in parts for call in part] for parts in zip(*calls, strict=True)
    ]
    try:
        return [rule.inverse(before)]
    except ConfigError:
        if len(applications) < 2:
            raise
    return [
        rule.bind(application.bound, rule.ops).inverse(before)
        for application, before in zip(applications, calls, strict=True)
    ]


def _calls(
    application: Application, tree: Mapping[str, View]
) -> list[list[list[View]]]:
    """Lists, for each operation of a rule, what it is applied to."""
    found: list[list[list[View]]] = []

    def step(op: Op, views: list[View]) -> list[View]:
        found[-1].append(views)
        return op.apply(views)

    parts = {key: tree[path] for key, path in application.sources.items()}
    for op in application.rule.ops:
        found.append([])
        parts = run_ops([op], parts, step)
    return found
