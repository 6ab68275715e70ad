"""Operations that make one array of many, or many of one.

Owns stacking, fusing and what undoes them. Invariant: the many are told apart by one
name in a rule's pattern, or by the place of a pattern in the rule.
"""

import dataclasses
from collections.abc import Sequence

from shardkit.checkpoint.layout_views import ConcatView, IndexView, SliceView, StackView
from shardkit.checkpoint.remap_op import (
    NEEDS_TREE,
    Op,
    check_alike,
    check_dim,
    dim_size,
    other_dim,
    unfit,
)
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = ["Fuse", "Split", "Stack", "Unstack"]


@dataclasses.dataclass(frozen=True)
class Stack(Op):
    """Stacks arrays of one shape along a new dim, in ascending order of a name.

    Args:
        over: The name, or None for the rule's sources in their order.
        dim: The new dim.
    """

    word = "stack"
    gathers = True
    over: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    dim: int = 0

    def __post_init__(self) -> None:
        check_dim(self)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Stacks all into one: see `Op.apply`."""
        check_alike(self, views)
        if self.dim > len(views[0].shape):
            raise unfit(self, f"{self.dim} dims or more", views[0])
        return [StackView(views, self.dim)]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the op that unstacks."""
        return Unstack(self.over, self.dim)

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Stacks along the same dim, counted without the one that is lacking."""
        after = dim + (dim >= self.dim)
        return Stack(self.over, self.dim - (after < self.dim)), after


@dataclasses.dataclass(frozen=True)
class Unstack(Op):
    """Takes an array apart along a dim, which is gone; the inverse of `Stack`.

    Args:
        over: The name in the targets that counts the parts, or None for the rule's
            targets in their order.
        dim: The dim.
    """

    word = "unstack"
    scatters = True
    over: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    dim: int = 0

    def __post_init__(self) -> None:
        check_dim(self)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Makes as many as the dim is wide: see `Op.apply`."""
        (view,) = views
        num = dim_size(self, view)
        return [IndexView(view, self.dim, index) for index in range(num)]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the op that stacks."""
        return Stack(self.over, self.dim)

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Unstacks the same dim, if it is there."""
        rest = other_dim(self, dim)
        return Unstack(self.over, rest), dim - (dim > self.dim)


@dataclasses.dataclass(frozen=True)
class Fuse(Op):
    """Joins the rule's sources along a dim, such as query, key and value.

    Args:
        dim: The dim.
        sizes: What each brings, which makes the inverse known without a tree.
    """

    word = "fuse"
    gathers = True
    dim: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_dim(self)
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))

    def apply(self, views: Sequence[View]) -> list[View]:
        """Joins all into one: see `Op.apply`."""
        found = tuple(dim_size(self, view) for view in views)
        if self.sizes not in (None, found):
            raise ConfigError(
                f"{self.describe()}: expected sizes {list(self.sizes or ())} along dim "
                f"{self.dim}, found {list(found)}"
            )
        check_alike(self, views, but=self.dim)
        return [ConcatView(views, self.dim)]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the split into the same sizes."""
        if before is None and self.sizes is None:
            raise ConfigError(NEEDS_TREE)
        return Split(
            self.dim, self.sizes or tuple(view.shape[self.dim] for view in before or ())
        )

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Joins along the same dim, if it is there."""
        return Fuse(other_dim(self, dim), self.sizes), dim


@dataclasses.dataclass(frozen=True)
class Split(Op):
    """Cuts an array along a dim, one part for each of the rule's targets.

    Args:
        dim: The dim.
        sizes: The size of each part.
        num: Instead of them, how many equal parts.
    """

    word = "split"
    scatters = True
    dim: int
    sizes: tuple[int, ...] | None = None
    num: int | None = None

    def __post_init__(self) -> None:
        check_dim(self)
        if (self.sizes is None) == (self.num is None) or (self.num or 1) < 1:
            raise ConfigError(
                "split: expected either sizes=[...] or num=1 or more, found "
                f"sizes={self.sizes} and num={self.num}"
            )
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return self.num or len(self.sizes or ())

    def apply(self, views: Sequence[View]) -> list[View]:
        """Makes the parts: see `Op.apply`."""
        (view,) = views
        size = dim_size(self, view)
        sizes = self.sizes or (size // self.num_parts,) * self.num_parts
        if sum(sizes) != size or min(sizes) < 0:
            raise unfit(self, f"parts that fill dim {self.dim}", view)
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        return [
            SliceView(view, self.dim, start, start + size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the op that joins the parts."""
        return Fuse(self.dim, self.sizes)

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Cuts along the same dim, if it is there."""
        return Split(other_dim(self, dim), self.sizes, self.num), dim
