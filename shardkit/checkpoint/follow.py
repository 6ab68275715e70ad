"""What a rule does to arrays that follow parameters: moments and averages.

Owns the shapes such an array can have: that of its parameter, that without one dim (the
factored moments of Adafactor), or that of a placeholder. Invariant: an array of the
parameter's shape meets the very operations that its parameter meets; any other meets
what these are on the dims that are there, or is refused.

References:
    Shazeer & Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    (ICML 2018).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from shardkit.checkpoint.remap_ops import Op
from shardkit.checkpoint.rules import Key, Rule, run_ops
from shardkit.checkpoint.value_views import EqualView
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = ["Followed", "follow", "split_path"]

_PLACEHOLDERS = ((1,), ())
# Optax leaves the widest dim out of the one, and the second widest out of the other.
_FACTORS = {"v_row": -1, "v_col": -2}


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A parameter and what follows it; `lacks` is the dim that is not there."""

    param: View
    view: View
    lacks: int | None = None
    is_placeholder: bool = False


@dataclasses.dataclass(frozen=True)
class Followed:
    """What became of arrays that follow.

    Attributes:
        views: The results.
        prefixes: What their paths begin with: `v_row` and `v_col` trade places where
            the widest dim becomes another one.
        ops: What was done, in words.
    """

    views: dict[Key, View]
    prefixes: dict[Key, str]
    ops: list[str]


def split_path(
    path: str, tails: Mapping[str, str], prefixes: Sequence[str]
) -> tuple[str, str] | None:
    """Splits the path of an array that follows a parameter.

    Args:
        path: The path.
        tails: Parameters' paths by what they are without the root.
        prefixes: What such an array's path may begin with.

    Returns:
        What comes before the parameter's path, and the parameter's path.

    >>> split_path("ema/a/b", {"b": "params/b", "a/b": "params/a/b"}, ["ema"])
    ('ema', 'params/a/b')
    """
    segments = path.split("/")
    if not any(path.startswith(f"{prefix}/") for prefix in prefixes):
        return None
    for at in range(1, len(segments)):
        tail = "/".join(segments[at:])
        if tail in tails:
            return "/".join(segments[:at]), tails[tail]
    return None


def follow(
    rule: Rule, params: Mapping[Key, View], views: Mapping[Key, View], prefix: str
) -> Followed:
    """Applies a rule to what follows the parameters it was written for.

    Args:
        rule: The rule.
        params: The parameters that it applies to.
        views: What follows each.
        prefix: What the paths of these begin with.

    Raises:
        ConfigError: If shapes do not follow, or an operation needs a dim that is not
            there.
    """
    ops: list[str] = []

    def step(op: Op, pairs: list[_Pair]) -> list[_Pair]:
        made, words = _step(op, pairs)
        if words and words not in ops:
            ops.append(words)
        return made

    pairs = {key: _pair(rule, params[key], views[key], prefix) for key in params}
    found = run_ops(rule.ops, pairs, step)
    # Names mean dims where they did so before.
    is_named = all(
        pair.lacks == _factored_dim(prefix, pair.param.shape) for pair in pairs.values()
    )
    prefixes = {
        key: _rename(prefix, pair) if is_named else prefix
        for key, pair in found.items()
    }
    return Followed({key: pair.view for key, pair in found.items()}, prefixes, ops)


def _pair(rule: Rule, param: View, view: View, prefix: str) -> _Pair:
    shape = param.shape
    if view.shape == shape:
        return _Pair(param, view)
    if view.shape in _PLACEHOLDERS:
        return _Pair(param, view, is_placeholder=True)
    dims = [
        dim for dim in range(len(shape)) if view.shape == shape[:dim] + shape[dim + 1 :]
    ]
    expected = _factored_dim(prefix, shape)
    if expected in dims:
        return _Pair(param, view, expected)
    if len(dims) > 1 and rule.ops:
        raise ConfigError(
            f"{view.describe()} may lack any of the dims {dims} of its parameter "
            f"{param.describe()}; write a rule of its own for it"
        )
    if dims:
        return _Pair(param, view, dims[0])
    raise ConfigError(
        f"{view.describe()} follows a parameter {param.describe()}: expected its "
        "shape, that without one dim, [1] or []; write a rule of its own for it"
    )


def _step(op: Op, pairs: list[_Pair]) -> tuple[list[_Pair], str]:
    """Applies one operation to parameters and, as it has to be, to what follows."""
    params, views = [pair.param for pair in pairs], [pair.view for pair in pairs]
    after = op.apply(params)
    kinds = {(pair.lacks, pair.is_placeholder) for pair in pairs}
    if len(kinds) > 1:
        raise ConfigError(
            f"{op.describe()}: what follows its sources lacks different dims: "
            + ", ".join(view.describe() for view in views)
            + "; drop it and initialise it anew"
        )
    ((lacks, is_placeholder),) = kinds
    words = op.describe()
    if is_placeholder:
        made = [EqualView(views)] if op.gathers else views * len(after)
        words = "" if not op.gathers else "equal placeholders"
    else:
        there = op.for_moments()
        if there is not None and lacks is not None:
            there, lacks = there.lacking(lacks, params)
        made = views if there is None else there.apply(views)
        words = "" if there is None else there.describe()
    pairs = [
        _Pair(param, view, lacks, is_placeholder)
        for param, view in zip(after, made, strict=True)
    ]
    return pairs, words


def _factored_dim(prefix: str, shape: Sequence[int]) -> int | None:
    """The dim that the moment of this name lacks, if the name says it."""
    names = [name for name in _FACTORS if name in prefix.split("/")]
    if len(names) != 1 or len(shape) < 2:
        return None
    return int(np.argsort(shape, kind="stable")[_FACTORS[names[0]]])


def _rename(prefix: str, pair: _Pair) -> str:
    expected = _factored_dim(prefix, pair.param.shape)
    if pair.lacks is None or pair.lacks == expected:
        return prefix
    other = {"v_row": "v_col", "v_col": "v_row"}
    renamed = "/".join(other.get(name, name) for name in prefix.split("/"))
    if _factored_dim(renamed, pair.param.shape) == pair.lacks:
        return renamed
    raise ConfigError(
        f"{pair.view.describe()} lacks dim {pair.lacks} of what becomes of its "
        f"parameter, {pair.param.describe()}, which would be factored along its two "
        "widest dims; drop it and initialise it anew"
    )
