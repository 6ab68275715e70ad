"""Examples stacked into a batch.

Owns what an example may be made of (dicts, nested or not, of arrays and numbers) and
which dtypes plain Python numbers get.

Invariant: the shapes and dtypes of a batch follow from the shapes and types of its
examples, never from their values. It reads nothing and knows no order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardkit.errors import DataError

__all__ = ["stack_examples"]

Path = tuple[str, ...]

# JAX computes in 32 bits unless told otherwise, and Python's numbers name no width.
_NARROW = {"i": np.int32, "f": np.float32, "c": np.complex64}
_NOTHING = "nothing"
_MAX_LINES = 8


def stack_examples(examples: Sequence[Any], names: Sequence[str]) -> Any:
    """Stacks examples leaf by leaf, along a new leading dim.

    NumPy arrays and scalars keep their dtype. Python's integers become int32, its
    floats float32, alone or in lists, and a record of a structured array is taken as
    a dict.

    Args:
        examples: Nested dicts of arrays `[...]` and numbers, all alike; at least one.
        names: What each of them is, for messages, such as `"example 7"`.

    Returns:
        The same nesting of arrays `[len(examples), ...]`.

    Raises:
        DataError: Naming the examples and leaves that are missing, are not arrays, or
            differ in shape or dtype from those of most others.

    Example:
        >>> batch = stack_examples(
        ...     [{"x": np.ones(2), "label": 3}, {"x": np.zeros(2), "label": 4}],
        ...     ["example 0", "example 1"],
        ... )
        >>> batch["x"].shape, batch["label"].tolist()
        ((2, 2), [3, 4])
    """
    rows = [dict(_iterate_leaves(example)) for example in examples]
    columns = [{path: _as_array(leaf) for path, leaf in row.items()} for row in rows]
    paths = list(dict.fromkeys(path for column in columns for path in column))
    problems = []
    for path in paths:
        found = [column.get(path, _NOTHING) for column in columns]
        texts = [_describe(array) for array in found]
        # What most examples have is what is expected: the first may be the odd one.
        usable = [
            text
            for text, x in zip(texts, found, strict=True)
            if isinstance(x, np.ndarray) or x is _NOTHING
        ]
        expected = Counter(usable or ["an array"]).most_common(1)[0][0]
        problems += [
            f"{name}, leaf {'/'.join(path) or '(the example itself)'}: expected "
            f"{expected}, found {text}"
            for name, text in zip(names, texts, strict=True)
            if text != expected
        ]
    if problems or not paths:
        raise DataError(_explain(problems, len(examples)))
    stacked = {path: np.stack([column[path] for column in columns]) for path in paths}
    return _nest(stacked)


def _iterate_leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _iterate_leaves(child, (*path, str(name)))
    elif isinstance(node, np.void) and node.dtype.names is not None:
        for name in node.dtype.names:
            yield from _iterate_leaves(node[name], (*path, name))
    else:
        yield path, node


def _as_array(leaf: Any) -> np.ndarray | str:
    """Returns a leaf as an array, or what it is instead."""
    if isinstance(leaf, bool | int | float | complex | list):
        # Not numpy's scalars, some of which are Python's by inheritance.
        if not isinstance(leaf, np.generic):
            return _narrow(leaf)
    elif not hasattr(leaf, "__array__") and not hasattr(leaf, "__array_interface__"):
        return f"a {type(leaf).__name__}" if leaf is not None else "None"
    array = np.asarray(leaf)
    # JAX's own small floats are of kind V, and without fields.
    if array.dtype.kind in "biufc" or (
        array.dtype.kind == "V" and array.dtype.names is None
    ):
        return array
    return f"values of dtype {array.dtype}"


def _narrow(numbers: Any) -> np.ndarray | str:
    try:
        array = np.asarray(numbers)
    except ValueError:
        return "a list of lists that differ in length"
    if array.dtype.kind not in "bifcu":
        return f"a list of dtype {array.dtype}" if array.ndim else "a huge integer"
    dtype = _NARROW.get(array.dtype.kind.replace("u", "i"), array.dtype)
    if array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(np.int32)
        if not limits.min <= array.min() <= array.max() <= limits.max:
            return "integers that do not fit into int32"
    return array.astype(dtype)


def _describe(found: np.ndarray | str) -> str:
    return found if isinstance(found, str) else f"{found.dtype}{list(found.shape)}"


def _explain(problems: list[str], num_examples: int) -> str:
    if not problems:
        return (
            f"A batch of {num_examples} examples: expected dicts of arrays, found no "
            "leaves in them. Give every example at least one array or number."
        )
    more = len(problems) - _MAX_LINES
    return (
        f"A batch of {num_examples} examples cannot be stacked:"
        + "".join(f"\n  {line}" for line in problems[:_MAX_LINES])
        + (f"\n  … and {more} more" if more > 0 else "")
        + "\nGive every example the same leaves, shapes and dtypes: leave text out, "
        "name the parts of tuples in a dict, pad, cut or pack (sk.sources.Packed) what "
        "differs in length, or pass your own collate."
    )


def _nest(flat: Mapping[Path, np.ndarray]) -> Any:
    if () in flat:
        return flat[()]
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = array
    return tree
