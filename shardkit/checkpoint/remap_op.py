"""What an operation of a remap rule is.

Owns the questions that a rule asks of its operations: what they make, what undoes them,
and what they do to the factored moment of a parameter, which lacks one of its dims.
Invariant: an operation reads nothing; it makes views of views. `rules` says to which
views an operation is applied.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from shardkit.checkpoint.views import View
from shardkit.errors import ConfigError

__all__ = [
    "NEEDS_TREE",
    "Op",
    "check_alike",
    "check_dim",
    "dim_size",
    "needs_lacking",
    "other_dim",
    "unfit",
]

NEEDS_TREE = "it depends on the shapes of its sources: give inverse() the source's tree"


@dataclasses.dataclass(frozen=True)
class Op(abc.ABC):
    """One operation of a rule.

    Attributes:
        word: Its name in TOML.
        gathers: Whether it makes one view of many.
        scatters: Whether it makes many views of one.
        over: For these two, the name in the pattern whose values tell the many apart,
            or None for the patterns of the rule, in their order.
    """

    word: ClassVar[str]
    gathers: ClassVar[bool] = False
    scatters: ClassVar[bool] = False
    over: ClassVar[str | None] = None

    @abc.abstractmethod
    def apply(self, views: Sequence[View]) -> list[View]:
        """Makes views of views; what neither gathers nor scatters maps each.

        Raises:
            ConfigError: If the shapes or dtypes do not allow it.
        """

    def inverse(self, before: Sequence[View] | None = None) -> "Op":
        """Returns the operation that undoes this one to the bit.

        Args:
            before: What the operation was applied to, where it depends on that.

        Raises:
            ConfigError: If there is none, or if `before` is needed.
        """
        raise ConfigError("it loses what an inverse would need")

    def lacking(self, dim: int, params: Sequence[View]) -> tuple["Op", int]:
        """Returns what to do to arrays that lack one dim of their parameters.

        Args:
            dim: The dim of the parameters that the arrays lack.
            params: The parameters before the operation.

        Returns:
            The operation, and the dim that its results lack.

        Raises:
            ConfigError: If it would need that dim.
        """
        return self, dim

    def for_moments(self) -> "Op | None":
        """Returns what to do to arrays that follow a parameter; None is nothing."""
        return self

    def options(self) -> dict[str, Any]:
        """Lists the arguments that are not the defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def describe(self) -> str:
        """Spells the operation.

        >>> from shardkit.checkpoint.remap_ops import Stack
        >>> Stack("i").describe()
        'stack(over=i)'
        """
        options = ", ".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.word}({options})"


def check_alike(op: Op, views: Sequence[View], but: int | None = None) -> None:
    """Checks that views to be joined have one dtype and shape, but for one dim."""

    def key(view: View) -> tuple:
        return view.dtype, [s for dim, s in enumerate(view.shape) if dim != but]

    for view in views:
        if key(view) != key(views[0]):
            rest = "" if but is None else f" but for dim {but}"
            raise unfit(op, f"sources like {views[0].describe()}{rest}", view)


def check_dim(op: Any) -> None:
    """Checks that the dim of an operation is counted from 0."""
    if op.dim < 0:
        raise ConfigError(f"{op.word}: expected dims counted from 0, found {op.dim}")


def dim_size(op: Any, view: View) -> int:
    """Returns how wide a view is along the dim of an operation."""
    if op.dim >= len(view.shape):
        raise unfit(op, f"a dim {op.dim}", view)
    return view.shape[op.dim]


def other_dim(op: Any, dim: int) -> int:
    """Returns the dim of an operation, counted without another one."""
    if op.dim == dim:
        raise needs_lacking(op, dim)
    return op.dim - (op.dim > dim)


def unfit(op: Op, expected: str, view: View) -> ConfigError:
    """Returns the error of a view that an operation cannot take."""
    return ConfigError(f"{op.describe()}: expected {expected}, found {view.describe()}")


def needs_lacking(op: Op, dim: int) -> ConfigError:
    """Returns the error of an operation along a dim that is not there."""
    return ConfigError(
        f"{op.describe()}: a factored moment was averaged over dim {dim} of its "
        "parameter, so this cannot be done to it; drop it and initialise it anew"
    )
