"""What a program must not exchange, for checks that fail where it does.

Owns the spelling of rules, and which collectives break them. Invariant: what moves
nothing, as over an axis of size 1, breaks none.
"""

import dataclasses
import re
from collections.abc import Sequence

from shardkit.errors import ConfigError
from shardkit.explain.exchanges import CAUSES, Exchanged
from shardkit.hlo.collectives import KINDS
from shardkit.mesh import MESH_AXES

__all__ = ["Rule", "find_broken", "parse_rule"]

_UNITS = {
    **{"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
}
_RULE = re.compile(
    r"(?P<total>total )?(?P<what>[a-z-]+|\*)(?:@(?P<axis>[\w]+))?"
    r"(?:>(?P<size>\d+(?:\.\d+)?) ?(?P<unit>[A-Za-z]*))?"
)
_ANY = "*"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: As it was given.
        what: A kind of collective, a cause, or `"*"`.
        axis: The mesh axis that it must go over to count; `""` for any.
        limit_bytes: More than this is forbidden.
        is_total: Whether that is of all together, not of each.
    """

    text: str
    what: str
    axis: str
    limit_bytes: float
    is_total: bool = False

    def covers(self, exchanged: Exchanged) -> bool:
        """Whether it says anything of a collective."""
        causes = {part.cause for part in exchanged.parts}
        axes = exchanged.span.axes
        fits = self.what in (_ANY, exchanged.kind) or self.what in causes
        # Where the axes are not known, it may be this one.
        return (
            fits and axes != () and (not self.axis or axes is None or self.axis in axes)
        )


def parse_rule(text: str) -> Rule:
    """Reads a rule: `[total ]WHAT[@AXIS][>SIZE]`.

    Raises:
        ConfigError: If it is none.

    Example:
        >>> parse_rule("all-gather@tensor>1.5MiB").limit_bytes
        1572864.0
    """
    match = _RULE.fullmatch(text.strip())
    known = (_ANY, *KINDS, *CAUSES)
    problem = ""
    if not match:
        problem = "is no rule"
    elif match["what"] not in known:
        problem = f"there is no {match['what']!r}; expected {', '.join(known)}"
    elif match["axis"] and match["axis"] not in MESH_AXES:
        problem = f"there is no axis {match['axis']!r}; expected {', '.join(MESH_AXES)}"
    elif (match["unit"] or "").upper() not in _UNITS:
        problem = (
            f"there is no unit {match['unit']!r}; expected B, KiB, MiB, GiB, kB, …"
        )
    if problem or not match:
        raise ConfigError(
            f"--forbid {text!r}: {problem}. Give [total ]WHAT[@AXIS][>SIZE], such as "
            "'all-gather>1MiB', 'all-reduce@tensor' or 'total resharding>0'."
        )
    size = float(match["size"] or 0) * _UNITS[(match["unit"] or "").upper()]
    is_total = bool(match["total"])
    return Rule(text.strip(), match["what"], match["axis"] or "", size, is_total)


def find_broken(
    rules: Sequence[Rule], exchanged: Sequence[Exchanged]
) -> list[tuple[Rule, list[Exchanged]]]:
    """Lists the rules that are broken, each with the collectives that break it.

    The bytes of a collective are those of its buffers on one device, each time that it
    is run; a total counts every time.
    """
    broken = []
    for rule in rules:
        covered = [each for each in exchanged if rule.covers(each)]
        if rule.is_total:
            total = sum(each.num_bytes for each in covered)
            offending = covered if total > rule.limit_bytes else []
        else:
            offending = [
                each for each in covered if each.exchange.num_bytes > rule.limit_bytes
            ]
        if offending:
            broken.append((rule, offending))
    return broken
