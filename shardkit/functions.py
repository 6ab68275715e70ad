"""What the user's functions bring along and return, looked at before they are compiled.

Owns the mistakes that tracing would not show, or only by a message of JAX's own. It
computes nothing.
"""

import contextlib
import dis
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from shardkit.arguments import check_call, check_optimizer
from shardkit.errors import PartitionError
from shardkit.model_state import split_variables
from shardkit.tree import format_table, named_leaves

__all__ = ["abstract_init", "check_captures", "check_functions"]

_LARGE_BYTES = 1 << 20
_MOST_ITEMS = 10_000


def check_functions(
    init: Any, loss: Any, eval_loss: Any, tx: Any, data: Any
) -> list[str]:
    """Checks what a `Trainer` is made of, and returns what should be noticed.

    Raises:
        ConfigError: If one of them is something else, or takes other arguments.
        PartitionError: As `abstract_init` and `check_captures` do.
    """
    check_call("init", init, "key")
    check_optimizer(tx)
    is_stateful = split_variables(abstract_init(init))[1] is not None
    arguments = ["params", *["state"] * is_stateful, "microbatch", "key"]
    check_call("loss", loss, *arguments)
    check_call("eval_loss", eval_loss or loss, *arguments)
    remedy = ". What can only be iterated: sk.from_iterable(make_iterator)"
    check_call("data", data, "step", remedy=remedy)
    return check_captures("loss", loss) + check_captures("eval_loss", eval_loss)


def abstract_init(init: Callable[[Any], Any]) -> Any:
    """Returns what `init` makes, as shapes and dtypes.

    Raises:
        PartitionError: Naming all leaves that are no arrays.
    """

    def run(key: Any) -> Any:
        made = init(key)
        bad = [
            (path, f"found {type(leaf).__name__} {leaf!r:.40}")
            for path, leaf in named_leaves(made)
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float)
        ]
        if bad:
            raise PartitionError(
                "init must return arrays; these leaves are none\n"
                + format_table(bad)
                + "\nKeep functions, names and settings where the loss sees them: in "
                "its closure, or as static fields of a dataclass."
            )
        return made

    return jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)))


def check_captures(name: str, fn: Any) -> list[str]:
    """Looks at the arrays that a function sees besides its arguments.

    Args:
        name: The function's, for messages.
        fn: A plain function; of anything else nothing is known.

    Returns:
        Warnings: large arrays that are no parameters.

    Raises:
        PartitionError: Naming all arrays that are deleted, or are on several devices,
            which a change takes away.

    Example:
        >>> table = jax.numpy.ones(3)
        >>> check_captures("loss", lambda params, microbatch, key: table.sum())
        []
    """
    bad, large = [], []
    for path, array in _captured(fn, set()):
        what = f"{array.dtype}{list(array.shape)}"
        if array.is_deleted():
            bad.append((path, what, "deleted"))
        elif len(array.sharding.device_set) > 1:
            bad.append((path, what, f"on {len(array.sharding.device_set)} devices"))
        elif array.nbytes >= _LARGE_BYTES:
            large.append(
                f"{name} sees {path}, {what}, from outside: it is not trained, and is "
                "written into every program; make it a parameter, part of the state or "
                "of the batch"
            )
    if bad:
        raise PartitionError(
            f"{name} sees arrays from outside that a change of devices takes away\n"
            + format_table(bad)
            + "\nGive them as parameters, as state (sk.Variables) or in the batch; "
            "what is constant as numpy arrays."
        )
    return large


def _captured(fn: Any, known: set[int]) -> Iterator[tuple[str, jax.Array]]:
    """Yields the arrays that a function names, or others of its module that it names.

    What cannot be read is passed over: this finds mistakes, and hinders nobody.

    Args:
        fn: The function.
        known: What has been looked at, by its id.
    """
    if not inspect.isfunction(fn) or id(fn) in known:
        return
    known.add(id(fn))
    for name, value in _seen(fn).items():
        if inspect.isfunction(value) and value.__module__ == fn.__module__:
            yield from _captured(value, known)
        else:
            yield from _arrays(name, value, known)


def _seen(fn: Any) -> dict[str, Any]:
    """The globals and the variables of outer functions that a function loads."""
    loaded = {x.argval for x in dis.get_instructions(fn) if x.opname == "LOAD_GLOBAL"}
    found = {name: x for name, x in fn.__globals__.items() if name in loaded}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # It is still empty.
            found[name] = cell.cell_contents
    return found


def _arrays(path: str, value: Any, known: set[int]) -> Iterator[tuple[str, jax.Array]]:
    if id(value) in known:
        return
    if isinstance(value, jax.Array):
        known.add(id(value))
        yield path, value
    elif isinstance(value, dict | list | tuple) and len(value) <= _MOST_ITEMS:
        known.add(id(value))
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _arrays(f"{path}/{key}", item, known)
