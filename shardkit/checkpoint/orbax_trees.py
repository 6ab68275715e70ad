"""Plain Orbax checkpoints of Flax, as trees of ours and back.

Owns how the paths of a Flax NNX state or a Linen `TrainState`, as Orbax stores them,
relate to those of a `shardkit.TrainState`. Invariant: arrays pass as they are, moments
keep to their parameters, and nothing is left out; whether leaf and leaf agree in shape
and dtype is for who restores to say.

In a path Orbax spells the indices of layers and of optimizer states as text, as we do.
NNX puts `/value` behind the path of every variable; `nnx.Optimizer` makes variables of
counts, too, which the state of optax alone, hence ours, does not have.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardkit.checkpoint.remap import Remap
from shardkit.checkpoint.rules import Rule
from shardkit.errors import RestoreError

__all__ = ["from_linen", "from_nnx", "to_linen", "to_nnx"]

_VALUE = "/value"


def from_nnx(
    tree: Mapping[str, Any], *, model: str = "", optimizer: str | None = None
) -> Remap:
    """Makes the rules from an NNX state, or a pure dict of one, to ours.

    Args:
        tree: What was stored; just the paths are looked at.
        model: Where the model's state is in it, such as `model`; empty for all of it.
        optimizer: Where the state of an `nnx.Optimizer` is, such as `optimizer`. Its
            step is a uint32, where ours is an int32.

    Raises:
        RestoreError: If there is nothing at these places.

    Example:
        >>> remap = from_nnx({"model/up/kernel/value": None}, model="model")
        >>> remap.rules[0].describe()
        'model/{path...}/value -> params/{path...}/value'
    """
    start = f"{model}/" * bool(model)
    places = [f"{place}/" for place in (optimizer,) if place]
    params = [
        path.removeprefix(start)
        for path in tree
        if path.startswith(start) and not path.startswith(tuple(places))
    ]
    _require(tree, {model or "anywhere": params})
    suffix = _suffix(params)
    rules = []
    if optimizer:
        states, step = f"{optimizer}/opt_state/", f"{optimizer}/step"
        found = [p.removeprefix(states) for p in tree if p.startswith(states)]
        _require(tree, {states: found})
        rules += [Rule(f"{step}{suffix}", "step")]
        rules += [
            Rule(f"{states}{path}", f"opt_state/{path.removesuffix(suffix)}")
            for path in _not_of(found, params)
        ]
        rules += [
            Rule(f"{states}{{path...}}{suffix}", f"opt_state/{{path...}}{_VALUE}")
        ]
    rules += [Rule(f"{start}{{path...}}{suffix}", f"params/{{path...}}{_VALUE}")]
    return Remap(rules)


def to_nnx(
    tree: Mapping[str, Any], *, model: str = "model", optimizer: str | None = None
) -> Remap:
    """Makes the rules from a state of ours, of an NNX model, to NNX's.

    What else a state of ours has (`ema/…`) stays unmatched, for the caller to drop.

    Args:
        tree: Ours; just the paths are looked at.
        model: Where the model's state goes; empty for the top.
        optimizer: Where that of an `nnx.Optimizer` goes; None if it stays out.

    Raises:
        RestoreError: If there are no params.
    """
    params = [path[7:] for path in tree if path.startswith("params/")]
    _require(tree, {"params/": params})
    start = f"{model}/" * bool(model)
    rules = [Rule("params/{path...}", f"{start}{{path...}}")]
    if optimizer:
        states = f"{optimizer}/opt_state/"
        found = [path[10:] for path in tree if path.startswith("opt_state/")]
        rules += [Rule("step", f"{optimizer}/step{_VALUE}")]
        rules += [
            Rule(f"opt_state/{path}", f"{states}{path}{_VALUE}")
            for path in _not_of(found, params)
        ]
        rules += [Rule("opt_state/{path...}", f"{states}{{path...}}")]
    return Remap(rules)


def from_linen(
    tree: Mapping[str, Any], *, numbered: Sequence[str] = (), suffix: str = ""
) -> Remap:
    """Makes the rules from a Linen `TrainState` to a state of ours.

    The moments follow the params; `step` and counts pass as they are.

    Args:
        tree: What was stored; just the paths are looked at.
        numbered: Lists of submodules, which Linen calls `layers_0` and NNX `layers/0`.
        suffix: What the paths of our params end with: `/value` if ours is an NNX model.

    Raises:
        RestoreError: If there are no params.

    Example:
        >>> remap = from_linen({"params/layers_0/kernel": None}, numbered=["layers"])
        >>> remap.rules[0].describe()
        'params/layers_{i}/{path...} -> params/layers/{i}/{path...}'
    """
    _require(tree, {"params/": [p for p in tree if p.startswith("params/")]})
    # Made of all variables, or of the collection of params alone.
    has_collection = any(path.startswith("params/params/") for path in tree)
    return _linen(numbered, suffix, has_collection, is_import=True)


def to_linen(
    *, numbered: Sequence[str] = (), suffix: str = "", has_collection: bool = False
) -> Remap:
    """Makes the rules from a state of ours to a Linen `TrainState`.

    Args:
        numbered: Lists of submodules, which Linen calls `layers_0` and NNX `layers/0`.
        suffix: What the paths of our params end with.
        has_collection: Whether its `params` are all variables, with a collection
            `params` among them.
    """
    return _linen(numbered, suffix, has_collection, is_import=False)


def _linen(
    numbered: Sequence[str], suffix: str, has_collection: bool, *, is_import: bool
) -> Remap:
    theirs = "params/" + "params/" * has_collection
    pairs = [
        (
            f"{theirs}{name}_{{i}}/{{path...}}",
            f"params/{name}/{{i}}/{{path...}}{suffix}",
        )
        for name in numbered
    ]
    pairs.append((f"{theirs}{{path...}}", f"params/{{path...}}{suffix}"))
    if not is_import:
        pairs = [(ours, theirs) for theirs, ours in pairs]
    rules = [Rule(source, target) for source, target in pairs]
    return Remap(rules, keep_rest=True, follow=("opt_state", "ema"))


def _suffix(params: Sequence[str]) -> str:
    return _VALUE if all(path.endswith(_VALUE) for path in params) else ""


def _not_of(paths: Iterable[str], params: Sequence[str]) -> list[str]:
    """Lists the paths that do not end in the path of a parameter."""
    known = set(params)

    def follows(path: str) -> bool:
        parts = path.split("/")
        return any("/".join(parts[k:]) in known for k in range(len(parts)))

    return [path for path in paths if not follows(path)]


def _require(tree: Mapping[str, Any], found: Mapping[str, Sequence[str]]) -> None:
    for place, paths in found.items():
        if not paths:
            first = ", ".join([*tree][:6]) or "nothing"
            raise RestoreError(f"expected leaves at {place}, found {first}")
