"""Operations that change, make or drop values.

Owns casts, averages, and the two operations that have no source or no target.
Invariant: what they make is a function of the sources and of the rule alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from shardkit.checkpoint.layout_views import FillView
from shardkit.checkpoint.remap_op import NEEDS_TREE, Op, check_alike
from shardkit.checkpoint.value_views import (
    CastView,
    EqualView,
    MeanView,
    NormalView,
    is_lossless,
)
from shardkit.checkpoint.views import View, as_dtype, is_floating
from shardkit.errors import ConfigError

__all__ = ["Average", "Cast", "Drop", "Init", "check_weights"]


@dataclasses.dataclass(frozen=True)
class Cast(Op):
    """Rounds floats to another float dtype, or widens integers.

    Args:
        dtype: The dtype, or its name.
        moments: Whether arrays that follow the parameter are cast as well.
        was: The dtype before, which makes the inverse of a widening known without a
            tree.
    """

    word = "cast"
    dtype: str
    moments: bool = False
    was: str | None = None

    def __post_init__(self) -> None:
        for name in ("dtype", "was"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_dtype(value).name)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Casts each: see `Op.apply`."""
        for view in views:
            if self.was not in (None, view.dtype.name):
                raise ConfigError(
                    f"{self.describe()}: expected {self.was}, found {view.describe()}"
                )
        return [CastView(view, as_dtype(self.dtype)) for view in views]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the cast back, if this one only widened."""
        was = before[0].dtype.name if before else self.was
        if was is None:
            raise ConfigError(NEEDS_TREE)
        if not is_lossless(as_dtype(was), as_dtype(self.dtype)):
            raise ConfigError(f"{was} was rounded to {self.dtype}")
        if not is_floating(as_dtype(was)) and was != self.dtype:
            raise ConfigError(f"{self.dtype} cannot be cast back to {was}")
        return Cast(was, self.moments, was=self.dtype)

    def for_moments(self) -> Op | None:
        """Leaves moments as they are unless told otherwise."""
        return self if self.moments else None


@dataclasses.dataclass(frozen=True)
class Average(Op):
    """Averages floats, in float64 and rounded once; anything else has to be equal.

    Args:
        over: The name whose values tell the arrays apart, or None for the rule's
            sources in their order.
        weights: A weight for each; they are divided by their sum.
    """

    word = "average"
    gathers = True
    over: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            weights = check_weights("average", self.weights)
            object.__setattr__(self, "weights", weights)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Averages all: see `Op.apply`."""
        check_alike(self, views)
        if len(self.weights or views) != len(views):
            raise ConfigError(
                f"{self.describe()}: expected as many sources as weights, found "
                f"{len(views)}"
            )
        if not is_floating(views[0].dtype):
            return [EqualView(views)]
        return [MeanView(views, self.weights or [1.0] * len(views))]


@dataclasses.dataclass(frozen=True)
class Drop(Op):
    """Leaves the rule's sources out; the rule has no targets."""

    word = "drop"

    def apply(self, views: Sequence[View]) -> list[View]:
        """Makes nothing."""
        return []


@dataclasses.dataclass(frozen=True)
class Init(Op):
    """Makes targets that have no source; the rule has no sources.

    Args:
        value: One value for all elements, or
        like: the path of a source that is copied, or
        scale: the standard deviation of normal numbers.
        seed: What these depend on, besides the target's path and the element's place.
        shape: The shape, where the tree that is wanted does not say it.
        dtype: The dtype, likewise.
    """

    word = "init"
    value: float | None = None
    like: str | None = None
    scale: float | None = None
    seed: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if [self.value, self.like, self.scale].count(None) != 2:
            raise ConfigError(
                f"{self.describe()}: expected one of value, like and scale"
            )
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", as_dtype(self.dtype).name)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Is never called: there is no source."""
        raise AssertionError("an initialiser has no source")

    def make(
        self,
        path: str,
        tree: Mapping[str, View],
        wanted: tuple[tuple[int, ...], str] | None,
    ) -> View:
        """Makes one target.

        Args:
            path: Its path.
            tree: The sources.
            wanted: Its shape and dtype, if the caller has said.

        Raises:
            ConfigError: If its shape or dtype is not known, or `like` not there.
        """
        if self.like is not None:
            if self.like not in tree:
                raise ConfigError(f"{self.describe()}: there is no such source")
            return tree[self.like]
        shape, name = wanted or (None, None)
        shape = shape if self.shape is None else self.shape
        name = name if self.dtype is None else self.dtype
        if shape is None or name is None:
            raise ConfigError(
                f"{self.describe()}: expected shape and dtype, either in the rule or "
                "in the tree that is wanted, found neither"
            )
        dtype = as_dtype(name)
        if self.scale is None:
            assert self.value is not None
            return FillView(shape, dtype, self.value)
        return NormalView(shape, dtype, self.scale, self.seed, path)


def check_weights(where: str, weights: Sequence[float]) -> tuple[float, ...]:
    """Checks that weights can be divided by their sum, and returns them as floats.

    Raises:
        ConfigError: If one is negative or not finite, or all are zero.
    """
    found = tuple(float(weight) for weight in weights)
    if not all(math.isfinite(w) and w >= 0 for w in found) or not sum(found) > 0:
        raise ConfigError(
            f"{where}: expected weights of 0 or more that are not all 0, found "
            f"{list(found)}"
        )
    return found
