"""Tensor-parallel axes of a model that nobody annotated, found from its loss.

Owns the way from a model to them, and the reasons in words. Invariant: everything comes
from one trace of the loss over abstract shapes; no device is used and nothing is
compiled. What to write into a program or a config is said by `written_rules`.

References:
    Shoeybi et al., Megatron-LM (2019): columns, then rows, then one sum.
    Tan et al., Redco (2023): the same, in turn, along any chain of products.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shardkit.annotations import LeafAxes, read_axes
from shardkit.errors import ConfigError
from shardkit.logical_axes import AxisRules, mesh_axis
from shardkit.model import Model, call_loss
from shardkit.model_state import split_variables
from shardkit.planner.ledger import bytes_of
from shardkit.planner.reading import arguments, trace
from shardkit.planner.strand_walk import LOOPED, walk
from shardkit.planner.strands import Strands, Value
from shardkit.planner.tensor_choice import Strand, choose, find_strands
from shardkit.planner.tensor_findings import (
    Exchange,
    LeafRule,
    Pair,
    TensorRules,
    add_up,
)
from shardkit.planner.written_rules import write_rules

__all__ = ["find_tensor_rules"]

_MOST_PATHS = 3


def find_tensor_rules(
    model: Model,
    microbatch: Any,
    *,
    size: int | None = None,
    axis_rules: AxisRules | None = None,
    path_rules: Mapping[Any, Any] | None = None,
) -> TensorRules:
    """Finds which dims `tensor` should cut, so that one all-reduce closes two products.

    Of every chain of products with parameters, one is cut along what it makes, the next
    along what it sums over, and whatever lies between is local. What lies between is
    followed through activations, biases, gates, dropout, attention over heads,
    reshapes, scans and checkpoints; an operation that is not known leaves whole
    whatever it reads.

    Args:
        model: What a model factory returns.
        microbatch: The arrays of one microbatch, abstract or not: rows first.
        size: Of `tensor`; what it does not divide stays whole. None leaves it open.
        axis_rules: Logical axis → mesh axis; None for the model's own.
        path_rules: Those that there are already, as `read_axes` takes them.

    Raises:
        ConfigError: If the loss cannot be traced with these shapes, or the size is less
            than 2.
        PartitionError: If annotations do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> def init(key):
        ...     return {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
        >>> def loss(params, microbatch, key):
        ...     x = microbatch["x"]
        ...     return jnp.mean((x + jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)
        >>> model = Model(init=init, loss=loss)
        >>> found = find_tensor_rules(model, {"x": jnp.ones((2, 8))}, size=4)
        >>> [(leaf.path, leaf.dim, leaf.reason) for leaf in found.leaves]
        [('down', 0, 'row of pair 1: opened by up'), ('up', 1, 'column of pair 1: \
closed by down')]
        >>> found.exchanges
        (Exchange(kind='all-reduce', of='row', count=1, num_bytes=64),)
        >>> found.written.path_rules
        {'down': ('tensor', None), 'up': (None, 'tensor')}
    """
    if size is not None and size < 2:
        raise ConfigError(f"tensor: expected a size of at least 2, found {size}")
    rules = dict(model.axis_rules if axis_rules is None else axis_rules)
    variables, args = arguments(model, microbatch)
    params, _ = split_variables(variables)
    own, said = read_axes(params), read_axes(params, path_rules)
    strands, dims = _follow(model, args, said, rules)
    every = find_strands(strands, dims)
    arrays = [strands.roots(array) for array in strands.arrays]
    chosen = choose([x for x in every if not x.problem], arrays)
    # Which strands are in each other's way does not depend on the size, so that models
    # are not cut otherwise on other machines.
    cut = [x for x in chosen if size is None or x.divisor % size == 0]
    paths = [leaf.path for leaf in said]
    pairs = [_pair(i, strand, paths) for i, strand in enumerate(cut, start=1)]
    reasons = _Reasons(every, chosen, pairs, cut, size)
    leaves = [reasons.rule(i, leaf) for i, leaf in enumerate(said)]
    return TensorRules(
        size=size,
        leaves=tuple(leaves),
        pairs=tuple(pairs),
        written=write_rules(said, own, [leaf.dim for leaf in leaves], rules),
    )


def _follow(
    model: Model, args: tuple[Any, ...], said: Sequence[LeafAxes], rules: AxisRules
) -> tuple[Strands, list[tuple[Any, int]]]:
    """Walks a loss; returns its strands, and dims and bytes of the parameters."""
    closed = trace(lambda *args: call_loss(model.loss, *args), args)
    strands, num = Strands(), len(said)
    avals = [var.aval for var in closed.jaxpr.invars]
    ins = [
        Value(strands.new(aval.shape), leaf=i)
        if i < num
        else Value(strands.new(aval.shape), strands.source())
        for i, aval in enumerate(avals)
    ]
    for value in walk(closed.jaxpr, ins, strands):
        strands.keep_whole(value.dims, "it leaves the loss")
    for value, leaf in zip(ins, said, strict=False):
        for dim, name in zip(value.dims, leaf.names or (), strict=False):
            axis = mesh_axis(name, rules)
            if axis in ("expert", "context"):
                strands.keep_whole([dim], f"{axis} cuts it")
    return strands, [(ins[i].dims, bytes_of(avals[i])) for i in range(num)]


def _pair(number: int, strand: Strand, paths: Sequence[str]) -> Pair:
    def named(kind: str) -> tuple[str, ...]:
        leaves = [meeting.leaf for meeting in strand.met(kind)]
        return tuple(dict.fromkeys(paths[i] for i in leaves if i is not None))

    exchanges = [
        Exchange(
            kind="all-gather" if x.kind == "argmax" else "all-reduce",
            of=x.kind,
            # The place and the element itself.
            count=x.times * (2 if x.kind == "argmax" else 1),
            num_bytes=x.times * x.num_bytes,
        )
        for x in strand.met("row", "sum", "lookup", "argmax")
    ]
    return Pair(
        number=number,
        columns=named("column"),
        rows=named("row"),
        tables=named("lookup"),
        divisor=strand.divisor,
        exchanges=add_up(exchanges),
    )


class _Reasons:
    """Says of every parameter what becomes of it, and why."""

    def __init__(
        self,
        every: Sequence[Strand],
        chosen: Sequence[Strand],
        pairs: Sequence[Pair],
        cut: Sequence[Strand],
        size: int | None,
    ) -> None:
        self._strands = {place: strand for strand in every for place in strand.dims}
        self._chosen = {strand.number for strand in chosen}
        self._pairs = {x.number: pair for x, pair in zip(cut, pairs, strict=True)}
        self._size = size

    def rule(self, number: int, leaf: LeafAxes) -> LeafRule:
        """The rule of one parameter."""
        strands = {
            dim: self._strands[number, dim]
            for dim in range(len(leaf.shape))
            if (number, dim) in self._strands
        }
        for dim, strand in strands.items():
            if (pair := self._pairs.get(strand.number)) is not None:
                return LeafRule(
                    path=leaf.path,
                    shape=leaf.shape,
                    dim=dim,
                    pair=pair.number,
                    reason=_role(leaf.path, pair),
                )
        why = {dim: self._why(strand) for dim, strand in strands.items()}
        # That layers are stacked explains nothing where there is another reason.
        why = {dim: x for dim, x in why.items() if x != LOOPED} or why
        words = [*dict.fromkeys(why.values())] or ["a single element"]
        text = words[0]
        if len(words) > 1:
            text = "; ".join(f"dim {dim}: {word}" for dim, word in why.items())
        return LeafRule(
            path=leaf.path, shape=leaf.shape, dim=-1, pair=0, reason=f"whole: {text}"
        )

    def _why(self, strand: Strand) -> str:
        if strand.problem:
            return strand.problem
        if strand.number in self._chosen:
            return f"{self._size} does not divide {strand.divisor}"
        return "another dim of its arrays comes first"


def _role(path: str, pair: Pair) -> str:
    name = f"pair {pair.number}"
    if path in pair.columns:
        closed = _listed(pair.rows) or "sums over it"
        return f"column of {name}: closed by {closed}"
    if path in pair.rows:
        return f"row of {name}: opened by {_listed(pair.columns)}"
    if path in pair.tables:
        return f"table of {name}: rows are looked up, and added"
    return f"with {name}: goes along with its columns"


def _listed(paths: Sequence[str]) -> str:
    rest = len(paths) - _MOST_PATHS
    more = [f"{rest} more"] if rest > 0 else []
    return ", ".join([*paths[:_MOST_PATHS], *more])
