"""Operations that give each array other dims.

Owns transposing, reshaping, slicing and padding. Invariant: an array of a rule is
mapped without regard to the others.
"""

import dataclasses
import math
from collections.abc import Sequence

from shardkit.checkpoint.layout_views import (
    ConcatView,
    FillView,
    SliceView,
    TransposeView,
)
from shardkit.checkpoint.remap_op import (
    NEEDS_TREE,
    Op,
    check_dim,
    dim_size,
    needs_lacking,
    other_dim,
    unfit,
)
from shardkit.checkpoint.reshape_view import ReshapeView, match_dims
from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = ["Pad", "Reshape", "Slice", "Transpose", "Unpad"]


@dataclasses.dataclass(frozen=True, init=False)
class Transpose(Op):
    """Permutes dims: dim `k` of the result is dim `dims[k]` of the source.

    >>> Transpose(1, 2, 0).inverse()
    Transpose(dims=(2, 0, 1))
    """

    word = "transpose"
    dims: tuple[int, ...]

    def __init__(self, *dims: int) -> None:
        if sorted(dims) != list(range(len(dims))):
            raise ConfigError(
                f"transpose: expected each dim from 0 once, found {list(dims)}"
            )
        object.__setattr__(self, "dims", dims)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Permutes the dims of each: see `Op.apply`."""
        for view in views:
            if len(view.shape) != len(self.dims):
                raise unfit(self, f"{len(self.dims)} dims", view)
        return [TransposeView(view, self.dims) for view in views]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the inverse permutation."""
        return Transpose(*(self.dims.index(dim) for dim in range(len(self.dims))))

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Permutes the dims that are there."""
        rest = [k - (k > dim) for k in self.dims if k != dim]
        return Transpose(*rest), self.dims.index(dim)


@dataclasses.dataclass(frozen=True, init=False)
class Reshape(Op):
    """Gives the elements, in row-major order, another shape.

    Args:
        shape: The shape; one size may be -1, for what remains.
        was: The shape before, which makes the inverse known without a tree.
    """

    word = "reshape"
    shape: tuple[int, ...]
    was: tuple[int, ...] | None = None

    def __init__(self, *shape: int, was: Sequence[int] | None = None) -> None:
        if shape.count(-1) > 1 or min(shape, default=0) < -1:
            raise ConfigError(
                f"reshape: expected sizes, of which one may be -1, found {list(shape)}"
            )
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "was", None if was is None else tuple(was))

    def apply(self, views: Sequence[View]) -> list[View]:
        """Reshapes each: see `Op.apply`."""
        return [ReshapeView(view, self._resolve(view)) for view in views]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the reshape to the shape before."""
        was = before[0].shape if before else self.was
        if was is None:
            raise ConfigError(NEEDS_TREE)
        return Reshape(*was, was=None if -1 in self.shape else self.shape)

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Reshapes the other dims if the one that is lacking stays as it is."""
        before = params[0].shape
        after = self._resolve(params[0])
        groups = match_dims(before, after) if 0 not in before else []
        for source, target in groups:
            wide = [k for k in target if after[k] != 1] or list(target[:1])
            alone = [k for k in source if before[k] != 1 or k == dim] == [dim]
            if dim in source and alone and len(wide) == 1:
                rest = after[: wide[0]] + after[wide[0] + 1 :]
                return Reshape(*rest), wide[0]
        raise needs_lacking(self, dim)

    def _resolve(self, view: View) -> tuple[int, ...]:
        if self.was is not None and view.shape != self.was:
            raise unfit(self, f"the shape {list(self.was)}", view)
        known = math.prod(size for size in self.shape if size != -1)
        size = math.prod(view.shape)
        rest = size // known if known and size % known == 0 else 0
        found = tuple(rest if n == -1 else n for n in self.shape)
        if math.prod(found) != size or (-1 in self.shape and not known):
            raise unfit(self, f"elements that fill {list(self.shape)}", view)
        return found


@dataclasses.dataclass(frozen=True)
class Slice(Op):
    """Keeps what is from `start` to `stop` along a dim."""

    word = "slice"
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        check_dim(self)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Slices each: see `Op.apply`."""
        for view in views:
            if not 0 <= self.start <= self.stop <= dim_size(self, view):
                raise unfit(self, f"{self.start} to {self.stop} to be there", view)
        return [SliceView(view, self.dim, self.start, self.stop) for view in views]

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Slices the same dim, if it is there."""
        return Slice(other_dim(self, dim), self.start, self.stop), dim


@dataclasses.dataclass(frozen=True)
class Pad(Op):
    """Appends a value along a dim until it has a size, such as to a vocabulary.

    Args:
        dim: The dim.
        size: Its size afterwards.
        value: What is appended to parameters.
        moments: What is appended to arrays that follow them.
        was: The size before, which makes the inverse known without a tree.
    """

    word = "pad"
    dim: int
    size: int
    value: float = 0
    moments: float = 0
    was: int | None = None

    def __post_init__(self) -> None:
        check_dim(self)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Pads each: see `Op.apply`."""
        return [self._pad(view) for view in views]

    def inverse(self, before: Sequence[View] | None = None) -> Op:
        """Returns the op that takes the padding away."""
        was = before[0].shape[self.dim] if before else self.was
        if was is None:
            raise ConfigError(NEEDS_TREE)
        return Unpad(self.dim, was)

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Pads the same dim, if it is there."""
        rest = other_dim(self, dim)
        return Pad(rest, self.size, self.value, self.moments, self.was), dim

    def for_moments(self) -> Op:
        """Pads with the value for moments: a second moment is never negative."""
        return dataclasses.replace(self, value=self.moments)

    def _pad(self, view: View) -> View:
        size = dim_size(self, view)
        if size > self.size or self.was not in (None, size):
            want = f"{self.size} at most" if self.was is None else str(self.was)
            raise unfit(self, f"a dim {self.dim} of {want}", view)
        if size == self.size:
            return view
        shape = [*view.shape[: self.dim], self.size - size, *view.shape[self.dim + 1 :]]
        return ConcatView([view, FillView(shape, view.dtype, self.value)], self.dim)


@dataclasses.dataclass(frozen=True)
class Unpad(Op):
    """Keeps the first `size` elements along a dim; the inverse of `Pad`."""

    word = "unpad"
    dim: int
    size: int

    def __post_init__(self) -> None:
        check_dim(self)

    def apply(self, views: Sequence[View]) -> list[View]:
        """Cuts the end of each off: see `Op.apply`."""
        for view in views:
            if not 0 <= self.size <= dim_size(self, view):
                raise unfit(self, f"a dim {self.dim} of {self.size} or more", view)
        return [SliceView(view, self.dim, 0, self.size) for view in views]

    def lacking(self, dim: int, params: Sequence[View]) -> tuple[Op, int]:
        """Cuts the same dim, if it is there."""
        return Unpad(other_dim(self, dim), self.size), dim
