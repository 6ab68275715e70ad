"""What is made by the rules of a remapping, path by path.

Owns the list of what is made and of what is wrong. Invariant: a target is made once;
everything wrong is listed, not just what is found first. `remap` decides what has to
be accounted for.
"""

from collections.abc import Iterable, Mapping, Sequence

from shardkit.checkpoint.applications import Application
from shardkit.checkpoint.follow import follow, split_path
from shardkit.checkpoint.mapping import Mapped
from shardkit.checkpoint.remap_ops import Drop
from shardkit.checkpoint.rules import Key, Rule, run_ops
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = ["Account", "Spec", "group_followers", "without_root"]

Spec = tuple[tuple[int, ...], str] | None
"""Shape and dtype of a target that is wanted, if the caller has said."""


class Account:
    """What has been made of a tree.

    Attributes:
        views: The targets.
        rows: How each is made.
        dropped: Sources that a rule drops.
        problems: `(path or rule, what is wrong)`.
    """

    def __init__(self, tree: Mapping[str, View]) -> None:
        self._tree = tree
        self.views: dict[str, View] = {}
        self.rows: dict[str, Mapped] = {}
        self.dropped: list[str] = []
        self.problems: list[tuple[str, str]] = []

    def add(
        self,
        target: str,
        view: View,
        sources: Iterable[str],
        ops: Iterable[str] = (),
        rule: int | None = None,
    ) -> None:
        """Notes one target."""
        row = Mapped(
            target, view.shape, view.dtype.name, tuple(sources), ", ".join(ops), rule
        )
        if target in self.rows:
            makers = [_maker(self.rows[target]), _maker(row)]
            self.problems.append((target, f"is made by {' and by '.join(makers)}"))
            return
        self.views[target], self.rows[target] = view, row

    def apply(
        self,
        application: Application,
        groups: Mapping[str, Mapping[str, str]],
        root: str,
    ) -> None:
        """Applies a rule to its sources, and to what follows them.

        Args:
            application: The rule and its sources.
            groups: By what their paths begin with, the paths of what follows, by the
                path of what is followed.
            root: What parameters' paths begin with.
        """
        sources = application.sources
        if application.rule.ops == (Drop(),):
            self.dropped += sources.values()
            for leaves in groups.values():
                self.dropped += leaves.values()
            return
        absent = application.absent()
        for prefix, leaves in groups.items():
            lacking = [path for path in sources.values() if path not in leaves]
            absent += [f"{prefix}/{without_root(path, root)}" for path in lacking]
        if absent:
            where = application.where()
            self.problems += [(path, f"is needed by {where}") for path in absent]
            return
        views = {key: self._tree[path] for key, path in sources.items()}
        try:
            self._apply_rule(application, views)
        except ConfigError as error:
            self.problems.append((application.where(), str(error)))
            return
        for prefix, leaves in groups.items():
            try:
                self._apply_following(application, views, prefix, leaves, root)
            except ConfigError as error:
                path = leaves[next(iter(sources.values()))]
                self.problems.append((path, str(error)))

    def init(self, number: int, rule: Rule, wanted: Mapping[str, Spec]) -> None:
        """Makes the targets of a rule that has no sources."""
        init = rule.init
        assert init is not None
        paths = [path for path in rule.targets if "{" not in path]
        for path in wanted:
            if path not in self.rows and rule.match_target(path):
                paths.append(path)
        for path in dict.fromkeys(paths):
            try:
                view = init.make(path, self._tree, wanted.get(path))
            except ConfigError as error:
                self.problems.append((path, str(error)))
            else:
                sources = [init.like] if init.like else []
                self.add(path, view, sources, [init.describe()], number)

    def compare(self, wanted: Mapping[str, Spec]) -> None:
        """Notes targets that are not wanted, or whose shape or dtype is not."""
        for path, row in self.rows.items():
            if path not in wanted:
                advice = "" if row.rule else "; drop it, or allow it to be left out"
                problem = f"is made by {_maker(row)}, and unwanted{advice}"
                self.problems.append((path, problem))
                continue
            spec, found = wanted[path], (row.shape, row.dtype)
            if spec not in (None, found):
                expected, found = (f"{d}{list(s)}" for s, d in (spec, found))
                self.problems.append(
                    (path, f"is {found}, made by {_maker(row)}; expected {expected}")
                )

    def _apply_rule(self, application: Application, views: dict[Key, View]) -> None:
        rule, sources = application.rule, application.sources.values()
        found = run_ops(rule.ops, views, lambda op, views: op.apply(views))
        words = [op.describe() for op in rule.ops]
        for key, view in found.items():
            target = rule.target(key, application.bound)
            self.add(target, view, sources, words, application.number)

    def _apply_following(
        self,
        application: Application,
        params: dict[Key, View],
        prefix: str,
        leaves: Mapping[str, str],
        root: str,
    ) -> None:
        paths = {key: leaves[path] for key, path in application.sources.items()}
        views = {key: self._tree[path] for key, path in paths.items()}
        done = follow(application.rule, params, views, prefix)
        for key, view in done.views.items():
            target = application.rule.target(key, application.bound)
            target = f"{done.prefixes[key]}/{without_root(target, root)}"
            self.add(target, view, paths.values(), done.ops, application.number)


def group_followers(
    applications: Sequence[Application],
    paths: Iterable[str],
    prefixes: Sequence[str],
    root: str,
) -> tuple[list[dict[str, dict[str, str]]], list[str]]:
    """Finds the paths that follow what the applications take.

    Returns:
        For each application what `Account.apply` takes as its groups, and the paths
        that follow nothing.
    """
    owners = {
        path: number
        for number, application in enumerate(applications)
        for path in application.sources.values()
    }
    tails = {without_root(path, root): path for path in owners}
    groups: list[dict[str, dict[str, str]]] = [{} for _ in applications]
    rest = []
    for path in paths:
        split = split_path(path, tails, prefixes)
        if split is None:
            rest.append(path)
        else:
            prefix, leader = split
            groups[owners[leader]].setdefault(prefix, {})[leader] = path
    return groups, rest


def without_root(path: str, root: str) -> str:
    """Returns a parameter's path as it is in the paths of what follows it.

    >>> without_root("params/a/b", "params")
    'a/b'
    """
    return path.removeprefix(f"{root}/")


def _maker(row: Mapped) -> str:
    what = f"rule {row.rule}" if row.rule else "keep_rest"
    return f"{what} of {row.sources[0]}" if row.sources else what
