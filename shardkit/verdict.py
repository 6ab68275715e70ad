"""What exact mode makes of an optimizer, said before a run.

Owns the answer to one question, for any optax transformation: does its update have the
same bits on every mesh, what does it cost, and if not, why. Invariant: the answer is
that of the interpreter which runs the update, and of the checks which a run makes;
nothing is known by name. What a transformation does in Python, such as asking for the
number of devices while it is traced, leaves no operation and cannot be seen.
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shardkit.annotations import axes, strip
from shardkit.operations import Whole
from shardkit.recipe import Recipe
from shardkit.state_layout import lay_out
from shardkit.tree import format_table
from shardkit.updates import Refusal, find_refusals

__all__ = ["Exactness", "exactness"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exactness:
    """What exact mode makes of an optimizer.

    Attributes:
        whole: The operations that are done on whole arrays, since they have no form
            on shards that keeps the bits.
        refused: Why it cannot be used; empty if it is exact.
        state: How its state is cut, as a tree of `LeafLayout`; None if it is refused.
    """

    whole: tuple[Whole, ...] = ()
    refused: tuple[Refusal, ...] = ()
    state: Any = None

    @property
    def is_exact(self) -> bool:
        """Whether an update has the same bits on every mesh."""
        return not self.refused

    @property
    def verdict(self) -> str:
        """`exact`, `exact, computed whole` or `refused`."""
        if self.refused:
            return "refused"
        return "exact, computed whole" if self.whole else "exact"

    def __str__(self) -> str:
        if self.refused:
            return f"refused:\n{format_table(list(self.refused))}"
        if not self.whole:
            return "exact on every mesh, and computed on shards throughout"
        counts = collections.Counter(self.whole)
        rows = [
            (f"{work.operation} of {work.type}", f"× {count}", work.source)
            for work, count in counts.items()
        ]
        return f"exact on every mesh; computed on whole arrays:\n{format_table(rows)}"


def exactness(tx: optax.GradientTransformation, params: Any = None) -> Exactness:
    """Says whether an optimizer keeps its bits when the device count changes.

    Every leaf of the parameters is taken to be cut along its largest dim. It traces
    the update and computes nothing.

    Args:
        tx: Any optax transformation.
        params: The parameters, abstract or not, annotated or not; None for a scalar, a
            vector, a matrix and a stack of matrices.

    Raises:
        PartitionError: If the parameters are not floats of at most 32 bits.

    Example:
        >>> print(exactness(optax.adamw(1e-3)))
        exact on every mesh, and computed on shards throughout
        >>> exactness(optax.contrib.muon(1e-3)).verdict
        'exact, computed whole'
        >>> exactness(optax.polyak_sgd()).refused[0].reason
        "it asks for 'value', and an update is given gradients, state and params only"
    """
    abstract = _probe() if params is None else jax.tree.map(_abstract, strip(params))
    recipe = Recipe(
        init=lambda key: jax.tree.map(_cut_along_largest, abstract),
        loss=lambda params, microbatch, key: 0.0,
        tx=tx,
        num_microbatches=1,
    )
    try:
        layout, _, localizer = lay_out(recipe, {"cut": "fsdp"})
    except Exception:
        refused = find_refusals(tx, abstract)
        if not refused:
            raise
        return Exactness(refused=tuple(refused))
    return Exactness(whole=tuple(localizer.whole), state=layout.opt_state)


def _probe() -> Any:
    """Parameters of all the ranks that optimizers tell apart."""
    shapes = {
        "scalar": (),
        "vector": (96,),
        "matrix": (256, 192),
        "stack": (3, 128, 160),
    }
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
    }


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))


def _cut_along_largest(x: jax.ShapeDtypeStruct) -> Any:
    names: list[str | None] = [None] * len(x.shape)
    if names:
        names[int(np.argmax(x.shape))] = "cut"
    return axes(jnp.zeros(x.shape, x.dtype), *names)
