"""What a caller of `Trainer` can get wrong about an argument by itself.

Owns the checks of functions and of choices, each with its message. It knows no trainer.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from shardkit.errors import ConfigError

__all__ = ["check_call", "check_choice", "check_mapping", "check_optimizer"]


def check_call(name: str, fn: Any, *args: str, remedy: str = "") -> None:
    """Checks that something can be called with so many arguments.

    Args:
        name: What it is called in messages.
        fn: What is to be called.
        *args: The names of its arguments.
        remedy: What else to do about it.

    Raises:
        ConfigError: If not, naming them.
    """
    expected = f"Trainer: {name} must be a function of ({', '.join(args)})"
    if not callable(fn):
        raise ConfigError(f"{expected}, found {type(fn).__name__}{remedy}")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # written in C
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ConfigError(f"{expected}, found {signature}: {error}{remedy}") from None


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Checks that a value is one of a few.

    Raises:
        ConfigError: If not, naming them.
    """
    if value not in choices:
        raise ConfigError(
            f"Trainer: {name} must be one of {', '.join(map(repr, choices))}, "
            f"found {value!r}"
        )


def check_mapping(name: str, value: Any, remedy: str) -> None:
    """Checks that rules are a dict, or None.

    Raises:
        ConfigError: If they are something else, such as pairs.

    Example:
        >>> check_mapping("axis_rules", {"embed": "fsdp"}, "dict(pairs)")
    """
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(
            f"{name}: expected a dict, found a {type(value).__name__}. {remedy}"
        )


def check_optimizer(tx: Any) -> None:
    """Checks that something is an optimizer.

    Raises:
        ConfigError: If it has not what optax's have.
    """
    missing = [
        name for name in ("init", "update") if not callable(getattr(tx, name, 0))
    ]
    if missing:
        raise ConfigError(
            "Trainer: tx must be an optax.GradientTransformation, such as "
            f"optax.adamw(1e-3); found {type(tx).__name__} without "
            f"{' and '.join(missing)}"
        )
