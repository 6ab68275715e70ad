"""What a run asks of an optax transformation, found before anything is compiled.

Owns the one way an update is called, `tx.update(gradients, state, params)`, and the
reasons for which a transformation cannot be called so, or not step after step.
Invariant: what has no reason here can be traced, and leaves a state like the one it
was given. Whether its bits stay is settled by `inexact` and `localize`.
"""

import re
import traceback
from typing import Any, NamedTuple, NoReturn

import jax
import optax
from jax import Array

from shardkit.errors import ConfigError, ShardkitError
from shardkit.inexact import find_inexact
from shardkit.tree import format_table, named_leaves

__all__ = ["Refusal", "changed_leaves", "describe", "find_refusals", "refuse"]

_MISSING = re.compile(r"missing \d+ required keyword-only arguments?: (.*)")


class Refusal(NamedTuple):
    """One reason why a transformation cannot be used, or not exactly.

    Attributes:
        what: The operation, or the part of the transformation.
        where: The source line; empty if there is none.
        reason: Why.
    """

    what: str
    where: str
    reason: str


def find_refusals(tx: optax.GradientTransformation, params: Any) -> list[Refusal]:
    """Lists why a transformation cannot be used for these parameters; traces it once.

    Args:
        tx: Any optax transformation.
        params: The parameters, abstract or not.

    Example:
        >>> [refusal] = find_refusals(optax.polyak_sgd(), jax.numpy.ones(3))
        >>> refusal.reason
        "it asks for 'value', and an update is given gradients, state and params only"
    """
    part = "init"
    try:
        traced, state = jax.make_jaxpr(tx.init, return_shape=True)(params)
        inexact = find_inexact(traced)
        part = "update"
        traced, (updates, new) = jax.make_jaxpr(tx.update, return_shape=True)(
            params, state, params
        )
    except Exception as error:
        # Whatever a user's code raises is the reason.
        return [_as_refusal(part, error)]
    found = [Refusal(*row) for row in [*inexact, *find_inexact(traced)]]
    found += changed_leaves("updates", params, updates, dtypes=False)
    return found + changed_leaves("state", state, new)


def refuse(tx: optax.GradientTransformation, params: Any, error: Exception) -> NoReturn:
    """Raises what made the trace of an update fail, in terms of the transformation.

    Args:
        tx: What was traced.
        params: The parameters, abstract or not.
        error: What its trace raised.

    Raises:
        ConfigError: If it is the transformation that cannot be traced.
    """
    found = [] if isinstance(error, ShardkitError) else find_refusals(tx, params)
    if not found:
        raise error
    raise ConfigError(describe(found)) from error


def describe(refusals: list[Refusal]) -> str:
    """The message for a transformation that cannot be used."""
    return (
        f"tx cannot be used:\n{format_table([*refusals])}\n"
        "Every step calls tx.update(gradients, state, params); choose a transformation "
        "that needs nothing else. sk.exactness(tx) says this of any."
    )


def changed_leaves(
    part: str, before: Any, after: Any, *, dtypes: bool = True
) -> list[Refusal]:
    """Lists leaves that an update leaves in another shape than it found them.

    Args:
        part: What they are of.
        before: Arrays, abstract or not.
        after: What has taken their place.
        dtypes: Whether the dtype must stay too.

    Example:
        >>> before, after = jax.numpy.ones(3), jax.numpy.ones((3, 1))
        >>> [refusal] = changed_leaves("state", {"a": before}, {"a": after})
        >>> refusal.reason
        'it was float32[3] before an update and is float32[3,1] after it'
    """
    old, new = dict(named_leaves(before)), dict(named_leaves(after))
    if jax.tree.structure(before) != jax.tree.structure(after):
        lost, added = sorted(old.keys() - new), sorted(new.keys() - old)
        changes = [f"- {path}" for path in lost] + [f"+ {path}" for path in added]
        what = "; ".join(changes[:4]) or "other kinds of nodes"
        return [Refusal(part, "", f"an update changes its structure: {what}")]
    rows = []
    for path, x in old.items():
        y = new[path]
        if x.shape != y.shape or (dtypes and x.dtype != y.dtype):
            reason = f"it was {_type(x)} before an update and is {_type(y)} after it"
            rows.append(Refusal(f"{part} {path}".strip(), "", reason))
    return rows


def _type(x: Array | jax.ShapeDtypeStruct) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _as_refusal(part: str, error: Exception) -> Refusal:
    """Says what an exception says, in a line."""
    # The last frame in Python is where the transformation gave up, unless JAX did.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not re.search(r"[/\\]jax[/\\]|shardkit[/\\]updates\.py", frame.filename)
    ]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    missing = _MISSING.search(lines[0])
    if missing:
        reason = (
            f"it asks for {missing[1]}, and an update is given gradients, state and "
            "params only"
        )
    elif isinstance(error, NameError) and "axis name" in lines[0]:
        reason = (
            f"it asks for a mesh axis, but no update depends on a mesh ({lines[0]})"
        )
    elif isinstance(error, TypeError | ValueError):
        reason = lines[0]
    else:
        reason = f"{type(error).__name__}: {lines[0]}"
    return Refusal(part, where, reason)
