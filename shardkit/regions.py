"""Which operations need whole arrays, and which of them belong together.

Owns the grouping: what has no local form opens a region, and what depends on it and
leads to more of its kind joins it, so that a matrix is made whole once and not before
every product. Regions that meet in one such operation become one. Invariant: a region
depends on no value that another region of the same round makes. It computes nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shardkit.jaxprs import Step
from shardkit.local_rules import Shard

__all__ = ["Region", "Round", "cost_of", "used_outside", "values_to_join"]

# Of square matrices; what the usual algorithms take, to the nearest integer.
_DECOMPOSITIONS = {
    "cholesky": 1,
    "eig": 25,
    "eigh": 9,
    "geqrf": 2,
    "householder_product": 2,
    "lu": 1,
    "qr": 4,
    "svd": 20,
    "triangular_solve": 1,
}


# XLA computes these otherwise within a branch, where sent work is done.
_NEVER_SENT = frozenset(["conv_general_dilated"])


class Region:
    """Steps that are run together on whole arrays.

    Attributes:
        steps: In the order in which they can run.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    @property
    def produced(self) -> set[int]:
        """The numbers of the values that it makes."""
        return {value for _, _, produced in self.steps for value in produced}

    @property
    def inputs(self) -> list[int]:
        """The numbers of the values that it needs, each once."""
        made = self.produced
        needed = (value for _, ins, _ in self.steps for value in ins)
        return [value for value in dict.fromkeys(needed) if value not in made]

    @property
    def cost(self) -> float:
        """About how many operations it takes."""
        return sum(cost_of(eqn) for eqn, _, _ in self.steps)


class Round:
    """The regions of one round, in which steps are looked at in order.

    Args:
        leading: What `values_to_join` found.
        is_light: Whether an equation has a local form, as a rule.
    """

    def __init__(self, leading: set[int], is_light: Callable[[Any], bool]) -> None:
        self._leading, self._is_light = leading, is_light
        self._region_of: dict[int, Region] = {}

    @property
    def regions(self) -> list[Region]:
        """The regions, in the order of their first steps."""
        found = {id(region): region for region in self._region_of.values()}
        return list(found.values())

    def touches(self, ins: Iterable[int]) -> bool:
        """Whether a region makes one of these values."""
        return any(value in self._region_of for value in ins)

    def open(self, step: Step) -> None:
        """Begins a region with a step."""
        self._add(Region([step]), step)

    def join(self, step: Step, values: Sequence[Shard | None]) -> bool:
        """Adds a step that depends on regions, if it belongs there.

        Args:
            step: A step whose other arguments are known.
            values: The known values.
        """
        eqn, ins, produced = step
        if any(_is_key(var.aval) for var in eqn.outvars):
            return False
        found = [self._region_of[i] for i in ins if i in self._region_of]
        if self._is_light(eqn):
            others = [values[i] for i in ins if i not in self._region_of]
            is_cut = any(x is not None and x.dim is not None for x in others)
            leads = not self._leading.isdisjoint(produced)
            if is_cut or not leads or len({id(x) for x in found}) > 1:
                return False
        region = found[0]
        for other in found[1:]:
            self._merge(region, other)
        region.steps.append(step)
        self._add(region, step)
        return True

    def _add(self, region: Region, step: Step) -> None:
        self._region_of.update(dict.fromkeys(step[2], region))

    def _merge(self, region: Region, other: Region) -> None:
        if region is other:
            return
        region.steps += other.steps
        self._region_of.update(dict.fromkeys(other.produced, region))


def values_to_join(steps: Sequence[Step], is_light: Callable[[Any], bool]) -> set[int]:
    """Returns the values from which something without a local form can be reached."""
    leading: set[int] = set()
    for eqn, ins, produced in reversed(steps):
        if not is_light(eqn) or not leading.isdisjoint(produced):
            leading.update(ins)
    return leading


def used_outside(
    regions: Sequence[Region], waiting: Sequence[Step], outs: Sequence[int]
) -> list[tuple[Region, list[int]]]:
    """Pairs every region with those of its values that somebody else needs.

    Args:
        regions: The regions of one round.
        waiting: The steps that are left for later rounds.
        outs: The values that are the result.
    """
    needed = {value for _, ins, _ in waiting for value in ins} | set(outs)
    return [(region, sorted(region.produced & needed)) for region in regions]


def cost_of(eqn: Any) -> float:
    """Estimates the arithmetic operations of an equation; -inf to have all do it.

    Example:
        >>> x = jnp.ones((4, 8))
        >>> [eqn] = jax.make_jaxpr(lambda x: x @ x.T)(x).eqns[-1:]
        >>> cost_of(eqn)
        256
    """
    name, params = eqn.primitive.name, eqn.params
    if name in _NEVER_SENT:
        return -math.inf
    size = sum(math.prod(var.aval.shape) for var in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * size * math.prod(shape[dim] for dim in contracted)
    if name in _DECOMPOSITIONS:
        *batch, rows, columns = eqn.invars[0].aval.shape
        short, long = sorted((rows, columns))
        return _DECOMPOSITIONS[name] * math.prod(batch) * short * short * long
    inner = [
        sum(cost_of(inner) for inner in getattr(body, "jaxpr", body).eqns)
        for value in params.values()
        for body in (value if isinstance(value, tuple | list) else [value])
        if hasattr(getattr(body, "jaxpr", body), "eqns")
    ]
    if not inner:
        return size
    # How often a `while` runs is not known beforehand.
    return params.get("length", 1) * max(inner)


def _is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
